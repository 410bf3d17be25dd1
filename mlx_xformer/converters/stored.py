"""Tensors in files that are read when they are asked for, bit for bit in their stored dtype."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open

from ..storage.files import DTYPES
from ..storage.messages import shorten


@dataclass(frozen=True)
class RawTensor:
    """A tensor as unsigned integers of its width, and the dtype that they stand for ("F16", "BOOL", ...)."""

    dtype: str
    bits: np.ndarray

    def to_array(self) -> mx.array:
        """The bits under their dtype. The detour over integers keeps every bit of every value, NaNs included."""
        flat = mx.array(self.bits.reshape(-1))
        return mx.view(flat, DTYPES[self.dtype], stream=mx.cpu).reshape(self.bits.shape, stream=mx.cpu)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: its dtype and shape, and a function that reads it."""

    dtype: mx.Dtype
    shape: tuple[int, ...]
    read: Callable[[], mx.array]

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def blank(self) -> mx.array:
        """An array of the same shape and dtype, lazy and never to be computed."""
        return mx.zeros(self.shape, self.dtype)


Tensors = Mapping[str, StoredTensor | mx.array]  # most code looks at names, shapes and dtypes only


def hold_array(x: mx.array) -> StoredTensor:
    """An array that is in memory already."""
    return StoredTensor(x.dtype, x.shape, lambda: x)


def read_array(x: StoredTensor | mx.array) -> mx.array:
    """The values of a tensor."""
    return x.read() if isinstance(x, StoredTensor) else x


def make_blanks(tensors: Mapping[str, StoredTensor]) -> dict[str, mx.array]:
    """Lazy arrays of the tensors' shapes and dtypes."""
    return {name: x.blank() for name, x in tensors.items()}


def dtype_name(dtype: mx.Dtype) -> str:
    """The dtype in the words of safetensors."""
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype).removeprefix("mlx.core."))


def check_booleans(name: str, dtype: str, bits: np.ndarray) -> None:
    """ValueError for a tensor of booleans with other bytes than 0 and 1."""
    if dtype == "BOOL" and (most := bits.max(initial=0)) > 1:
        raise ValueError(f"{shorten(name)} must hold booleans, 0 or 1, got {most}")


def open_safetensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a file, not yet read, and its metadata.

    The safetensors library checks the header: its size, its JSON, and that the tensors fill the file without gap or
    overlap.

    Raises:
        ValueError: The file is not whole, or has a dtype that MLX does not have. The message does not name the file.
    """
    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise ValueError(f"not a whole safetensors file ({shorten(error)})") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", None) or {}  # null where MLX was given none
    tensors = {}
    for name, entry in header.items():
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if dtype not in DTYPES:
            raise ValueError(f"{shorten(name)} must have one of the dtypes {', '.join(DTYPES)}, got {dtype}")
        tensors[name] = stored_at(path, name, dtype, shape, 8 + length + begin, end - begin)
    return tensors, metadata


def stored_at(path: Path, name: str, dtype: str, shape: tuple[int, ...], offset: int, size: int) -> StoredTensor:
    """A tensor whose `size` bytes lie in a file at `offset`, in little-endian order."""

    def read() -> mx.array:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) != size:
            raise ValueError(f"the file is truncated: {shorten(name)} must have {size} bytes, got {len(data)}")
        bits = np.frombuffer(data, f"<u{DTYPES[dtype].size}").reshape(shape)
        check_booleans(name, dtype, bits)
        return RawTensor(dtype, bits).to_array()

    return StoredTensor(DTYPES[dtype], shape, read)
