"""Reads files of tensors: .safetensors, PyTorch's .th, .pt, .pth, .ckpt and .bin, CTranslate2's .bin, and .npz.

Tensors come bit for bit in their stored dtype. PyTorch is not needed, and nothing is ever unpickled. Every problem with
a file is one ValueError that begins with its path.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from ...storage.files import DTYPES, hash_file
from ...storage.messages import shorten
from ..stored import RawTensor, StoredTensor, check_booleans, dtype_name, hold_array, open_safetensors
from .ctranslate2 import is_ctranslate2, open_ctranslate2
from .torch_file import open_torch

_NUMPY = {
    "f8": "F64",
    "f4": "F32",
    "f2": "F16",
    "i8": "I64",
    "i4": "I32",
    "i2": "I16",
    "i1": "I8",
    "u1": "U8",
    "b1": "BOOL",
}
_MAX_NPZ = 32 << 30
_LARGE = 1000.0
TORCH_SUFFIXES = (".th", ".pt", ".pth", ".ckpt", ".bin")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES, ".npz")


@dataclass(frozen=True)
class Source:
    """A file that has been read.

    Attributes:
        path: The file.
        tensors: Its tensors by their own names.
        metadata: What the file says of itself.
        sha256: The digest of its content.
    """

    path: Path
    tensors: dict[str, mx.array]
    metadata: dict[str, str]
    sha256: str

    def listing(self) -> list[tuple[str, tuple[int, ...], str, int]]:
        """(name, shape, dtype, bytes) of every tensor, by name."""
        return [(name, x.shape, dtype_name(x.dtype), x.nbytes) for name, x in sorted(self.tensors.items())]


def read_source(path: str | Path) -> Source:
    """Reads a file of tensors.

    Args:
        path: A file that ends in one of SUFFIXES.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read. The message is one line that begins with the path.
    """
    stored, metadata = open_source(path)
    tensors = {name: x.read() for name, x in stored.items()}
    mx.eval(tensors)
    return Source(Path(path), tensors, metadata, hash_file(Path(path)))


def open_source(path: str | Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a file, each read when it is asked for, and the file's metadata.

    Arguments and errors are those of read_source; reading a tensor raises the same errors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: a model file must end in {', '.join(SUFFIXES)}, got {path.suffix or 'no suffix'}")
    try:
        if path.suffix == ".safetensors":
            tensors, metadata = open_safetensors(path)
        elif path.suffix == ".npz":
            tensors, metadata = _read_npz(path), {}
        elif is_ctranslate2(path):
            tensors, metadata = open_ctranslate2(path)
        else:
            tensors, metadata = open_torch(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return {name: StoredTensor(x.dtype, x.shape, _naming(path, x.read)) for name, x in tensors.items()}, metadata


def _naming(path: Path, read: Callable[[], mx.array]) -> Callable[[], mx.array]:
    """read(), whose errors begin with the path."""

    def named() -> mx.array:
        try:
            return read()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    return named


def _read_npz(path: Path) -> dict[str, StoredTensor]:
    """The arrays of a file. Its parts may be compressed, so all of them are read at once."""
    try:
        with zipfile.ZipFile(path) as archive:
            total = sum(info.file_size for info in archive.infolist())
        if total > _MAX_NPZ:
            raise ValueError(f"the arrays must take at most {_MAX_NPZ} bytes, got {total}")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: hold_array(_from_numpy(name, arrays[name])) for name in arrays.files}
    except (zipfile.BadZipFile, EOFError, OSError, MemoryError, SyntaxError, RuntimeError, TypeError) as error:
        raise ValueError(f"not a whole .npz file ({shorten(error)})") from None


def _from_numpy(name: str, array: np.ndarray) -> mx.array:
    dtype = _NUMPY.get(array.dtype.str[1:])
    if dtype is None or array.dtype.byteorder == ">":
        raise ValueError(f"{shorten(name)} must have one of the dtypes {', '.join(DTYPES)}, got {array.dtype.str}")
    bits = np.frombuffer(array.tobytes(), f"u{DTYPES[dtype].size}").reshape(array.shape)
    check_booleans(name, dtype, bits)
    return RawTensor(dtype, bits).to_array()


def scan(tensors: Mapping[str, mx.array]) -> list[str]:
    """A line for every tensor that holds values which are not finite, or above 1000 in magnitude."""
    cpu = mx.cpu  # the one device that has float64
    found = {}
    for name, x in sorted(tensors.items()):
        if mx.issubdtype(x.dtype, mx.floating) and x.size:
            # without an array of magnitudes beside x
            largest = mx.maximum(mx.max(x, stream=cpu), mx.negative(mx.min(x, stream=cpu), stream=cpu), stream=cpu)
            found[name] = mx.sum(mx.logical_not(mx.isfinite(x, stream=cpu), stream=cpu), stream=cpu), largest
    mx.eval(found)
    lines = []
    for name, (count, largest) in found.items():
        if count.item():
            lines.append(f"{name}: {count.item()} of {tensors[name].size} values are not finite")
        elif (magnitude := cast(float, largest.item())) > _LARGE:
            lines.append(f"{name}: values up to {magnitude:.4g} in magnitude")
    return lines


def check_plain_name(name: Any) -> str:
    """`name` if it can only be a file's own name; ValueError for anything that could lead elsewhere."""
    if not isinstance(name, str):
        raise ValueError(f"a signature must be text (in quotes, if it is all digits), got a {type(name).__name__}")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", name):
        raise ValueError(f"a signature must be a plain name of letters, digits, _ - and ., got {shorten(ascii(name))}")
    return name
