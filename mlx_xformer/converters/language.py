"""Language models: Hugging Face folders and GGUF files into checkpoint folders, and back to Hugging Face's layout.

One tensor at a time is read, changed and written.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from .._version import __version__
from ..models.causal_lm.model import DTYPES, CausalLMConfig, Quantization
from ..models.families import parameter_count, parameter_shapes
from ..storage.checkpoint import EXTRAS, Checkpoint, new_folder, save_checkpoint
from ..storage.files import misfit, write_extras, write_safetensors
from .families import causal_lm, causal_lm_moe
from .formats import gguf, hugging_face
from .formats.hugging_face import Original
from .formats.source import Stored, open_safetensors, scan, sha256_of
from .formats.torch_pickle import short
from .report import Report, make_rows, totals
from .rules import Move, Rule, apply_rules, invert, plan

FAMILY = "causal_lm"
Progress = Callable[[int, int], None]  # tensors written, and how many there are
Pair = tuple[int, int] | None  # bits and group size of a packed matrix, or None for floats


@dataclass(frozen=True)
class Precision:
    """What becomes of the numbers. quantize: None leaves matrices as they are, 0 makes floats of packed ones, 4 or 8
    packs them in as many bits and groups of group_size. dtype: of the floats; None leaves them as they are."""

    quantize: int | None = None
    group_size: int = 64
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.quantize not in (None, 0, 4, 8):
            raise ValueError(f"quantize must be 4, 8, or 0 for floats, got {self.quantize}")
        if self.group_size not in (32, 64, 128):
            raise ValueError(f"group_size must be 32, 64 or 128, got {self.group_size}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")


def is_language(source: Path) -> bool:
    """Whether a path leads to a language model: a GGUF file, a folder with one, or a folder of Hugging Face."""
    return gguf.find(source) is not None or hugging_face.is_folder(source)


def all_files(source: Path) -> list[Path]:
    """Every file of a language model that there is to read."""
    file = gguf.find(source)
    if file is not None:
        return [file]
    named = [source / name for name in ("config.json", *EXTRAS)]
    return [*(path for path in named if path.is_file()), *hugging_face.files_of(source)]


def read_original(source: Path) -> Original:
    """What is there to convert. FileNotFoundError or ValueError, in one line, begins with the path."""
    file = gguf.find(source)
    if file is not None:
        return gguf.read(file)
    found = hugging_face.read(source)
    try:
        config = causal_lm.config(found.values)
    except ValueError as error:
        raise ValueError(f"{source / 'config.json'}: {error}") from None
    except (ArithmeticError, TypeError, AttributeError, KeyError) as error:
        reason = f"{type(error).__name__}, {short(str(error))}"
        raise ValueError(f"{source / 'config.json'}: makes no model ({reason})") from None
    config = causal_lm_moe.with_packed_routers(config, found.tensors)
    made_of: dict[str, Any] = {"config": found.values, "metadata": found.metadata}
    if config.moe is not None:
        made_of["fused"] = causal_lm_moe.fused_name(config) in found.tensors
    made_of["table"] = causal_lm.TABLE_NAME if causal_lm.TABLE_NAME in found.tensors else causal_lm.HEAD_NAME
    return Original(
        source.resolve().name,
        config,
        causal_lm.rules(config, found.tensors),
        found.tensors,
        found.files,
        found.extras,
        made_of,
    )


def to_mlx(
    source: Path,
    out: Path,
    precision: Precision,
    *,
    dry_run: bool,
    origin: Mapping[str, str],
    progress: Progress | None = None,
) -> Report:
    """Converts the original behind `source` into the checkpoint folder `out`."""
    original = read_original(source)
    blanks = {name: tensor.blank() for name, tensor in original.tensors.items()}
    try:
        made = apply_rules(original.rules, blanks, parameter_shapes(FAMILY, original.config.to_dict()))
        config = _target(original.config, made, precision)
        after = _packed(made, original.config, config, precision.dtype)
        _check_shapes(after, config)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    warnings: list[str] = []
    if not dry_run:
        provenance = {
            "name": original.name,
            "sources": [{"file": file.name, "sha256": sha256_of(file)} for file in original.files],
            "original": original.made_of,
            "family": FAMILY,
            "mlx_xformer": __version__,
            "mlx": version("mlx"),
            **origin,
        }
        stream = _stream(original.rules, original.tensors, after, original.config, config, precision.dtype, warnings)
        save_checkpoint(
            out,
            after,
            family=FAMILY,
            config=config.to_dict(),
            provenance=provenance,
            arrays=stream if progress is None else _told(stream, len(after), progress),
            extras=original.extras,
        )
    rows = make_rows(original.rules, blanks, made, written=after)
    files = ("config.json", "model.safetensors", *original.extras)
    counts = parameter_count(FAMILY, config.to_dict()), totals(after)[1]
    return Report(source, out, FAMILY, rows, files, not dry_run, *counts, (*original.warnings, *warnings))


def _target(config: CausalLMConfig, made: Mapping[str, mx.array], precision: Precision) -> CausalLMConfig:
    """The configuration with the packing that is asked for. Rows that groups do not divide stay floats."""
    if precision.dtype is not None:
        config = dataclasses.replace(config, dtype=None)
    if precision.quantize is None:
        return config
    if precision.quantize == 0:
        return dataclasses.replace(config, quantization=None)
    floats = parameter_shapes(FAMILY, dataclasses.replace(config, quantization=None).to_dict())
    kept = sorted(n for n, shape in floats.items() if len(shape) > 1 and shape[-1] % precision.group_size)
    layers: dict[str, Pair] = {name.removesuffix(".weight"): None for name in kept}
    return dataclasses.replace(config, quantization=Quantization(precision.quantize, precision.group_size, layers))


def _check_shapes(after: Mapping[str, mx.array], config: CausalLMConfig) -> None:
    """What is to be written fits what will be loaded."""
    shapes = parameter_shapes(FAMILY, config.to_dict())
    wrong = [
        name for name in shapes.keys() | after.keys() if name not in after or after[name].shape != shapes.get(name)
    ]
    if wrong:
        raise ValueError(misfit([("misshapen", name) for name in wrong]))


def _layers(names: Mapping[str, Any]) -> dict[str, list[str]]:
    """Layer -> its leaves, in order."""
    found: dict[str, list[str]] = {}
    for name in names:
        layer, _, leaf = name.rpartition(".")
        found.setdefault(layer, []).append(leaf)
    return found


def _pair(config: CausalLMConfig, layer: str, arrays: Mapping[str, mx.array]) -> Pair:
    """How a layer is packed."""
    return config.quantization.of(layer) if config.quantization is not None and arrays["weight"].ndim > 1 else None


def _repacked(arrays: Mapping[str, mx.array], now: Pair, then: Pair, dtype: str | None) -> dict[str, mx.array]:
    """The arrays of a layer by leaf, packed as `then` and with floats of `dtype`."""
    kind = None if dtype is None else getattr(mx, dtype)
    arrays = dict(arrays)
    if now is not None and now != then:
        scales, biases = (arrays.pop(leaf).astype(mx.float32) for leaf in ("scales", "biases"))
        arrays["weight"] = mx.dequantize(arrays["weight"], scales, biases, bits=now[0], group_size=now[1])
    if kind is not None:
        arrays = {leaf: x.astype(kind) if mx.issubdtype(x.dtype, mx.floating) else x for leaf, x in arrays.items()}
    if then is not None and now != then:
        packed = mx.quantize(arrays["weight"], bits=then[0], group_size=then[1])
        arrays |= dict(zip(("weight", "scales", "biases"), packed, strict=True))
    return arrays


def _packed(
    arrays: Mapping[str, mx.array], now: CausalLMConfig, then: CausalLMConfig, dtype: str | None
) -> dict[str, mx.array]:
    """All layers repacked; of blanks this computes nothing."""
    after: dict[str, mx.array] = {}
    for layer, leaves in _layers(arrays).items():
        own = {leaf: arrays[f"{layer}.{leaf}"] for leaf in leaves}
        if "weight" not in own:
            raise ValueError(misfit([("missing", f"{layer}.weight")]))
        made = _repacked(own, _pair(now, layer, own), _pair(then, layer, own), dtype)
        after |= {f"{layer}.{leaf}": x for leaf, x in made.items()}
    return after


def _told(stream: Iterator[tuple[str, mx.array]], total: int, progress: Progress) -> Iterator[tuple[str, mx.array]]:
    """The stream, which tells how many of its tensors have been written."""
    for done, pair in enumerate(stream):
        progress(done, total)
        yield pair
    progress(total, total)


def _stream(
    rules: list[Rule],
    tensors: Mapping[str, Stored],
    after: Mapping[str, mx.array],
    now: CausalLMConfig,
    then: CausalLMConfig,
    dtype: str | None,
    warnings: list[str],
) -> Iterator[tuple[str, mx.array]]:
    """The tensors of `after`, one layer's at a time."""
    blanks = {name: tensor.blank() for name, tensor in tensors.items()}
    moves = {target: move for move in plan(rules, blanks)[0] for target in move.targets}
    for layer in _layers(after):
        names = [name for name in moves if name.rpartition(".")[0] == layer]
        own = {name.rpartition(".")[2]: _made(moves[name], tensors, name) for name in names}
        warnings += scan({f"{layer}.{leaf}": x for leaf, x in own.items()})
        own = _repacked(own, _pair(now, layer, own), _pair(then, layer, own), dtype)
        for leaf in list(own):
            yield f"{layer}.{leaf}", own.pop(leaf)
        mx.clear_cache()  # of buffers that fit no other layer


