"""Reads CTranslate2's model.bin, version 6: a header, named variables with their bytes, and other names of some.

Source: CTranslate2 4, python/ctranslate2/specs/model_spec.py. Numbers are little-endian, texts end in a zero byte.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import BinaryIO

from ...storage.checkpoint import EXTRAS
from ...storage.files import DTYPES
from ...storage.messages import shorten
from ..stored import StoredTensor, stored_at

FILE = "model.bin"
_VERSION = 6
_DTYPES = ("F32", "I8", "I16", "I32", "F16", "BF16")  # by their numbers
_MAX_RANK, _MAX_SIZE = 8, 2**31 - 1
_SUPPRESSED = {"suppress_ids": "suppress_tokens", "suppress_ids_begin": "begin_suppress_tokens"}


def is_ctranslate2(path: Path) -> bool:
    """Whether a file begins as CTranslate2's: with a small number and a name that ends in "Spec"."""
    with path.open("rb") as file:
        head = file.read(6)
        version, length = struct.unpack("<IH", head) if len(head) == 6 else (0, 0)
        name = file.read(min(length, 256)) if 0 < version < 256 else b""
    return name.endswith(b"Spec\0") and name[:-1].isalnum()


def find_file(folder: Path) -> Path | None:
    """The model.bin of a folder of CTranslate2; None for any other path."""
    path = folder / FILE
    return path if folder.is_dir() and path.is_file() and is_ctranslate2(path) else None


def open_ctranslate2(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a file, each read when it is asked for, and the model's kind and revision as metadata.

    A tensor that has several names is there under each.

    Raises:
        ValueError: The file is refused, and why. The message does not name the file.
    """
    with path.open("rb") as file:
        reader = _Reader(path, file)
        version = reader.number("I")
        if version != _VERSION:
            raise ValueError(f"CTranslate2's binary version must be {_VERSION}, got {version}")
        metadata = {"ctranslate2": reader.text(), "revision": str(reader.number("I"))}
        tensors: dict[str, StoredTensor] = {}
        for _ in range(reader.number("I")):
            name = reader.text()
            if name in tensors:
                raise ValueError(f"{shorten(name)} must be there once, got it again")
            tensors[name] = reader.tensor(name)
        for _ in range(reader.number("I")):
            name, known = reader.text(), reader.text()
            if name in tensors or known not in tensors:
                raise ValueError(f"{shorten(name)} must be a new name of a variable, got {shorten(known)}")
            tensors[name] = tensors[known]
        if reader.left:
            raise ValueError(f"the file must end after its names, got {reader.left} bytes more")
    return tensors, metadata


class _Reader:
    """Reads no more than there is: a file's own numbers are not believed."""

    def __init__(self, path: Path, file: BinaryIO):
        self._path, self._file, self.left = path, file, path.stat().st_size

    def _bytes(self, count: int) -> bytes:
        self._check_left(count)
        self.left -= count
        return self._file.read(count)

    def _check_left(self, count: int) -> None:
        if count > self.left:
            raise ValueError(f"the file is truncated or damaged: {count} bytes must follow, got {self.left}")

    def number(self, kind: str) -> int:
        return int(struct.unpack(f"<{kind}", self._bytes(struct.calcsize(kind)))[0])

    def text(self) -> str:
        data = self._bytes(self.number("H"))
        if not data.endswith(b"\0") or not data[:-1].isascii() or not data[:-1].decode().isprintable():
            raise ValueError(f"a name must be printable ASCII that ends in a zero byte, got {shorten(repr(data))}")
        return data[:-1].decode()

    def tensor(self, name: str) -> StoredTensor:
        """A tensor, whose bytes are skipped."""
        rank = self.number("B")
        if rank > _MAX_RANK:
            raise ValueError(f"{shorten(name)} must have at most {_MAX_RANK} axes, got {rank}")
        shape = tuple(self.number("I") for _ in range(rank))
        kind, count = self.number("B"), self.number("I")
        if kind >= len(_DTYPES):
            raise ValueError(f"{shorten(name)} must have one of the dtypes {', '.join(_DTYPES)}, got number {kind}")
        width = DTYPES[_DTYPES[kind]].size
        if math.prod(shape) * width != count or max(shape, default=0) > _MAX_SIZE:
            raise ValueError(f"{shorten(name)} must have as many bytes as {shape} {_DTYPES[kind]} takes, got {count}")
        self._check_left(count)
        stored = stored_at(self._path, name, _DTYPES[kind], shape, self._file.tell(), count)
        self._file.seek(count, 1)
        self.left -= count
        return stored


def read_extras(folder: Path) -> dict[str, bytes]:
    """The files of the tokenizer in a folder of CTranslate2, and a generation_config.json.

    The latter has what config.json says of generation, under Hugging Face's keys.
    """
    found = {name: (folder / name).read_bytes() for name in EXTRAS if (folder / name).is_file()}
    path = folder / "config.json"
    if not path.is_file() or "generation_config.json" in found:
        return found
    try:
        values = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({shorten(error)})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must be an object, got a {type(values).__name__}")
    suppressed = {theirs: values[ours] for ours, theirs in _SUPPRESSED.items() if ours in values}
    if suppressed:
        found["generation_config.json"] = (json.dumps(suppressed, indent=2) + "\n").encode()
    return found
