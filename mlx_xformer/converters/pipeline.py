"""The conversion pipeline: recognise a source, read its configuration, plan with its rules, and write tensor by tensor.

The same steps serve every family, in both directions; at most one layer's tensors are held at a time. What is
particular to a family is in its Converter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from .._version import __version__
from ..models.families import make_config, parameter_count, parameter_shapes
from ..storage.checkpoint import EXTRAS, Checkpoint, new_folder, read_checkpoint, save_checkpoint
from ..storage.files import hash_file, write_extras, write_safetensors
from ..storage.messages import describe_misfits, find_misfits, shorten
from .converter import Converter, Original
from .families import CONVERTERS
from .formats import hugging_face
from .formats.torch_package import write_package
from .precision import Precision, Repacking, round_doubles, unpack_tensors
from .report import Report, make_rows, totals
from .rules import Move, apply_rules, inverse_shapes, invert, plan
from .stored import StoredTensor, make_blanks, open_safetensors
from .streaming import Progress, as_blanks, count_written, name_errors, stream_moves

_WEIGHTS = "model.safetensors"
_NO_MODEL = (ArithmeticError, TypeError, AttributeError, LookupError)  # of values that nothing has checked


def convert_to_mlx(
    original: Original,
    out: Path,
    converter: Converter,
    precision: Precision,
    *,
    source: Path,
    dry_run: bool,
    origin: Mapping[str, str],
    progress: Progress | None,
) -> Report:
    """Writes an original as the checkpoint folder `out`. Arguments and errors are those of conversion.convert."""
    try:
        conversion = _Conversion(converter, original, precision)
    except ValueError as error:
        raise ValueError(f"{original.path}: {error}") from None
    except _NO_MODEL as error:
        raise ValueError(f"{original.path}: makes no model ({type(error).__name__}, {shorten(error)})") from None
    warnings = [*original.warnings, *conversion.warnings]
    config = conversion.target.to_dict()
    if not dry_run:
        arrays = conversion.stream(warnings)
        save_checkpoint(
            out,
            conversion.written,
            family=converter.family,
            config=config,
            provenance=_make_provenance(converter, conversion.config, original, origin),
            arrays=name_errors(original.path, count_written(arrays, len(conversion.written), progress)),
            extras=original.extras,
        )
    return Report(
        source=source,
        out=out,
        family=converter.family,
        rows=make_rows(
            conversion.rules,
            make_blanks(conversion.tensors),
            conversion.made,
            read=make_blanks(original.tensors),
            written=conversion.written,
        ),
        files=("config.json", _WEIGHTS, *original.extras),
        written=not dry_run,
        parameters=parameter_count(converter.family, config),
        bytes=totals(conversion.written)[1],
        warnings=tuple(warnings),
        reason=original.reason,
    )


class _Conversion:
    """The plan of a conversion, from names, shapes and dtypes alone. ValueError lists what does not fit.

    Attributes:
        config: The configuration of the original.
        target: That of the checkpoint, which may be packed otherwise.
        rules: The table from the original's names.
        tensors: Those of the original; float64, which MLX cannot store, is rounded to float32.
        made: What the rules make of the tensors, as lazy arrays that are never computed.
        written: The tensors of the checkpoint, likewise.
        warnings: Lines for the report.
    """

    def __init__(self, converter: Converter, original: Original, precision: Precision):
        self.tensors, self.warnings = round_doubles(original.tensors)
        self.config = converter.config(original.values, self.tensors)
        self.rules = converter.rules(self.config, self.tensors)
        self._shapes = parameter_shapes(converter.family, self.config.to_dict())
        self.made = apply_rules(self.rules, make_blanks(self.tensors), self._shapes)
        self.target, self._repack = _choose_precision(converter, self.config, precision)
        self._moves = plan(self.rules, self.tensors)[0]
        self.written = dict(stream_moves(self._moves, as_blanks(self.tensors), self._shapes, self._repack))
        if problems := find_misfits(self.written, parameter_shapes(converter.family, self.target.to_dict())):
            raise ValueError(describe_misfits(problems))

    def stream(self, warnings: list[str]) -> Iterator[tuple[str, mx.array]]:
        """The tensors of the checkpoint, see stream_moves."""
        return stream_moves(self._moves, self.tensors, self._shapes, self._repack, warnings)


def _choose_precision(converter: Converter, config: Any, precision: Precision) -> tuple[Any, Repacking | None]:
    """The configuration to write, and what leads to it."""
    if not converter.quantizes:
        return config, None
    floats = dataclasses.replace(config, quantization=None)
    target = precision.choose_config(config, parameter_shapes(converter.family, floats.to_dict()))
    return target, Repacking(config.quantization, target.quantization, precision.dtype)


def _make_provenance(
    converter: Converter, config: Any, original: Original, origin: Mapping[str, str]
) -> dict[str, Any]:
    """Where a checkpoint is from, and what leads back to the same files."""
    sources = [{"file": file.name, "sha256": hash_file(file)} for file in original.files]
    if original.signatures:
        sources = [{"signature": name, **one} for name, one in zip(original.signatures, sources, strict=True)]
    record = converter.record(config, original)
    return {
        "name": original.name,
        "sources": sources,
        **({} if record is None else {"original": record}),
        "kind": converter.name,
        "family": converter.family,
        "mlx_xformer": __version__,
        "mlx": version("mlx"),
        **origin,
    }


def convert_to_original(source: Path, out: Path, *, family: str | None, dry_run: bool) -> Report:
    """Writes a checkpoint in the layout that it came from; packed matrices become floats.

    Arguments and errors are those of conversion.convert.
    """
    checkpoint = read_checkpoint(source)
    check_family(source, family, checkpoint.family)
    converter = _find_converter(checkpoint)
    try:
        stored, _ = open_safetensors(source / _WEIGHTS)
        config: Any = make_config(checkpoint.family, checkpoint.config)
        tensors = stored
        if converter.quantizes:
            tensors = unpack_tensors(stored, config.quantization)
            config = dataclasses.replace(config, quantization=None, dtype=None)
        back = _Reversal(converter, config, checkpoint, tensors)
        if converter.lay_out is None:
            files = hugging_face.lay_out_folder(back.values, back.metadata)
        else:
            files = converter.lay_out(back.values, checkpoint, source)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    extras = {name: (source / name).read_bytes() for name in EXTRAS if (source / name).is_file()}
    names = list(files)
    if not dry_run:
        with new_folder(out, replace=False) as fresh:
            names = [back.write(fresh / name, content).name for name, content in files.items()]
            write_extras(fresh, extras)
    return Report(
        source,
        out,
        checkpoint.family,
        make_rows(back.rules, make_blanks(tensors), back.made, read=make_blanks(stored)),
        (*names, *extras),
        not dry_run,
        *totals(back.made),
    )


def _find_converter(checkpoint: Checkpoint) -> Converter:
    """The converter of the layout that a checkpoint came from; without provenance, the first of its family."""
    candidates = [converter for converter in CONVERTERS if converter.family == checkpoint.family]
    name = checkpoint.provenance.get("kind")
    return next((converter for converter in candidates if converter.name == name), candidates[0])


class _Reversal:
    """The plan of a conversion back into the layout of an original.

    Attributes:
        rules: The table from the names here to the original's.
        made: The original's tensors, as lazy arrays that are never computed.
        values: What describes the original.
        metadata: Of its tensors.
    """

    def __init__(self, converter: Converter, config: Any, checkpoint: Checkpoint, tensors: Mapping[str, StoredTensor]):
        self.tensors = tensors
        self.metadata: dict[str, str] = {}
        self._shapes = parameter_shapes(checkpoint.family, config.to_dict())
        record = checkpoint.provenance.get("original")
        if isinstance(record, dict):
            self._plan(converter, config, record)
            if (values := self._recorded_values(converter, config, record)) is not None:
                self.values = values
                metadata = record.get("metadata")
                if isinstance(metadata, dict):
                    self.metadata = {key: x for key, x in metadata.items() if isinstance(x, str)}
                return
        self.values = converter.original(config)
        self._plan(converter, config, None)

    def _plan(self, converter: Converter, config: Any, record: Mapping[str, Any] | None) -> None:
        forward = converter.rules(config, converter.names(config, record))
        self.rules = invert(forward)
        self._expected = inverse_shapes(forward, self._shapes)
        self.made = apply_rules(self.rules, make_blanks(self.tensors), self._expected)
        self._moves = plan(self.rules, self.tensors)[0]

    def _recorded_values(self, converter: Converter, config: Any, record: dict[str, Any]) -> dict[str, Any] | None:
        """The config.json that the checkpoint was made from, as long as it means the same configuration."""
        values = record["config"] if isinstance(record.get("config"), dict) else record
        values = {key: x for key, x in values.items() if key not in ("quantization", "quantization_config")}
        if values.get("model_type") not in converter.model_types:
            return None
        originals = {
            name: StoredTensor(self.made[name].dtype, self.made[name].shape, _reader(move, index, self.tensors))
            for move in self._moves
            for index, name in enumerate(move.targets)
        }
        try:
            return values if converter.config(values, originals) == config else None
        except (ValueError, *_NO_MODEL):
            return None

    def write(self, path: Path, content: str | tuple[str, dict[str, str]]) -> Path:
        """Writes a file of OriginalFiles; the path that it has then."""
        if isinstance(content, str):
            path.write_text(content, "utf-8")
            return path
        prefix, metadata = content
        moves = [move for move in self._moves if move.targets[0].startswith(prefix)]
        made = {name.removeprefix(prefix): self.made[name] for move in moves for name in move.targets}
        stream = stream_moves(moves, self.tensors, self._expected)
        arrays = ((name.removeprefix(prefix), x) for name, x in stream)
        if path.suffix == ".th":
            return write_package(path, made, metadata, arrays)
        write_safetensors(path, made, metadata, arrays)
        return path


def _reader(move: Move, index: int, tensors: Mapping[str, StoredTensor]) -> Callable[[], mx.array]:
    """A function that reads one target of a move."""
    return lambda: move([tensors[source].read() for source in move.sources])[index]


def check_family(source: Path, wanted: str | None, found: str) -> None:
    """ValueError unless the family is the one that the user insists on."""
    if wanted is not None and found not in (wanted, f"{wanted}_bag"):
        raise ValueError(f"{source}: family must be {wanted}, got {found}")
