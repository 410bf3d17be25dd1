"""convert(): a checkpoint of the original implementation into a folder of ours, and back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import yaml

from .._version import __version__
from ..models.families import FAMILIES, make_config, parameter_shapes
from ..models.htdemucs import BagConfig, HTDemucsConfig
from ..storage.checkpoint import Checkpoint, is_checkpoint, new_folder, read_checkpoint, save_checkpoint
from ..storage.files import write_safetensors
from . import language, pipeline
from .families import htdemucs
from .formats.demucs import Originals, find_originals
from .formats.source import SUFFIXES, Source, plain_name, scan
from .report import Report, make_rows, totals
from .rules import apply_rules, inverse_shapes, invert

Tensors = dict[str, mx.array]


def convert(
    source: str | Path,
    out: str | Path,
    *,
    family: str | None = None,
    to: str = "mlx",
    dry_run: bool = False,
    origin: Mapping[str, str] | None = None,
    quantize: int | None = None,
    group_size: int = 64,
    dtype: str | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Converts a model file, a bag's .yaml, a language model's folder or GGUF file, or a folder that holds one of them
    into the checkpoint folder `out`; with `to="pytorch"`, a checkpoint folder back into the original files.

    Tensors keep their bits and dtype, but for language models where `quantize` (4 or 8 bits in groups of group_size; 0
    makes floats of packed matrices) or `dtype` (of the floats) asks for others. `family` insists on one; `origin` is
    added to the provenance. settings: what a file of tensors does not tell of its model, such as num_heads.
    progress(done, total) is told how many tensors of a language model are written. One ValueError (or OSError, for
    files) says all that does not fit; then nothing is written.
    """
    if family is not None and family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    if to not in ("mlx", "pytorch"):
        raise ValueError(f'to must be "mlx" or "pytorch", got {to!r}')
    source, out = Path(source), Path(out)
    precision = language.Precision(quantize, group_size, dtype)
    if to == "pytorch":
        if precision != language.Precision() or settings:
            raise ValueError(
                "quantize, group_size, dtype and settings are of no use where a checkpoint leads back to its original"
            )
        return _to_pytorch(source, out, family, dry_run)
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    kind = pipeline.kind_of_folder(source) or pipeline.kind_of_file(source)
    if kind is not None:
        if precision != language.Precision():
            raise ValueError("quantize, group_size and dtype are for language models only")
        _check_family(source, family, kind.FAMILY)
        return pipeline.to_mlx(source, out, kind, settings=settings or {}, dry_run=dry_run, origin=origin or {})
    if settings:
        raise ValueError(f"{source}: settings are for files of tensors of a known kind, got {', '.join(settings)}")
    if language.is_language(source):
        _check_family(source, family, language.FAMILY)
        return language.to_mlx(source, out, precision, dry_run=dry_run, origin=origin or {}, progress=progress)
    _check_holds(source)
    if precision != language.Precision() and not is_checkpoint(source):
        raise ValueError("quantize, group_size and dtype are for language models only")
    return _to_mlx(source, out, family, dry_run, dict(origin or {}))


def _check_holds(source: Path) -> None:
    """FileNotFoundError for a folder without anything to convert."""
    if not source.is_dir() or is_checkpoint(source):
        return
    if not {path.suffix for path in source.iterdir()} & {".yaml", ".yml", *SUFFIXES}:
        raise FileNotFoundError(
            f"{source}: holds neither a bag (.yaml), a model file ({', '.join(SUFFIXES)}) nor a language model "
            "(config.json with a model_type beside .safetensors, or one .gguf)"
        )


def _to_mlx(source: Path, out: Path, family: str | None, dry_run: bool, origin: dict[str, str]) -> Report:
    originals = find_originals(source)
    members = originals.read()
    found, config = _configuration(originals, members)
    _check_family(source, family, found)
    if isinstance(config, BagConfig):
        tensors = {f"models.{n}.{name}": x for n, one in enumerate(members) for name, x in one.tensors.items()}
    else:
        tensors = members[0].tensors
    rules = htdemucs.rules(config)
    try:
        weights = apply_rules(rules, tensors, parameter_shapes(found, config.to_dict()))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    provenance = {
        "name": originals.name,
        "sources": [
            {"signature": signature, "file": one.path.name, "sha256": one.sha256}
            for signature, one in zip(originals.signatures, members, strict=True)
        ],
        "family": found,
        "mlx_xformer": __version__,
        "mlx": version("mlx"),
        **origin,
    }
    if not dry_run:
        save_checkpoint(out, weights, family=found, config=config.to_dict(), provenance=provenance)
    rows = make_rows(rules, tensors, weights)
    files = ("config.json", "model.safetensors")
    return Report(source, out, found, rows, files, not dry_run, *totals(tensors), tuple(scan(tensors)))


