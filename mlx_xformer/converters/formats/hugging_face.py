"""Reads a folder of Hugging Face: config.json, model.safetensors or its shards, and the files of the tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...models.causal_lm.model import CausalLMConfig
from ...storage.checkpoint import EXTRAS, is_checkpoint
from ..rules import Rule
from .source import Stored, open_safetensors, plain_name
from .torch_pickle import short

INDEX, ONE, _CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"


@dataclass(frozen=True)
class Original:
    """A language model as others store it: its configuration, the rules for its tensors, and what goes along.

    made_of: what leads back to it.
    """

    name: str
    config: CausalLMConfig
    rules: list[Rule]
    tensors: dict[str, Stored]
    files: tuple[Path, ...]
    extras: dict[str, bytes]
    made_of: dict[str, Any] | None = None
    warnings: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Folder:
    """What a folder holds. The tensors are read when they are asked for."""

    path: Path
    values: dict[str, Any]
    tensors: dict[str, Stored]
    files: tuple[Path, ...]
    extras: dict[str, bytes]
    metadata: dict[str, str]


def is_folder(path: Path) -> bool:
    """Whether a path is a folder with a config.json of Hugging Face."""
    if not path.is_dir() or is_checkpoint(path):
        return False
    try:
        return "model_type" in _object(path / _CONFIG)
    except (OSError, ValueError):
        return False


def _object(path: Path) -> dict[str, Any]:
    """A file of JSON that is an object."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({short(str(error))})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be an object, got a {type(content).__name__}")
    return content


def files_of(path: Path) -> tuple[Path, ...]:
    """The files with the tensors: model.safetensors, or the shards of an index, which lie in the folder itself."""
    if (path / ONE).is_file():
        return (path / ONE,)
    if not (path / INDEX).is_file():
        raise FileNotFoundError(f"{path}: holds neither {ONE} nor {INDEX}")
    return tuple(path / name for name in shards(path / INDEX))


def shards(index: Path) -> list[str]:
    """The names of the files in an index. ValueError begins with its path."""
    weights = _object(index).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise ValueError(f"{index}: must have a weight_map of tensors and their files")
    try:
        return sorted({plain_name(name) for name in weights.values()})
    except ValueError as error:
        raise ValueError(f"{index}: {error}") from None


def read(path: Path) -> Folder:
    """What a folder holds. FileNotFoundError or ValueError, in one line, begins with the path of what is wrong."""
    values = _object(path / _CONFIG)
    files = files_of(path)
    tensors: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file, though {INDEX} lists it")
        try:
            own, told = open_safetensors(file)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        if twice := sorted(own.keys() & tensors.keys()):
            raise ValueError(f"{file}: holds {twice[0]} again, which another shard has")
        tensors |= own
        metadata |= told
    if len(files) > 1 or files[0].name != ONE:
        listed = _object(path / INDEX)["weight_map"].keys()
        if missing := sorted(listed - tensors.keys()):
            raise ValueError(f"{path / INDEX}: lists {missing[0]}, which no shard holds")
    extras = {name: (path / name).read_bytes() for name in EXTRAS if (path / name).is_file()}
    tokens = {
        key: values[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if values.get(key) is not None
    }
    if tokens and "generation_config.json" not in extras:
        extras["generation_config.json"] = (json.dumps(tokens, indent=2) + "\n").encode()
    return Folder(path, values, tensors, files, extras, metadata)
