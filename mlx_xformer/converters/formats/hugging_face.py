"""Folders of Hugging Face: config.json, model.safetensors or its shards, and the files of the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...storage.checkpoint import EXTRAS, is_checkpoint
from ...storage.messages import shorten
from ..converter import Original, OriginalFiles
from ..stored import StoredTensor
from .source import check_plain_name, open_source

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def is_folder(path: Path) -> bool:
    """Whether a path is a folder with a config.json of Hugging Face."""
    if not path.is_dir() or is_checkpoint(path):
        return False
    try:
        return "model_type" in read_object(path / CONFIG)
    except (OSError, ValueError):
        return False


def read_object(path: Path) -> dict[str, Any]:
    """A file of JSON that is an object. ValueError, in one line, begins with the path."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({shorten(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be an object, got a {type(content).__name__}")
    return content


def find_files(folder: Path) -> tuple[Path, ...]:
    """The files of the tensors: model.safetensors, or the shards of an index, which lie in the folder itself."""
    if (folder / WEIGHTS).is_file():
        return (folder / WEIGHTS,)
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder}: holds neither {WEIGHTS} nor {INDEX}")
    return tuple(folder / name for name in list_shards(folder / INDEX))


def list_shards(index: Path) -> list[str]:
    """The names of the files in an index. ValueError begins with its path."""
    weights = read_object(index).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise ValueError(f"{index}: must have a weight_map of tensors and their files")
    try:
        return sorted({check_plain_name(name) for name in weights.values()})
    except ValueError as error:
        raise ValueError(f"{index}: {error}") from None


def open_folder(folder: Path) -> Original:
    """What a folder holds; `values` are its config.json.

    FileNotFoundError or ValueError, in one line, begins with the path of what is wrong.
    """
    values = read_object(folder / CONFIG)
    files = find_files(folder)
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file, though {INDEX} lists it")
        in_file, described = open_source(file)
        if twice := sorted(in_file.keys() & tensors.keys()):
            raise ValueError(f"{file}: holds {twice[0]} again, which another shard has")
        tensors |= in_file
        metadata |= described
    if len(files) > 1 or files[0].name != WEIGHTS:
        listed = read_object(folder / INDEX)["weight_map"].keys()
        if missing := sorted(listed - tensors.keys()):
            raise ValueError(f"{folder / INDEX}: lists {missing[0]}, which no shard holds")
    return Original(
        path=folder,
        name=folder.resolve().name,
        values=values,
        tensors=tensors,
        files=files,
        extras=_read_extras(folder, values),
        metadata=metadata,
        reason=f"model_type {values['model_type']}",
    )


def _read_extras(folder: Path, values: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of EXTRAS, and generation_config.json from the tokens that config.json names, where it is missing."""
    extras = {name: (folder / name).read_bytes() for name in EXTRAS if (folder / name).is_file()}
    tokens = {
        key: values[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if values.get(key) is not None
    }
    if tokens and "generation_config.json" not in extras:
        extras["generation_config.json"] = (json.dumps(tokens, indent=2) + "\n").encode()
    return extras


def lay_out_folder(values: Mapping[str, Any], metadata: Mapping[str, str]) -> OriginalFiles:
    """A folder with config.json and model.safetensors. metadata: of the tensors, `format` aside."""
    return {CONFIG: json.dumps(values, indent=2) + "\n", WEIGHTS: ("", {**metadata, "format": "pt"})}
