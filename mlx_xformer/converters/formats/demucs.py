"""The files of models of demucs: a model's file, a bag's .yaml beside its members' files, or a folder with one of them.

A bag combines the answers of several models, its members. Its .yaml names each by a signature, the name of its file.
Source: demucs/hf.py and demucs/repo.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...storage.checkpoint import Checkpoint, is_checkpoint
from ...storage.files import hash_file
from ...storage.messages import shorten
from ..converter import Original, OriginalFiles
from .source import SUFFIXES, check_plain_name, open_source
from .training_config import is_training_config
from .yaml_file import read_yaml

_BAGS = (".yaml", ".yml")
_SIGNED = re.compile(r"(.+)-([0-9a-f]{8,64})")


@dataclass(frozen=True)
class BagFile:
    """A bag as its .yaml gives it.

    Attributes:
        name: The file's name without its suffix.
        signatures: Those of the members, in order.
        weights: A row of weights a member, one for each source; unchecked.
        segment: Seconds of a segment; unchecked.
    """

    name: str
    signatures: tuple[str, ...]
    weights: Any
    segment: Any


@dataclass(frozen=True)
class Location:
    """Where a model's files are: the members' files in order, their signatures, and the bag that names them."""

    signatures: tuple[str, ...]
    files: tuple[Path, ...]
    path: Path
    bag: BagFile | None = None

    @property
    def is_bag(self) -> bool:
        """Whether there is a bag that adds something to its one member."""
        bag = self.bag
        return bag is not None and (len(self.files) > 1 or bag.weights is not None or bag.segment is not None)


def find_model(source: Path) -> Location:
    """The files behind a path. FileNotFoundError or ValueError says what is missing, or that it is not one model."""
    if source.is_dir():
        source = _only_model(source)
    if source.suffix in _BAGS:
        if is_training_config(source):
            raise ValueError(f"{source}: the configuration of a training run: name the checkpoint beside it instead")
        bag = read_bag(source)
        files = tuple(find_member(source.parent, signature) for signature in bag.signatures)
        return Location(bag.signatures, files, source, bag)
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    signed = _SIGNED.fullmatch(source.stem) if source.suffix == ".th" else None
    name = signed[1] if signed else source.stem
    return Location((re.sub(r"^[.-]|[^A-Za-z0-9_.-]", "_", name)[:128],), (source,), source)


def _only_model(folder: Path) -> Path:
    """The one bag in a folder or, without a bag, the one model file."""
    if is_checkpoint(folder):
        raise ValueError(f"{folder}: this is a checkpoint already (converting to pytorch leads back)")
    for suffixes in (_BAGS, SUFFIXES):
        found = sorted(p for p in folder.iterdir() if p.suffix in suffixes and not is_training_config(p))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(path.name for path in found[:5])
            raise ValueError(f"{folder}: must hold one model, got {len(found)} ({names}): name the one you mean")
    raise FileNotFoundError(
        f"{folder}: holds neither a bag (.yaml), a model file ({', '.join(SUFFIXES)}) nor a language model "
        "(config.json with a model_type beside .safetensors, or one .gguf)"
    )


def open_model(location: Location) -> Original:
    """A model, or a bag, whose tensors then carry the prefix `models.N.` of their member.

    `values` are the metadata of the model's file; of a bag `members`, a list of them with the name of each `file`, and
    its `weights` and `segment`. A file that carries digits of its SHA-256 in its name must have them.
    """
    opened = {}
    for path in dict.fromkeys(location.files):
        opened[path] = open_source(path)
        signed = _SIGNED.fullmatch(path.stem) if path.suffix == ".th" else None
        if signed and not (digest := hash_file(path)).startswith(signed[2]):
            raise ValueError(
                f"{path}: SHA-256 must begin with {signed[2]}, as the file's name says, got {digest[: len(signed[2])]}"
            )
    members = [opened[path] for path in location.files]
    if location.bag is not None and location.is_bag:
        tensors = {f"models.{n}.{name}": x for n, (own, _) in enumerate(members) for name, x in own.items()}
        values: dict[str, Any] = {
            "members": [
                {"file": path.name, **metadata} for path, (_, metadata) in zip(location.files, members, strict=True)
            ],
            "weights": location.bag.weights,
            "segment": location.bag.segment,
        }
    else:
        tensors, values = members[0][0], dict(members[0][1])
    return Original(
        path=location.path if location.is_bag else location.files[0],
        name=None if location.bag is None else location.bag.name,
        values=values,
        tensors=tensors,
        files=location.files,
        signatures=location.signatures,
    )


def lay_out_checkpoint(values: Mapping[str, Any], checkpoint: Checkpoint, folder: Path) -> OriginalFiles:
    """The files of a model or a bag.

    They are a .safetensors a member and the bag's .yaml, as demucs/hf.py has them, and a .th a member, so that
    `demucs --repo FOLDER` finds the model (demucs/repo.py).
    """
    members = values.get("members", [values])
    name, signatures = _choose_names(checkpoint, folder, len(members))
    files: OriginalFiles = {}
    for n, (signature, metadata) in enumerate(zip(signatures, members, strict=True)):
        prefix = f"models.{n}." if "members" in values else ""
        files |= {f"{signature}{suffix}": (prefix, dict(metadata)) for suffix in (".safetensors", ".th")}
    bag: dict[str, Any] = {"models": signatures}
    if values.get("weights") is not None:
        bag["weights"] = [list(row) for row in values["weights"]]
    if values.get("segment") is not None:
        bag["segment"] = float(values["segment"])
    files[f"{name}.yaml"] = yaml.safe_dump(bag, default_flow_style=None, sort_keys=False)
    return files


def _choose_names(checkpoint: Checkpoint, folder: Path, count: int) -> tuple[str, list[str]]:
    """The model's name and its members' signatures, from the provenance or else from the folder and its content."""
    name = checkpoint.provenance.get("name")
    records = checkpoint.provenance.get("sources", [])
    if isinstance(records, list) and len(records) == count and all(isinstance(record, dict) for record in records):
        signatures = [check_plain_name(record.get("signature")) for record in records]
    else:
        digest = hash_file(folder / "model.safetensors")
        signatures = [digest[:8] if count == 1 else f"{digest[:8]}_{n}" for n in range(count)]
    return check_plain_name(folder.resolve().name if name is None else name), signatures


def read_bag(path: str | Path) -> BagFile:
    """Reads `<name>.yaml`: a mapping of models, weights and segment. Signatures are plain names, never paths."""
    path = Path(path)
    bag = read_yaml(path)
    if not isinstance(bag, dict) or not all(isinstance(key, str) for key in bag):
        raise ValueError(f"{path}: a bag must be a mapping, got a {type(bag).__name__}")
    if unknown := sorted(set(bag) - {"models", "weights", "segment"}):
        raise ValueError(f"{path}: a bag has models, weights and segment, got {shorten(', '.join(unknown))}")
    models = bag.get("models")
    if not isinstance(models, list) or not models:
        raise ValueError(f"{path}: models must be a list of one or more signatures")
    try:
        signatures = tuple(check_plain_name(signature) for signature in models)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return BagFile(path.stem, signatures, bag.get("weights"), bag.get("segment"))


def find_member(folder: Path, signature: str) -> Path:
    """The one file of a bag's member: `<signature>.safetensors`, or `<signature>[-<checksum>].th`.

    It lies in the folder itself: a symbolic link that leads out of it is refused.
    """
    check_plain_name(signature)
    found = [folder / f"{signature}.safetensors"]
    if not found[0].exists():
        pattern = re.compile(re.escape(signature) + r"(-[0-9a-f]+)?\.th")
        found = sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))
    if not found:
        raise FileNotFoundError(f"{folder}: no {signature}.safetensors or {signature}-*.th for the bag's member")
    if len(found) > 1:
        raise ValueError(f"{folder}: one file must be member {signature}, got {', '.join(p.name for p in found)}")
    if found[0].resolve().parent != folder.resolve():
        raise ValueError(f"{found[0]}: a bag's member must lie in the folder itself, this link leads out of it")
    return found[0]
