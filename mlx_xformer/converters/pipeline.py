"""Encoders, encoder-decoders and other networks: a folder of Hugging Face or a file of tensors into a checkpoint
folder, and back. What is particular to one kind is in a module of its own, see Kind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from .._version import __version__
from ..models.families import make_config, parameter_shapes
from ..storage.checkpoint import EXTRAS, Checkpoint, new_folder, save_checkpoint
from ..storage.files import write_extras, write_safetensors
from .families import bert, causal_lm, t5, transformer, whisper
from .families.guides import ferrotorch, llm_prep, scratch, scratch_model
from .formats import ctranslate2, hugging_face
from .formats.source import SUFFIXES, read_source, scan, sha256_of
from .formats.torch_pickle import short
from .report import Report, make_rows, totals
from .rules import Rule, apply_rules, inverse_shapes, invert

Tensors = Mapping[str, mx.array]


class Kind(Protocol):
    """What a module of a kind of network holds. family: of the checkpoint. model_types: in a config.json of Hugging
    Face's, none for kinds that come as a file of tensors."""

    FAMILY: str
    MODEL_TYPES: tuple[str, ...]

    def detect(self, tensors: Tensors) -> str | None:
        """Why tensors of these names and shapes are of the kind, in words; None if they are not."""

    def config(self, values: Mapping[str, Any], tensors: Tensors) -> Any:
        """The configuration that a config.json, or the settings given, and the shapes mean. ValueError names what is
        not understood or lacks."""

    def rules(self, config: Any, names: Tensors) -> list[Rule]:
        """The table from the original's names."""

    def original(self, config: Any) -> dict[str, Any]:
        """The config.json or the settings that mean the configuration."""


KINDS: tuple[Any, ...] = (  # of modules, or objects, that are a Kind
    bert,
    t5,
    whisper,
    scratch,
    scratch_model,
    ferrotorch,
    llm_prep,
    *transformer.KINDS,
)


def kind_of_folder(source: Path) -> Any:
    """The kind of a folder of Hugging Face; None for any other path, or a language model. ValueError for a model_type
    that nothing here has."""
    if not hugging_face.is_folder(source):
        return None
    model_type = json.loads((source / "config.json").read_text("utf-8"))["model_type"]
    known = {name: kind for kind in KINDS for name in kind.MODEL_TYPES}
    if isinstance(model_type, str) and model_type in known:
        return known[model_type]
    if model_type not in causal_lm.MODEL_TYPES:
        names = ", ".join([*causal_lm.MODEL_TYPES, *known])
        raise ValueError(f"{source / 'config.json'}: model_type must be one of {names}, got {short(str(model_type))}")
    return None


def kind_of_file(source: Path) -> Any:
    """The kind of a file of tensors, or of a folder with CTranslate2's, by their names and shapes; None if there is
    none. ValueError for several, or none of CTranslate2's."""
    source = ctranslate2.find_file(source) or source
    if not source.is_file() or source.suffix not in SUFFIXES:
        return None
    read = read_source(source)
    tensors = read.tensors
    found = {kind: reason for kind in KINDS if (reason := kind.detect(tensors))}
    if len(found) > 1:
        told = "; ".join(f"{kind.FAMILY}: {reason}" for kind, reason in found.items())
        raise ValueError(f"{source}: the tensors must be of one kind, got {told}")
    if not found and (spec := read.metadata.get("ctranslate2")):
        raise ValueError(f"{source}: a model of CTranslate2's must be a whole Whisper, got a {spec}")
    return next(iter(found), None)


