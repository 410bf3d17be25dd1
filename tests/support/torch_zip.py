"""Writes PyTorch's zip files byte by byte, without PyTorch: sound ones, and ones that no PyTorch would write."""

from __future__ import annotations

import struct
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np

STORAGES = {"f2": "HalfStorage", "f4": "FloatStorage", "f8": "DoubleStorage", "i8": "LongStorage", "b1": "BoolStorage"}
MARK = b"("


class Code(bytes):
    """Pickle opcodes that leave one value on the stack."""


def glob(module: str, name: str) -> Code:
    return Code(b"c" + module.encode() + b"\n" + name.encode() + b"\n")


def call(function: Code, *args) -> Code:
    return Code(function + code(args) + b"R")


def code(value) -> Code:
    """The opcodes of a plain value; Code passes through."""
    if isinstance(value, Code):
        return value
    if value is None or isinstance(value, bool):
        return Code({None: b"N", True: b"\x88", False: b"\x89"}[value])
    if isinstance(value, int):
        return Code(b"J" + struct.pack("<i", value) if -(2**31) <= value < 2**31 else long(value))
    if isinstance(value, float):
        return Code(b"G" + struct.pack(">d", value))
    if isinstance(value, str):
        return Code(b"X" + struct.pack("<I", len(value.encode())) + value.encode())
    if isinstance(value, Fraction):
        return call(glob("fractions", "Fraction"), str(value))
    if isinstance(value, tuple):
        return Code(MARK + b"".join(map(code, value)) + b"t")
    if isinstance(value, list):
        return Code(b"]" + MARK + b"".join(map(code, value)) + b"e")
    if isinstance(value, dict):
        return Code(b"}" + MARK + b"".join(code(k) + code(v) for k, v in value.items()) + b"u")
    raise TypeError(type(value))


def long(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def pickled(value) -> bytes:
    return b"\x80\x02" + code(value) + b"."


def storage(key: str, numel: int, kind: str = "HalfStorage") -> Code:
    return Code(code(("storage", glob("torch", kind), key, "cpu", numel)) + b"Q")


def tensor(stored: Code, shape, strides, offset=0) -> Code:
    ordered = call(glob("collections", "OrderedDict"))
    rebuild = glob("torch._utils", "_rebuild_tensor_v2")
    return call(rebuild, stored, offset, tuple(shape), tuple(strides), False, ordered)


def write(path: Path, pickle: bytes, storages: dict[str, bytes], *, compression=zipfile.ZIP_STORED, **extra) -> Path:
    """An archive as torch.save lays it out. `extra` adds or, with None, leaves out entries (byteorder, ...)."""
    entries = {"data.pkl": pickle, "byteorder": b"little", "version": b"3\n"}
    entries |= {f"data/{key}": data for key, data in storages.items()} | extra
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            if data is not None:
                archive.writestr(f"archive/{name}", data)
    return path


def save(path: Path, arrays: dict[str, np.ndarray], package: dict | None = None) -> Path:
    """What torch.save writes for a dict of tensors or, given klass, args and kwargs, for a demucs package."""
    state, storages = {}, {}
    for key, (name, array) in enumerate(arrays.items()):
        strides = [s // array.itemsize for s in np.ascontiguousarray(array).reshape(array.shape).strides]
        stored = storage(str(key), array.size, STORAGES[array.dtype.str[1:]])
        state[name] = tensor(stored, array.shape, strides)
        storages[str(key)] = array.tobytes()
    return write(path, pickled(state if package is None else {**package, "state": state}), storages)