def _check_family(source: Path, wanted: str | None, found: str) -> None:
    if wanted is not None and found not in (wanted, f"{wanted}_bag"):
        raise ValueError(f"{source}: family must be {wanted}, got {found}")


def _configuration(originals: Originals, members: Sequence[Source]) -> tuple[str, HTDemucsConfig | BagConfig]:
    configs = []
    for source in members:
        try:
            configs.append(htdemucs.config(source.metadata))
        except ValueError as error:
            kind, reason = htdemucs.detect(source.tensors)
            naming = "" if source.metadata else f" (the naming is {kind}: {reason})"
            raise ValueError(f"{source.path}: {error}{naming}") from None
    try:
        return htdemucs.combined(configs, originals.weights, originals.segment)
    except ValueError as error:
        raise ValueError(f"{originals.bag or members[0].path}: {error}") from None


def _to_pytorch(source: Path, out: Path, family: str | None, dry_run: bool) -> Report:
    checkpoint = read_checkpoint(source)
    _check_family(source, family, checkpoint.family)
    if checkpoint.family == language.FAMILY:
        return language.to_hugging_face(source, out, checkpoint, dry_run=dry_run)
    if any(checkpoint.family == kind.FAMILY for kind in pipeline.KINDS):
        return pipeline.to_original(source, out, checkpoint, dry_run=dry_run)
    try:
        config = make_config(checkpoint.family, checkpoint.config)
        rules = htdemucs.rules(config)
        shapes = inverse_shapes(rules, parameter_shapes(checkpoint.family, checkpoint.config))
        tensors = apply_rules(invert(rules), checkpoint.weights, shapes)
        files = _original_files(config, tensors, *_names(source, checkpoint))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    if not dry_run:
        with new_folder(out, replace=False) as fresh:
            for name, content in files.items():
                if isinstance(content, str):
                    (fresh / name).write_text(content, "utf-8")
                else:
                    write_safetensors(fresh / name, *content)
    rows = make_rows(invert(rules), checkpoint.weights, tensors)
    return Report(source, out, checkpoint.family, rows, tuple(files), not dry_run, *totals(tensors))


def _names(source: Path, checkpoint: Checkpoint) -> tuple[str, list[str]]:
    """The model's name and its members' signatures, from the provenance or else from the folder and its content."""
    name = checkpoint.provenance.get("name")
    records = checkpoint.provenance.get("sources", [])
    count = len(checkpoint.config.get("members", [None]))
    if isinstance(records, list) and len(records) == count and all(isinstance(record, dict) for record in records):
        signatures = [plain_name(record.get("signature")) for record in records]
    else:
        with (source / "model.safetensors").open("rb") as file:
            digest = hashlib.sha256(file.read()).hexdigest()
        signatures = [digest[:8] if count == 1 else f"{digest[:8]}_{n}" for n in range(count)]
    return plain_name(source.resolve().name if name is None else name), signatures


def _original_files(
    config: HTDemucsConfig | BagConfig, tensors: Tensors, name: str, signatures: list[str]
) -> dict[str, str | tuple[Tensors, dict[str, str]]]:
    """File name -> text, or tensors and metadata, in the layout of demucs/hf.py."""
    files: dict[str, Any] = {}
    bag: dict[str, Any] = {"models": signatures}
    if isinstance(config, BagConfig):
        for n, (signature, member) in enumerate(zip(signatures, config.members, strict=True)):
            prefix = f"models.{n}."
            own = {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}
            files[f"{signature}.safetensors"] = own, htdemucs.metadata(member)
        if config.weights is not None:
            bag["weights"] = [list(row) for row in config.weights]
        if config.segment is not None:
            bag["segment"] = float(config.segment)
    else:
        files[f"{signatures[0]}.safetensors"] = tensors, htdemucs.metadata(config)
    files[f"{name}.yaml"] = yaml.safe_dump(bag, default_flow_style=None, sort_keys=False)
    return files