def _made(move: Move, tensors: Mapping[str, Stored], name: str) -> mx.array:
    """One target of a move."""
    return move([tensors[source].read() for source in move.sources])[move.targets.index(name)]


def to_hugging_face(source: Path, out: Path, checkpoint: Checkpoint, *, dry_run: bool) -> Report:
    """A decoder's checkpoint in Hugging Face's layout, bit for bit; packed matrices become floats."""
    config = CausalLMConfig.from_dict(checkpoint.config)
    floats = dataclasses.replace(config, quantization=None)
    values, known, metadata = _original_of(checkpoint, floats)
    stored, _ = open_safetensors(source / "model.safetensors")
    blanks = {name: tensor.blank() for name, tensor in stored.items()}
    unpacked = _packed(blanks, config, floats, None)
    rules = invert(causal_lm.rules(floats, known))
    moves, problems = plan(rules, unpacked)
    if problems:
        raise ValueError(misfit(problems))
    after = dict(_moved(moves, iter(unpacked.items())))
    extras = {name: (source / name).read_bytes() for name in EXTRAS if (source / name).is_file()}
    same = [Rule(name, name) for name in stored]
    if not dry_run:
        stream = _stream(same, stored, unpacked, config, floats, None, [])
        with new_folder(out, replace=False) as fresh:
            write_safetensors(fresh / "model.safetensors", after, metadata, _moved(moves, stream))
            (fresh / "config.json").write_text(json.dumps(values, indent=2) + "\n", "utf-8")
            write_extras(fresh, extras)
    files = ("config.json", "model.safetensors", *extras)
    rows = make_rows(rules, unpacked, after, read=blanks)
    return Report(source, out, FAMILY, rows, files, not dry_run, *totals(after))


