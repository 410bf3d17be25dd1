"""PyTorch's older format, from before version 1.6 (torch.save with _use_new_zipfile_serialization=False).

Five pickles (a magic number, the version, the machine's sizes, the value, the keys of the storages), then for each key
the number of its elements in 8 bytes, and the elements. Source: torch/serialization.py, _legacy_save.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...storage.messages import shorten
from .torch_pickle import MAX_PICKLE, read_pickle
from .torch_values import Storage

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001


def open_legacy(path: Path) -> tuple[Any, Callable[[str], bytes]]:
    """The value of a file, and a function that reads a storage by its key. ValueError does not name the file."""
    found: dict[str, Storage] = {}

    def register(storage: Storage) -> None:
        if found.setdefault(storage.key, storage) != storage:
            raise ValueError(f"storage {shorten(storage.key)} must have one dtype and size")

    with path.open("rb") as file:
        pickles = io.BytesIO(file.read(MAX_PICKLE))
    if read_pickle(pickles, register) != _MAGIC:
        raise ValueError("not a PyTorch file: it must be a zip, or begin with the magic number of the older format")
    version, system, value, keys = (read_pickle(pickles, register) for _ in range(4))
    if version != _VERSION or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError(f"PyTorch's older format must have version {_VERSION} and be little-endian")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(found):
        raise ValueError("PyTorch's older format must list each storage once")
    places = _find_storages(path, pickles.tell(), [found[key] for key in keys])

    def read(key: str) -> bytes:
        with path.open("rb") as file:
            file.seek(places[key])
            return file.read(found[key].numel * found[key].width)

    return value, read


def _find_storages(path: Path, position: int, storages: list[Storage]) -> dict[str, int]:
    """Where in the file the elements of each storage begin."""
    places = {}
    with path.open("rb") as file:
        for storage in storages:
            file.seek(position)
            count = int.from_bytes(file.read(8), "little")
            if count != storage.numel:
                raise ValueError(
                    f"the file is truncated or damaged: storage {shorten(storage.key)} has {count} elements"
                )
            places[storage.key] = position + 8
            position += 8 + storage.numel * storage.width
    if position > (size := path.stat().st_size):
        raise ValueError(f"the file is truncated: it must have {position} bytes, got {size}")
    return places
