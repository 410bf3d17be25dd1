"""The interface between the conversion pipeline and the families: what a source holds, and what a family says of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..storage.checkpoint import Checkpoint
from .rules import Rule
from .stored import StoredTensor, Tensors


@dataclass(frozen=True)
class Original:
    """A checkpoint of another implementation, whose tensors are read when they are asked for.

    Attributes:
        path: The file or folder that messages begin with.
        name: The model's name, if it has one.
        values: What describes the model: a config.json, the settings given by the user, or the metadata of a file.
        tensors: The tensors by their names.
        files: The files of the tensors.
        extras: Files that the checkpoint keeps, such as the tokenizer's: their names and contents.
        metadata: What .safetensors files say of themselves.
        signatures: Names that demucs gives to the files, one each.
        reason: Why the source is taken for what it is.
        warnings: Lines for the report.
    """

    path: Path
    name: str | None
    values: dict[str, Any]
    tensors: dict[str, StoredTensor]
    files: tuple[Path, ...]
    extras: dict[str, bytes] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    signatures: tuple[str, ...] = ()
    reason: str = ""
    warnings: tuple[str, ...] = ()


# The files that a checkpoint becomes on the way back, by name: the content of a text; or of a .safetensors file, or a
# .th of demucs, the prefix of the tensors in it, which they lose, and the file's metadata. A .th gets the first digits
# of its SHA-256 into its name.
OriginalFiles = dict[str, str | tuple[str, dict[str, str]]]


def _record_values(config: Any, original: Original) -> dict[str, Any] | None:
    return dict(original.values)


def _no_names(config: Any, record: Mapping[str, Any] | None) -> Collection[str]:
    return ()


@dataclass(frozen=True, eq=False)
class Converter:
    """How checkpoints of one layout become those of a family, and back.

    Attributes:
        name: The layout's name, which the provenance records as `kind`.
        family: The name of the family in models.families.FAMILIES.
        config: Of `values` (see Original) and tensors, the family's configuration. ValueError names what is missing or
            not understood.
        rules: Of the configuration and the names of the tensors, the table of rules. On the way back the names are
            those that `names` gives.
        original: Of the configuration, `values` that mean it.
        detect: Of tensors by name, why they have this layout, in words; None if they have another. Without it, files
            of tensors alone are never of this layout.
        model_types: The values of `model_type` in a config.json of Hugging Face that mean this layout.
        quantizes: Whether the configuration has a `quantization` and a `dtype`, and conversions may change them.
        record: Of the configuration and the source, what the provenance keeps to lead back to the same files.
        names: Of the configuration and such a record, names of tensors that `rules` needs to know.
        lay_out: Of `values`, a checkpoint and its folder, the files of the way back. None: those of Hugging Face.
    """

    name: str
    family: str
    config: Callable[[Mapping[str, Any], Tensors], Any]
    rules: Callable[[Any, Collection[str]], list[Rule]]
    original: Callable[[Any], dict[str, Any]]
    detect: Callable[[Tensors], str | None] | None = None
    model_types: tuple[str, ...] = ()
    quantizes: bool = False
    record: Callable[[Any, Original], dict[str, Any] | None] = _record_values
    names: Callable[[Any, Mapping[str, Any] | None], Collection[str]] = _no_names
    lay_out: Callable[[Mapping[str, Any], Checkpoint, Path], OriginalFiles] | None = None