def _moved(moves: list[Move], stream: Iterator[tuple[str, mx.array]]) -> Iterator[tuple[str, mx.array]]:
    """What a stream of sources becomes; those of a join wait for one another."""
    ends = {source: move for move in moves for source in move.sources}
    waiting: dict[str, mx.array] = {}
    for name, x in stream:
        waiting[name] = x
        del x
        move = ends[name]
        if waiting.keys() >= set(move.sources):
            yield from zip(move.targets, move([waiting.pop(source) for source in move.sources]), strict=True)


def _original_of(checkpoint: Checkpoint, floats: CausalLMConfig) -> tuple[dict[str, Any], list[str], dict[str, str]]:
    """Hugging Face's config.json, the one of before where it still means the same, names that tell of the table and of
    fused experts, and the metadata of the safetensors, which may tell of a tie."""
    before = checkpoint.provenance.get("original")
    plain = {"format": "pt"}
    if isinstance(before, dict) and isinstance(before.get("config"), dict):
        values = {key: x for key, x in before["config"].items() if key not in ("quantization", "quantization_config")}
        told = before.get("metadata")
        kept = {key: x for key, x in told.items() if isinstance(x, str)} if isinstance(told, dict) else {}
        try:
            if causal_lm.config(values) == dataclasses.replace(floats, dtype=None):
                head = floats.tie_embeddings and before.get("table") == causal_lm.HEAD_NAME
                known = [causal_lm.HEAD_NAME if head else causal_lm.TABLE_NAME]
                known += (
                    [causal_lm_moe.fused_name(floats)] if floats.moe is not None and before.get("fused") is True else []
                )
                return values, known, {**kept, **plain}
        except (ValueError, ArithmeticError, TypeError, AttributeError, KeyError):
            pass  # edited since
    return causal_lm.original(floats), [causal_lm.TABLE_NAME], plain
