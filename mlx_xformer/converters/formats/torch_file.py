"""PyTorch's files (.th, .pt, .pth, .ckpt, .bin) without PyTorch: the archive, and the tensors in it.

Format: torch/serialization.py (a zip of stored entries: data.pkl, byteorder, data/0, data/1, ...).
"""

from __future__ import annotations

import functools
import io
import math
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ...storage.files import DTYPES
from ...storage.messages import shorten
from ..stored import RawTensor, StoredTensor, check_booleans
from .torch_contents import read_contents
from .torch_legacy import open_legacy
from .torch_pickle import MAX_PICKLE, read_pickle
from .torch_values import Storage, View

_MAX_ENTRIES = 200_000
_MAX_SHARING = 4  # bytes of tensors for each byte of the file: tied weights share storage
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_DAMAGES = (zipfile.BadZipFile, NotImplementedError, EOFError, struct.error, OSError, RuntimeError)


def open_torch(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a file, each read when it is asked for, and metadata: see torch_contents.read_contents.

    Raises:
        ValueError: The file is refused, and why. The message does not name the file.
    """
    with path.open("rb") as file:
        head = file.read(4)
    if head.startswith(b"PK"):
        value, read = _open_zip(path)
    elif head.startswith(b"\x80"):
        value, read = open_legacy(path)
    else:
        raise ValueError(f"not a PyTorch file: it must be a zip, it begins with {head!r}")
    state, metadata = read_contents(value)
    total, size = sum(view.storage.width * math.prod(view.shape) for view in state.values()), path.stat().st_size
    if total > _MAX_SHARING * size:
        raise ValueError(f"the tensors must share storage at most {_MAX_SHARING} times, got {total} bytes in {size}")
    storages = _Storages(read)
    tensors = {
        name: StoredTensor(DTYPES[view.storage.dtype], view.shape, functools.partial(storages.read, name, view))
        for name, view in state.items()
    }
    return tensors, metadata


def _open_zip(path: Path) -> tuple[Any, Callable[[str], bytes]]:
    """The value of an archive, and a function that reads a storage by its key."""
    try:
        archive = zipfile.ZipFile(path)  # kept open, since a file has hundreds of storages
        prefix, entries = _entries(archive, path.stat().st_size)
        pickle = archive.read(f"{prefix}/data.pkl")
    except _DAMAGES as error:
        raise ValueError(f"the zip is truncated or damaged ({shorten(error)})") from None

    def register(storage: Storage) -> None:
        held = entries.get(f"{prefix}/data/{storage.key}")
        if held is None:
            raise ValueError(f"the pickle names storage {shorten(storage.key)}, which the zip does not hold")
        if held != storage.numel * storage.width:
            raise ValueError(f"storage {storage.key} must be {storage.numel} x {storage.width} bytes, got {held}")

    def read(key: str) -> bytes:
        try:
            return archive.read(f"{prefix}/data/{key}")
        except (*_DAMAGES, KeyError) as error:
            raise ValueError(f"the zip is truncated or damaged ({shorten(error)})") from None

    return read_pickle(io.BytesIO(pickle), register), read


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
    if entries[pickles[0]] > MAX_PICKLE:
        raise ValueError(f"data.pkl must be at most {MAX_PICKLE} bytes, got {entries[pickles[0]]}")
    prefix = pickles[0].removesuffix("/data.pkl")
    order = archive.read(f"{prefix}/byteorder") if f"{prefix}/byteorder" in entries else b"little"
    if order != b"little":
        raise ValueError(f"byteorder must be little, got {shorten(order[:16])}")
    return prefix, entries


class _Storages:
    """Reads tensors of a file. The storage read last is kept, since tensors that share one follow each other."""

    def __init__(self, read: Callable[[str], bytes]):
        self._read = read
        self._key: str | None = None
        self._bytes = b""

    def read(self, name: str, view: View) -> mx.array:
        """A view as an array of its own strides."""
        storage = view.storage
        if storage.key != self._key:
            self._bytes = self._read(storage.key)
            self._key = storage.key
        flat = np.frombuffer(self._bytes, _BITS[storage.width])
        check_booleans(name, storage.dtype, flat)
        strides = [step * storage.width for step in view.strides]
        bits = np.lib.stride_tricks.as_strided(flat[view.offset :], view.shape, strides, writeable=False)
        return RawTensor(storage.dtype, np.ascontiguousarray(bits).reshape(view.shape)).to_array()
