"""The options of HTDemucs where training keeps them: in the .yaml of Music-Source-Separation-Training, beside a plain
state dict, or in the arguments of a training run of demucs, in its own file.

Sources: ZFTurbo/Music-Source-Separation-Training, models/demucs4ht.py (get_model) and configs/config_*_htdemucs.yaml;
demucs/train.py (get_model).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

import yaml

from ...storage.messages import shorten
from .yaml_file import read_yaml

_SECTION = "htdemucs"
_OTHERS = {"hdemucs": "Hybrid Demucs", "demucs": "Demucs"}
_TRAINING = {  # option of HTDemucs -> its name in the section `training`
    "sources": "instruments",
    "audio_channels": "channels",
    "samplerate": "samplerate",
    "segment": "segment",
}
_SUFFIXES = (".yaml", ".yml")


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as OmegaConf does, and Python's tuples of plain values as lists."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)
_Loader.add_constructor(
    "tag:yaml.org,2002:python/tuple",
    lambda loader, node: loader.construct_sequence(cast(yaml.SequenceNode, node), deep=True),
)


def is_training_config(path: Path) -> bool:
    """Whether a file is the configuration of a training run, of whatever model."""
    if path.suffix not in _SUFFIXES or not path.is_file():
        return False
    try:
        content = read_yaml(path, _Loader)
    except ValueError:
        return False
    return isinstance(content, dict) and isinstance(content.get("training"), dict) and "models" not in content


def list_training_configs(file: Path) -> list[Path]:
    """The configurations beside a checkpoint: the one of the same name, or else every config*.yaml of an HTDemucs."""
    for suffix in _SUFFIXES:
        if is_training_config(own := file.with_suffix(suffix)):
            return [own]
    beside = sorted(path for path in file.parent.glob("config*") if is_training_config(path))
    return [path for path in beside if _SECTION in read_yaml(path, _Loader)]


def find_training_config(file: Path) -> Path | None:
    """The configuration beside a checkpoint, if there is one. ValueError if there are several."""
    found = list_training_configs(file)
    if len(found) > 1:
        names = shorten(", ".join(path.name for path in found))
        raise ValueError(f"one configuration must be beside it, got {names}: name it by --set config=FILE")
    return found[0] if found else None


def read_training_config(path: Path) -> dict[str, Any]:
    """The options of HTDemucs in a configuration. ValueError or FileNotFoundError begins with the path."""
    content = read_yaml(path, _Loader)
    if not isinstance(content, dict) or not isinstance(content.get(_SECTION), dict):
        keys = content if isinstance(content, dict) else {}
        other = next((f": {what} is not supported" for key, what in _OTHERS.items() if key in keys), "")
        raise ValueError(f"{path}: must have a section {_SECTION}, as configurations of HTDemucs do{other}")
    training = content.get("training")
    training = training if isinstance(training, dict) else {}
    given = {option: training[name] for option, name in _TRAINING.items() if training.get(name) is not None}
    options = {str(key): value for key, value in content[_SECTION].items()}
    if twice := sorted(given.keys() & options.keys()):
        raise ValueError(f"{path}: {', '.join(twice)} must stand in one of training and {_SECTION}")
    return {**given, **options}


def read_training_args(text: str) -> dict[str, Any] | None:
    """The options in the arguments of a training run of demucs, in JSON text; None if they do not tell them.

    ValueError if they are those of another model.
    """
    args = json.loads(text)
    if (other := args.get("model")) in _OTHERS:
        raise ValueError(f"the training run is one of {_OTHERS[other]}, which is not supported")
    dataset, section = args.get("dset"), args.get(_SECTION)
    if args.get("model") != _SECTION or not isinstance(dataset, dict) or not isinstance(section, dict):
        return None
    given = {"sources": "sources", "audio_channels": "channels", "samplerate": "samplerate"}
    options = {option: dataset[name] for option, name in given.items() if name in dataset}
    segment = args.get("model_segment") or (4 * dataset["segment"] if "segment" in dataset else None)
    return {**options, **({} if segment is None else {"segment": segment}), **section}
