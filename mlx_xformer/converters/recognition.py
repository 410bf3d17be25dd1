"""Recognises what a file or folder holds: which converter it is for, and what there is to convert."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..storage.checkpoint import EXTRAS
from ..storage.messages import shorten
from .converter import Converter, Original
from .families import CONVERTERS, causal_lm_gguf, htdemucs
from .families.htdemucs_source import complete_original
from .formats import ctranslate2, demucs, gguf, hugging_face
from .formats.source import SUFFIXES, open_source
from .formats.training_config import list_training_configs


def recognize(source: Path, settings: Mapping[str, Any]) -> tuple[Converter, Original]:
    """The converter that a source is for, and what the source holds.

    Args:
        source: A file of tensors, a bag's .yaml, a GGUF file, or a folder.
        settings: What a file of tensors leaves open, such as num_heads or sources.

    Raises:
        FileNotFoundError: There is nothing to convert.
        ValueError: What is there cannot be read, or is not one model of a known layout.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    if hugging_face.is_folder(source):
        original = hugging_face.open_folder(source)
        converter = _by_model_type(source, original.values["model_type"])
        if settings:
            given = ", ".join(settings)
            raise ValueError(f"{source}: settings are for files of tensors, got {given} beside a config.json")
        return converter, original
    if found := _by_tensors(source, settings):
        return found
    if file := gguf.find_file(source):
        if settings:
            raise ValueError(f"{source}: settings are for files of tensors of a known kind, got {', '.join(settings)}")
        return causal_lm_gguf.CONVERTER, gguf.open_file(file)
    location = demucs.find_model(source)
    original = demucs.open_model(location)
    try:
        return htdemucs.BAG if location.is_bag else htdemucs.MODEL, complete_original(original, settings)
    except ValueError as error:
        raise ValueError(f"{original.path}: {error}") from None
    except (ArithmeticError, TypeError, LookupError) as error:  # of settings that nothing has checked
        raise ValueError(f"{original.path}: makes no model ({type(error).__name__}, {shorten(error)})") from None


def _by_model_type(folder: Path, model_type: Any) -> Converter:
    known = {name: converter for converter in CONVERTERS for name in converter.model_types}
    if not isinstance(model_type, str) or model_type not in known:
        raise ValueError(
            f"{folder / hugging_face.CONFIG}: model_type must be one of {', '.join(known)}, got {shorten(model_type)}"
        )
    return known[model_type]


def _by_tensors(source: Path, settings: Mapping[str, Any]) -> tuple[Converter, Original] | None:
    """Recognises a file of tensors, or a folder of CTranslate2, by the tensors' names and shapes."""
    file = ctranslate2.find_file(source) or source
    if not file.is_file() or file.suffix not in SUFFIXES:
        return None
    tensors, metadata = open_source(file)
    found = {one: reason for one in CONVERTERS if one.detect is not None and (reason := one.detect(tensors))}
    if len(found) > 1:
        reasons = "; ".join(f"{converter.family}: {reason}" for converter, reason in found.items())
        raise ValueError(f"{file}: the tensors must be of one kind, got {reasons}")
    if not found and (spec := metadata.get("ctranslate2")):
        raise ValueError(f"{file}: a model of CTranslate2's must be a whole Whisper, got a {spec}")
    for converter, reason in found.items():
        name = source.resolve().name if source.is_dir() else source.resolve().stem
        extras = ctranslate2.read_extras(source) if source.is_dir() else {}
        return converter, Original(source, name, dict(settings), tensors, (file,), extras, reason=reason)
    return None


def list_files(source: Path) -> list[Path]:
    """Every file of a source that a conversion reads. FileNotFoundError or ValueError as of recognize."""
    if file := gguf.find_file(source):
        return [file]
    if hugging_face.is_folder(source):
        files = [hugging_face.CONFIG, *EXTRAS]
        return [*(source / name for name in files if (source / name).is_file()), *hugging_face.find_files(source)]
    if file := ctranslate2.find_file(source):
        files = ["config.json", *EXTRAS]
        return [*(source / name for name in files if (source / name).is_file()), file]
    location = demucs.find_model(source)
    described = list_training_configs(location.path) if location.bag is None else [location.path]
    return [*described, *dict.fromkeys(location.files)]
