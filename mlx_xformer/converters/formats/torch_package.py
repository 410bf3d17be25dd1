"""Writes a package of demucs, the .th file that `demucs --repo` and `torch.load` take, without PyTorch.

Formats: demucs/states.py (serialize_model, save_with_checksum) and torch/serialization.py. The class is named, not
pickled; tensors keep their dtype, as those of released models, which are float16, do.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...storage.files import bytes_of, hash_file
from ..stored import dtype_name
from .demucs_values import decode_values
from .torch_values import STORAGES

_DIGITS = 8  # of the SHA-256, in the file's name
_FOLDER = "archive"


def write_package(
    path: Path, tensors: Mapping[str, mx.array], metadata: Mapping[str, str], arrays: Iterable[tuple[str, mx.array]]
) -> Path:
    """Writes a package, one tensor after the other.

    Args:
        path: SIGNATURE.th.
        tensors: Lazy arrays of the tensors' shapes and dtypes.
        metadata: `klass`, and `args` and `kwargs` as JSON text.
        arrays: The values, (name, array) in the order of `tensors`.

    Returns:
        The file, SIGNATURE-DIGITS.th with the first digits of its SHA-256.
    """
    with zipfile.ZipFile(path, "w") as archive:
        _write_entry(archive, "data.pkl", _make_pickle(tensors, metadata))
        _write_entry(archive, "byteorder", b"little")
        for key, (_, x) in enumerate(arrays):
            _write_entry(archive, f"data/{key}", bytes_of(x))
        _write_entry(archive, "version", b"3\n")
    return path.rename(path.with_name(f"{path.stem}-{hash_file(path)[:_DIGITS]}.th"))


def _write_entry(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    """A stored entry, with the same date in every file."""
    archive.writestr(zipfile.ZipInfo(f"{_FOLDER}/{name}"), content)


def _make_pickle(tensors: Mapping[str, mx.array], metadata: Mapping[str, str]) -> bytes:
    """The program that makes the package, in protocol 2."""
    storages = {dtype: name.removeprefix("torch.") for name, (dtype, _) in STORAGES.items()}
    state = b"".join(
        _pickle_value(name) + _pickle_tensor(key, x, storages[dtype_name(x.dtype)])
        for key, (name, x) in enumerate(tensors.items())
    )
    module, _, klass = metadata["klass"].rpartition(".")
    args, kwargs = (decode_values(key, metadata[key]) for key in ("args", "kwargs"))
    entries = {
        "klass": _pickle_global(module, klass),
        "args": _pickle_value(tuple(args)),
        "kwargs": _pickle_value(kwargs),
        "state": b"}(" + state + b"u",
        "training_args": b"}",
    }
    return b"\x80\x02}(" + b"".join(_pickle_value(name) + x for name, x in entries.items()) + b"u."


def _pickle_tensor(key: int, x: mx.array, storage: str) -> bytes:
    """_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks) of a tensor that fills its storage."""
    strides = [1]
    for size in x.shape[:0:-1]:
        strides.append(strides[-1] * size)
    persistent = b"".join(
        (_pickle_value("storage"), _pickle_global("torch", storage), *map(_pickle_value, (str(key), "cpu", x.size)))
    )
    stored = b"(" + persistent + b"tQ"
    sizes = (_pickle_value(x.shape), _pickle_value(tuple(strides[::-1][-x.ndim :] if x.ndim else ())))
    hooks = _pickle_global("collections", "OrderedDict") + b")R"
    arguments = b"".join((stored, _pickle_value(0), *sizes, _pickle_value(False), hooks))
    return _pickle_global("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"tR"


def _pickle_global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _pickle_value(value: Any) -> bytes:
    """The opcodes of a plain value."""
    match value:
        case None | bool():
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        case int() if -(2**31) <= value < 2**31:
            return b"J" + struct.pack("<i", value)
        case int():
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(data)]) + data
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            data = value.encode("utf-8", "surrogatepass")
            return b"X" + struct.pack("<I", len(data)) + data
        case Fraction():
            return _pickle_global("fractions", "Fraction") + b"(" + _pickle_value(str(value)) + b"tR"
        case tuple():
            return b"(" + b"".join(map(_pickle_value, value)) + b"t"
        case list():
            return b"](" + b"".join(map(_pickle_value, value)) + b"e"
        case dict():
            return b"}(" + b"".join(_pickle_value(key) + _pickle_value(item) for key, item in value.items()) + b"u"
    raise TypeError(f"a package must hold plain values, got a {type(value).__name__}")
