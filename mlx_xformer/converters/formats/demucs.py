"""Finds the files of an original model: a file, a bag's .yaml beside its members, or a folder that holds one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...storage.checkpoint import is_checkpoint
from .source import SUFFIXES, Source, member, read_bag, read_source

_BAGS = (".yaml", ".yml")
_SIGNED = re.compile(r"(.+)-([0-9a-f]{8,64})")


@dataclass(frozen=True)
class Originals:
    """The members' files in order, their signatures, and what a bag adds."""

    signatures: tuple[str, ...]
    files: tuple[Path, ...]
    name: str | None = None
    bag: Path | None = None
    weights: Any = None
    segment: Any = None

    def all_files(self) -> list[Path]:
        """Every file there is to read, once."""
        return [*([self.bag] if self.bag else []), *dict.fromkeys(self.files)]

    def read(self) -> list[Source]:
        """The members, each file read once and checked against the digits of its SHA-256 in its name, if any."""
        opened = {path: read_source(path) for path in dict.fromkeys(self.files)}
        for path, source in opened.items():
            signed = _SIGNED.fullmatch(path.stem) if path.suffix == ".th" else None
            if signed and not source.sha256.startswith(signed[2]):
                raise ValueError(
                    f"{path}: SHA-256 must begin with {signed[2]}, as the file's name says, "
                    f"got {source.sha256[: len(signed[2])]}"
                )
        return [opened[path] for path in self.files]


def find_originals(source: str | Path) -> Originals:
    """The files behind a path. FileNotFoundError or ValueError says what is not there, or that it is not one model."""
    source = Path(source)
    if source.is_dir():
        source = _only_model(source)
    if source.suffix in _BAGS:
        bag = read_bag(source)
        files = tuple(member(source.parent, signature) for signature in bag.signatures)
        return Originals(bag.signatures, files, bag.name, source, bag.weights, bag.segment)
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    signed = _SIGNED.fullmatch(source.stem) if source.suffix == ".th" else None
    return Originals((signed[1] if signed else source.stem,), (source,))


def _only_model(folder: Path) -> Path:
    """The one bag in a folder or, without a bag, the one model file."""
    if is_checkpoint(folder):
        raise ValueError(f"{folder}: this is a checkpoint already (converting to pytorch leads back)")
    for suffixes in (_BAGS, SUFFIXES):
        found = sorted(path for path in folder.iterdir() if path.suffix in suffixes)
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(path.name for path in found[:5])
            raise ValueError(f"{folder}: must hold one model, got {len(found)} ({names}): name the one you mean")
    raise FileNotFoundError(f"{folder}: holds neither a bag (.yaml) nor a model file ({', '.join(SUFFIXES)})")
