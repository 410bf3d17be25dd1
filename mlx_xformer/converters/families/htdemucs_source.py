"""Completes what files say of an HTDemucs: options without effect, wrapped names, state dicts without configuration."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...models.htdemucs import HTDemucsConfig
from ...storage.messages import shorten
from ..converter import Original
from ..formats.demucs_values import encode_value
from ..formats.training_config import find_training_config, read_training_args, read_training_config
from .htdemucs import KLASS, find_naming
from .htdemucs_options import count_sources, infer_options, list_hidden

_PREFIXES = ("module.", "_orig_mod.", "model.", "models.0.")  # of DataParallel, torch.compile, Lightning, a bag of one
_NEUTRAL = {"num_subbands": 1}  # options of other versions of HTDemucs, and the value with which they do nothing
_NEEDED = ("sources", "samplerate", "segment")
_OPTIONS = {field.name for field in dataclasses.fields(HTDemucsConfig)}
_CONFIG = "config"  # the setting that names the configuration of Music-Source-Separation-Training
Values = dict[str, Any]


def complete_original(original: Original, settings: Mapping[str, Any]) -> Original:
    """An HTDemucs, or a bag of them, whose `values` tell the configuration.

    Args:
        original: As formats.demucs opens it.
        settings: Options that a state dict alone does not tell; `config` names a .yaml that has them.

    Returns:
        The original. Of options without effect, and of defaults that are taken, its warnings tell.

    Raises:
        ValueError, OSError: The configuration is still open; the message names the options to set.
    """
    place = original.values.get("place")
    reason = f"from its {place}" if place else ""
    if "members" in original.values:
        _refuse_settings(settings)
        members = [_drop_unused(member) for member in original.values["members"]]
        warnings = [f"{member['file']}: {line}" for member, lines in members for line in lines]
        values = {**original.values, "members": [member for member, _ in members]}
        return dataclasses.replace(original, values=values, warnings=(*original.warnings, *warnings))
    original = _strip_prefixes(original)
    if "klass" not in original.values and find_naming(original.tensors)[0] == "demucs":
        values, lines, source = _describe_state(original, settings)
        reason = ", ".join(filter(None, (reason, source)))
    else:
        _refuse_settings(settings)
        values = {key: x for key, x in original.values.items() if key != "place"}
        lines = []
    values, unused = _drop_unused(values)
    return dataclasses.replace(
        original, values=values, warnings=(*original.warnings, *lines, *unused), reason=reason or original.reason
    )


def _refuse_settings(settings: Mapping[str, Any]) -> None:
    if settings:
        given = ", ".join(settings)
        raise ValueError(f"settings are for state dicts of HTDemucs without a configuration, got {given}")


def _drop_unused(metadata: Values) -> tuple[Values, list[str]]:
    """Metadata without the options that HTDemucs does not have and that do nothing, and a line that names them.

    An option does nothing if it is None, that is not set, or has the value that _NEUTRAL gives for it.
    """
    try:
        kwargs = json.loads(metadata.get("kwargs", ""))
    except (ValueError, TypeError, RecursionError):
        return metadata, []  # the configuration says what is wrong
    if metadata.get("klass") != KLASS or not isinstance(kwargs, dict):
        return metadata, []
    other = {name: x for name, x in kwargs.items() if name not in _OPTIONS}
    for name, value in other.items():
        if name in _NEUTRAL and value not in (None, _NEUTRAL[name]):
            raise ValueError(f"{name} must be {_NEUTRAL[name]}, got {shorten(value)}: it is not implemented")
    unused = {name: x for name, x in other.items() if x is None or name in _NEUTRAL}
    if not unused:
        return metadata, []
    kept = {name: x for name, x in kwargs.items() if name not in unused}
    listed = ", ".join(f"{name}={json.dumps(x)}" for name, x in unused.items())
    line = f"options that HTDemucs does not have and that do nothing with these values: {shorten(listed)}"
    return {**metadata, "kwargs": json.dumps(kept)}, [line]


def _strip_prefixes(original: Original) -> Original:
    """Without what wrappers put before the name of every tensor."""
    tensors = original.tensors
    if len(bag := sorted({name.split(".")[1] for name in tensors if re.match(r"models\.\d+\.", name)})) > 1:
        raise ValueError(
            f"holds a bag of {len(bag)} models in one file: save the state dict of each in a file of its own, and list "
            "the files in a bag's .yaml"
        )
    while prefix := _find_prefix(tensors):
        tensors = {name.removeprefix(prefix): x for name, x in tensors.items()}
    return dataclasses.replace(original, tensors=tensors)


def _find_prefix(names: Iterable[str]) -> str | None:
    names = list(names)
    return next((p for p in _PREFIXES if names and all(name.startswith(p) for name in names)), None)


def _describe_state(original: Original, settings: Mapping[str, Any]) -> tuple[Values, list[str], str]:
    """Values of a state dict that has none, lines for the report, and where the options are from."""
    given = _read_settings(settings)
    told = _find_options(original, given.pop(_CONFIG, None))
    options, source = told or (_infer(original), "options from the shapes and settings")
    options = options | given
    needed = [*_NEEDED]
    if told is None:
        needed += ["t_heads"] if options["t_layers"] else []
        needed += ["nfft"] if "nfft" not in options else []
    if missing := [name for name in needed if options.get(name) is None]:
        words = [f"sources ({count_sources(original.tensors)} names)" if n == "sources" else n for n in missing]
        naming = "the naming is {}: {}".format(*find_naming(original.tensors))
        raise ValueError(
            f"must be given {', '.join(words)}: set them by convert --set NAME=VALUE, or put the config.yaml of "
            "Music-Source-Separation-Training beside the file; the tensors alone do not tell the configuration "
            f"({naming})"
        )
    lines = [] if told else [_list_taken(options, given)]
    text = json.dumps({name: encode_value(x) for name, x in options.items()})
    return {"klass": KLASS, "args": "[]", "kwargs": text}, lines, source


def _find_options(original: Original, named: Any) -> tuple[Values, str] | None:
    """The options that a training program has kept, and where; `named` is the file that the user names."""
    if named is None and "training" in original.values:
        own = read_training_args(original.values["training"])
        if own is not None:
            return own, "options from its args"
    if named is not None and not isinstance(named, (str, Path)):
        raise ValueError(f"{_CONFIG} must be the name of a .yaml file, got {shorten(named)}")
    config = find_training_config(original.path) if named is None else Path(named)
    return None if config is None else (read_training_config(config), f"options from {config.name}")


def _list_taken(options: Values, given: Values) -> str:
    """A line with the options that nothing tells and that change the output."""
    values = {field.name: field.default for field in dataclasses.fields(HTDemucsConfig)} | options
    taken = [f"{name}={json.dumps(values[name])}" for name in list_hidden(options) if name not in given]
    return f"not shown by the tensors, taken by default: {', '.join(taken)}"


def _read_settings(settings: Mapping[str, Any]) -> Values:
    """Settings; the names of sources may be one text with commas."""
    given = dict(settings)
    if isinstance(sources := given.get("sources"), str):
        given["sources"] = [name.strip() for name in sources.split(",")]
    return given


def _infer(original: Original) -> Values:
    try:
        return infer_options(original.tensors)
    except (LookupError, ValueError, TypeError, ArithmeticError) as error:
        raise ValueError(f"the tensors must be those of a whole HTDemucs: {shorten(error)} is missing") from None
