"""PyTorch's zip files (.th, .pt, .bin) without PyTorch: the archive, its tensors, and demucs' packages.

Format: torch/serialization.py (a zip of stored entries: data.pkl, byteorder, data/0, data/1, ...) and
demucs/states.py (a package is {klass, args, kwargs, state, training_args}).
"""

from __future__ import annotations

import functools
import json
import math
import re
import struct
import zipfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ...storage.files import DTYPES
from ...storage.messages import shorten
from ..stored import RawTensor, StoredTensor, check_booleans
from .torch_pickle import Symbol, View, read_pickle

_MAX_PICKLE = 16 << 20
_MAX_ENTRIES = 200_000
_MAX_NODES = 10_000  # values in the arguments of a model
_MAX_SHARING = 4  # bytes of tensors for each byte of the file: tied weights share storage
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_DAMAGES = (zipfile.BadZipFile, NotImplementedError, EOFError, struct.error, OSError, RuntimeError)
_PACKAGE = {"klass", "args", "kwargs", "state"}


def open_torch(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a state dict or of a demucs package, each read when it is asked for, and metadata.

    The metadata of a package are its class and arguments: JSON text in the encoding of demucs/hf.py.

    Raises:
        ValueError: The file is refused, and why. The message does not name the file.
    """
    with path.open("rb") as file:
        head = file.read(len(_LEGACY))
    if head == _LEGACY:
        raise ValueError(
            "this is PyTorch's older format, from before 1.6: load it with PyTorch and save it again with torch.save"
        )
    if not head.startswith(b"PK"):
        raise ValueError(f"not a PyTorch file: it must be a zip, it begins with {head[:4]!r}")
    try:
        with zipfile.ZipFile(path) as archive:
            size = path.stat().st_size
            prefix, entries = _entries(archive, size)
            start = f"{prefix}/data/"
            keys = {name.removeprefix(start): n for name, n in entries.items() if name.startswith(start)}
            value = read_pickle(archive.read(f"{prefix}/data.pkl"), keys)
    except _DAMAGES as error:
        raise ValueError(f"the zip is truncated or damaged ({shorten(error)})") from None
    state, metadata = _package(value)
    total = sum(view.storage.width * math.prod(view.shape) for view in state.values())
    if total > _MAX_SHARING * size:
        raise ValueError(f"the tensors must share storage at most {_MAX_SHARING} times, got {total} bytes in {size}")
    storages = _Storages(path, start)
    tensors = {
        name: StoredTensor(DTYPES[view.storage.dtype], view.shape, functools.partial(storages.read, name, view))
        for name, view in state.items()
    }
    return tensors, metadata


def _entries(archive: zipfile.ZipFile, size: int) -> tuple[str, dict[str, int]]:
    """The name of the archive's one folder, and every entry with its size: all stored, no larger than the file."""
    infos = archive.infolist()
    entries = {info.filename: info.file_size for info in infos}
    if len(infos) > _MAX_ENTRIES or len(entries) < len(infos):
        raise ValueError(f"the zip must have distinct entries, at most {_MAX_ENTRIES}, got {len(infos)}")
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
            raise ValueError(f"zip entry {shorten(info.filename)} must be stored, neither compressed nor encrypted")
    if sum(entries.values()) > size:
        raise ValueError(f"the zip claims {sum(entries.values())} bytes of content in a file of {size}")
    pickles = [name for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(pickles) != 1:
        raise ValueError(f"the zip must hold one folder with a data.pkl, got {len(pickles)}")
    if entries[pickles[0]] > _MAX_PICKLE:
        raise ValueError(f"data.pkl must be at most {_MAX_PICKLE} bytes, got {entries[pickles[0]]}")
    prefix = pickles[0].removesuffix("/data.pkl")
    order = archive.read(f"{prefix}/byteorder") if f"{prefix}/byteorder" in entries else b"little"
    if order != b"little":
        raise ValueError(f"byteorder must be little, got {shorten(order[:16])}")
    return prefix, entries


def _package(value: Any) -> tuple[dict[str, View], dict[str, str]]:
    """The named tensors, and a package's class and arguments."""
    if not isinstance(value, dict):
        raise ValueError(f"must hold a dict of tensors or a demucs package, got a {type(value).__name__}")
    metadata = {}
    if value.keys() >= _PACKAGE:
        klass, args, kwargs = value["klass"], value["args"], value["kwargs"]
        if not isinstance(klass, Symbol) or not isinstance(args, tuple) or not isinstance(kwargs, dict):
            raise ValueError("a demucs package must hold a class, a tuple and a dict as klass, args and kwargs")
        budget = [_MAX_NODES]
        metadata = {
            "klass": klass.name,
            "args": json.dumps(_plain(list(args), budget, 8)),
            "kwargs": json.dumps(_plain(kwargs, budget, 8)),
        }
        value = value["state"]
    if isinstance(value, dict) and value.get("__quantized"):
        raise ValueError("weights quantised with DiffQ are not supported")
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ValueError("the state must be a dict from names to tensors")
    others = [name for name, entry in value.items() if not isinstance(entry, View)]
    if others or not value:
        raise ValueError(f"every value must be a tensor, got {shorten(', '.join(sorted(others)) or 'nothing at all')}")
    return value, metadata


def _plain(value: Any, budget: list[int], depth: int) -> Any:
    """A value as JSON holds it. The budget and the depth bound values that share or contain themselves."""
    budget[0] -= 1
    if budget[0] < 0 or depth == 0:
        raise ValueError("the arguments of the model are nested too deep or too many")
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, budget, depth - 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, budget, depth - 1) for item in value]
    if isinstance(value, Fraction):
        return {"_type": "fraction", "numerator": value.numerator, "denominator": value.denominator}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"the arguments of the model hold a {type(value).__name__}, not plain values")


class _Storages:
    """Reads tensors of an archive. The storage read last is kept, since tensors that share one follow each other."""

    def __init__(self, path: Path, start: str):
        self._path, self._start = path, start
        self._archive: zipfile.ZipFile | None = None
        self._key, self._bytes = "", b""

    def read(self, name: str, view: View) -> mx.array:
        """A view as an array of its own strides."""
        storage = view.storage
        if storage.key != self._key:
            try:
                if self._archive is None:  # kept open, since a file has hundreds of storages
                    self._archive = zipfile.ZipFile(self._path)
                self._bytes = self._archive.read(self._start + storage.key)
            except (*_DAMAGES, KeyError) as error:
                raise ValueError(f"the zip is truncated or damaged ({shorten(error)})") from None
            self._key = storage.key
        flat = np.frombuffer(self._bytes, _BITS[storage.width])
        check_booleans(name, storage.dtype, flat)
        strides = [step * storage.width for step in view.strides]
        bits = np.lib.stride_tricks.as_strided(flat[view.offset :], view.shape, strides, writeable=False)
        return RawTensor(storage.dtype, np.ascontiguousarray(bits).reshape(view.shape)).to_array()
