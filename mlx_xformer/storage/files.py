"""Files: tensors in the safetensors format, and the files that stand beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from safetensors import SafetensorError, safe_open

DTYPES = {  # in the words of safetensors
    "F64": mx.float64,
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "I64": mx.int64,
    "I32": mx.int32,
    "I16": mx.int16,
    "I8": mx.int8,
    "U32": mx.uint32,
    "U8": mx.uint8,
    "BOOL": mx.bool_,
}


def hash_file(path: Path, algorithm: str = "sha256", head: bytes = b"") -> str:
    """The digest of a file's content after a head, in hexadecimal."""
    digest = hashlib.new(algorithm, head)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_extras(folder: Path, extras: Mapping[str, bytes]) -> None:
    """Writes files by their names, which may have a folder in them."""
    for name, content in extras.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def write_safetensors(
    path: Path,
    tensors: Mapping[str, mx.array],
    metadata: Mapping[str, str],
    arrays: Iterable[tuple[str, mx.array]] | None = None,
) -> None:
    """Writes a .safetensors file, one tensor after the other, and checks that it is whole.

    Args:
        path: The file.
        tensors: The tensors, or lazy arrays of their shapes and dtypes.
        metadata: Of the file.
        arrays: The values, (name, array) in the order of `tensors`, so that only one of them need be in memory at a
            time; those of `tensors` if None.

    Raises:
        ValueError: An array has another shape, dtype or place than `tensors` says.
        OSError: The file could not be written whole.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, x in tensors.items():
        begin, end = end, end + x.nbytes
        header[name] = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, x in tensors.items() if arrays is None else arrays:
            like, begin = tensors[name], 8 + len(text) + header[name]["data_offsets"][0]
            if (x.shape, x.dtype) != (like.shape, like.dtype) or file.tell() != begin:
                raise ValueError(f"{name} must be {like.shape} {like.dtype} and in its turn, got {x.shape} {x.dtype}")
            file.write(bytes_of(x))
    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise OSError(f"{path.name} could not be written whole: {error}") from None


def bytes_of(x: mx.array) -> memoryview:
    """The elements of an array in row-major order, as bytes."""
    cpu = mx.cpu  # the one device that has float64
    flat = mx.contiguous(x, stream=cpu).reshape(-1, stream=cpu)
    return memoryview(cast(Any, mx.view(flat, mx.uint8, stream=cpu)))