def to_mlx(
    source: Path, out: Path, kind: Any, *, settings: Mapping[str, Any], dry_run: bool, origin: Mapping[str, str]
) -> Report:
    """Converts a folder or a file of this kind into the checkpoint folder `out`."""
    values, tensors, files, extras = _read(source, settings)
    try:
        config = kind.config(values, tensors)
        rules = kind.rules(config, tensors)
        weights = apply_rules(rules, tensors, parameter_shapes(kind.FAMILY, config.to_dict()))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    except (ArithmeticError, TypeError, AttributeError, LookupError) as error:
        reason = f"{type(error).__name__}, {short(str(error))}"
        raise ValueError(f"{source}: makes no model ({reason})") from None
    provenance = {
        "name": source.resolve().stem if source.is_file() else source.resolve().name,
        "sources": [{"file": file.name, "sha256": sha256_of(file)} for file in files],
        "original": dict(values),
        "kind": kind.__name__.rpartition(".")[2],
        "family": kind.FAMILY,
        "mlx_xformer": __version__,
        "mlx": version("mlx"),
        **origin,
    }
    if not dry_run:
        save_checkpoint(out, weights, family=kind.FAMILY, config=config.to_dict(), provenance=provenance, extras=extras)
    rows = make_rows(rules, tensors, weights)
    written = ("config.json", "model.safetensors", *extras)
    why = f"model_type {values['model_type']}" if "model_type" in values else kind.detect(tensors)
    notes = tuple(scan(dict(tensors)))
    return Report(source, out, kind.FAMILY, rows, written, not dry_run, *totals(weights), notes, why)


def _read(
    source: Path, settings: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, mx.array], tuple[Path, ...], dict[str, bytes]]:
    """Configuration, tensors, files and what goes along."""
    if source.is_file():
        return dict(settings), read_source(source).tensors, (source,), {}
    if file := ctranslate2.find_file(source):
        return dict(settings), read_source(file).tensors, (file,), ctranslate2.extras(source)
    found = hugging_face.read(source)
    if settings:
        raise ValueError(f"{source}: settings are for files of tensors, got {', '.join(settings)} beside a config.json")
    return found.values, {name: x.read() for name, x in found.tensors.items()}, found.files, found.extras


def to_original(source: Path, out: Path, checkpoint: Checkpoint, *, dry_run: bool) -> Report:
    """A checkpoint in the layout that it came from, bit for bit."""
    name = checkpoint.provenance.get("kind")
    kind = next((kind for kind in KINDS if checkpoint.family == kind.FAMILY and _name(kind) == name), None)
    if kind is None:
        kind = next(kind for kind in KINDS if checkpoint.family == kind.FAMILY)
    try:
        config = make_config(checkpoint.family, checkpoint.config)
        rules = kind.rules(config, checkpoint.weights)
        shapes = inverse_shapes(rules, parameter_shapes(checkpoint.family, checkpoint.config))
        tensors = apply_rules(invert(rules), checkpoint.weights, shapes)
        values = _told(kind, config, checkpoint, tensors) or kind.original(config)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    extras = {extra: (source / extra).read_bytes() for extra in EXTRAS if (source / extra).is_file()}
    if not dry_run:
        with new_folder(out, replace=False) as fresh:
            write_safetensors(fresh / "model.safetensors", tensors, {"format": "pt"})
            (fresh / "config.json").write_text(json.dumps(values, indent=2) + "\n", "utf-8")
            write_extras(fresh, extras)
    rows = make_rows(invert(rules), checkpoint.weights, tensors)
    files = ("config.json", "model.safetensors", *extras)
    return Report(source, out, checkpoint.family, rows, files, not dry_run, *totals(tensors))


def _told(kind: Any, config: Any, checkpoint: Checkpoint, tensors: Tensors) -> dict[str, Any] | None:
    """The config.json that a checkpoint was made from, as long as it means the configuration."""
    values = checkpoint.provenance.get("original")
    if not isinstance(values, dict) or values.get("model_type") not in kind.MODEL_TYPES:
        return None
    try:
        return values if kind.config(values, tensors) == config else None
    except (ValueError, ArithmeticError, TypeError, AttributeError, KeyError):
        return None


def _name(kind: Any) -> str:
    return str(kind.__name__).rpartition(".")[2]
