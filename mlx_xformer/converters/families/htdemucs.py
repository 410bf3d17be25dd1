"""HTDemucs: rules from the names and layouts of demucs 4.1.0, and its configuration in both encodings.

Sources: demucs/htdemucs.py, hdemucs.py, demucs.py, transformer.py (names and shapes), hf.py (metadata and bags).
Layouts follow from the configuration alone; shapes are then checked, never consulted.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ...models.htdemucs import BagConfig, HTDemucsConfig
from ...models.htdemucs.config import levels
from ...storage.messages import shorten
from ..converter import Converter, Original
from ..formats.demucs import lay_out_checkpoint
from ..formats.demucs_values import decode_values, encode_value
from ..layouts import Permute, Squeeze
from ..rules import Rule, prefixed
from ..stored import Tensors

KLASS = "demucs.htdemucs.HTDemucs"
_OTHER_KLASSES = {"demucs.hdemucs.HDemucs": "Hybrid Demucs (hdemucs_mmi)", "demucs.demucs.Demucs": "Demucs (mdx)"}

_OVER_TIME = (Permute((0, 2, 1)),)  # (O, C, K) -> (O, K, C)
_OVER_FREQS = (Squeeze(3), *_OVER_TIME)  # (O, C, K, 1) -> (O, K, C)
_UP_TIME = (Permute((1, 2, 0)),)  # (C, O, K) -> (O, K, C)
_UP_FREQS = (Squeeze(3), *_UP_TIME)  # (C, O, K, 1) -> (O, K, C)
_OVER_BOTH = (Permute((0, 3, 2, 1)),)  # (O, C, F, T) -> (O, T, F, C)
_POINT_TIME = (Squeeze(2),)  # (O, C, 1) -> (O, C)
_POINT_BOTH = (Squeeze(3), Squeeze(2))  # (O, C, 1, 1) -> (O, C)

_SIDES = "{side:encoder|tencoder|decoder|tdecoder}.{i}."
_DCONV = _SIDES + "dconv.layers.{d}."
_LEAF = "{leaf:weight|bias}"
_LAYER = "crosstransformer.{stack:layers|layers_t}.{i}."
_ATTENTION = _LAYER + "{kind:self_attn|cross_attn}."


def rules(config: HTDemucsConfig | BagConfig, names: Collection[str] = ()) -> list[Rule]:
    """The table for a model, or for a bag, whose tensors carry the prefix `models.N.` on both sides."""
    if isinstance(config, BagConfig):
        return [rule for n, c in enumerate(config.members) for rule in prefixed(rules(c), f"models.{n}.")]
    return [*_convolutions(config), *_same_everywhere(), *_transformer()]


def _convolutions(config: HTDemucsConfig) -> list[Rule]:
    """The kernels, whose layout depends on the axis that a level convolves over."""
    plan = levels(config)
    spectral = [level.index for level in plan if level.freq]
    single = [level.index for level in plan if not level.freq]  # one row is left: convolved over time
    last, last_waveform = len(plan) - 1, len(spectral) - 1  # decoders stand in reverse order
    table = []
    for down, up, indices, depths, freq in [
        ("encoder", "decoder", spectral, [last - i for i in spectral], True),
        ("encoder", "decoder", single, [last - i for i in single], False),
        ("tencoder", "tdecoder", spectral, [last_waveform - i for i in spectral], False),
    ]:
        if not indices:
            continue
        at, up_at = (f"{side}.{{i:{'|'.join(map(str, at))}}}." for side, at in ((down, indices), (up, depths)))
        table += [
            Rule(at + "conv.weight", at + "conv.weight", _OVER_FREQS if freq else _OVER_TIME),
            Rule(up_at + "conv_tr.weight", up_at + "conv_tr.weight", _UP_FREQS if freq else _UP_TIME),
            Rule(at + "rewrite.weight", at + "rewrite.weight", _rewrite(config.context_enc, freq)),
            Rule(up_at + "rewrite.weight", up_at + "rewrite.weight", _rewrite(config.context, freq)),
        ]
    return table


def _rewrite(context: int, freq: bool) -> tuple[Permute | Squeeze, ...]:
    if context:
        return _OVER_BOTH if freq else _OVER_TIME
    return _POINT_BOTH if freq else _POINT_TIME


def _same(template: str) -> Rule:
    return Rule(template, template)


def _same_everywhere() -> list[Rule]:
    """What every level and the resamplers have in common."""
    resampler = "channel_{way:upsampler|upsampler_t|downsampler|downsampler_t}."
    return [
        _same(_SIDES + "{part:conv|conv_tr|rewrite}.bias"),
        _same(_SIDES + "{part:norm1|norm2}." + _LEAF),
        Rule(_DCONV + "0.weight", _DCONV + "conv.weight", _OVER_TIME),
        Rule(_DCONV + "0.bias", _DCONV + "conv.bias"),
        Rule(_DCONV + "1." + _LEAF, _DCONV + "norm1." + _LEAF),
        Rule(_DCONV + "3.weight", _DCONV + "expand.weight", _POINT_TIME),
        Rule(_DCONV + "3.bias", _DCONV + "expand.bias"),
        Rule(_DCONV + "4." + _LEAF, _DCONV + "norm2." + _LEAF),
        Rule(_DCONV + "6.scale", _DCONV + "layer_scale.scale"),
        Rule("freq_emb.embedding.weight", "freq_emb.weight"),
        Rule(resampler + "weight", resampler + "weight", _POINT_TIME),
        _same(resampler + "bias"),
    ]


def _transformer() -> list[Rule]:
    return [
        _same("crosstransformer.{norm:norm_in|norm_in_t}." + _LEAF),
        Rule("crosstransformer.position_embeddings.embedding.weight", "crosstransformer.position_embeddings.weight"),
        Rule(
            _ATTENTION + "in_proj_" + _LEAF,
            tuple(f"{_ATTENTION}{x}_proj.{_LEAF}" for x in "qkv"),
        ),
        _same(_ATTENTION + "out_proj." + _LEAF),
        Rule(_LAYER + "{linear:linear1|linear2}." + _LEAF, _LAYER + "ffn.{linear:linear1|linear2}." + _LEAF),
        _same(_LAYER + "{norm:norm1|norm2|norm3|norm_out}." + _LEAF),
        _same(_LAYER + "{gamma:gamma_1|gamma_2}.scale"),
    ]


def config(metadata: Mapping[str, str], tensors: Tensors | None = None) -> HTDemucsConfig:
    """The configuration from demucs' metadata: `klass`, and `args` and `kwargs` as JSON text.

    Args:
        metadata: Of the model's file.
        tensors: Those of the file, whose naming the message names if there is no metadata.
    """
    missing = [key for key in ("klass", "args", "kwargs") if key not in metadata]
    if missing:
        naming = "" if metadata or tensors is None else " (the naming is {}: {})".format(*find_naming(tensors))
        raise ValueError(
            f"no {', '.join(missing)} in the metadata: the tensors alone do not tell the configuration{naming}"
        )
    if "structure" in metadata:
        raise ValueError("weights quantised with DiffQ are not supported (the metadata names a structure)")
    klass = metadata["klass"]
    if klass != KLASS:
        what = _OTHER_KLASSES.get(klass)
        raise ValueError(
            f"klass must be {KLASS}, got {klass}: the older {what} is not supported"
            if what
            else f"klass must be {KLASS}, got {shorten(klass)}"
        )
    args, kwargs = (decode_values(key, metadata[key]) for key in ("args", "kwargs"))
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise ValueError("args must be a JSON array and kwargs an object")
    names = [field.name for field in dataclasses.fields(HTDemucsConfig)]
    if len(args) > len(names) or set(names[: len(args)]) & kwargs.keys():
        raise ValueError("args and kwargs must give every option of HTDemucs at most once")
    try:
        return HTDemucsConfig.from_dict({**dict(zip(names, args, strict=False)), **kwargs})
    except (ArithmeticError, TypeError) as error:
        raise ValueError(f"args and kwargs must make a model: {type(error).__name__}, {shorten(error)}") from None


def metadata(config: HTDemucsConfig) -> dict[str, str]:
    """The inverse of `config`: every option as a keyword."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {"klass": KLASS, "args": "[]", "kwargs": json.dumps({k: encode_value(v) for k, v in values.items()})}


def bag_config(values: Mapping[str, Any], tensors: Tensors) -> BagConfig:
    """The configuration of a bag as formats.demucs reads it: the metadata of its members, weights and segment."""
    members = []
    for n, member in enumerate(values["members"]):
        own = {name: x for name, x in tensors.items() if name.startswith(f"models.{n}.")}
        try:
            members.append(config({key: x for key, x in member.items() if key != "file"}, own))
        except ValueError as error:
            raise ValueError(f"{member['file']}: {error}") from None
    weights, segment = values["weights"], values["segment"]

    def is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and math.isfinite(value)

    rows_given = isinstance(weights, list) and all(isinstance(row, list) for row in weights)
    if weights is not None and not (rows_given and all(is_number(w) for row in weights for w in row)):
        raise ValueError("weights must be a list of lists of numbers, a row per model")
    if segment is not None and not (is_number(segment) and segment > 0):
        raise ValueError("segment must be a number of seconds")
    rows = None if weights is None else tuple(tuple(map(float, row)) for row in weights)
    return BagConfig(tuple(members), rows, segment)


def describe_bag(config: BagConfig) -> dict[str, Any]:
    """The inverse of `bag_config`, without the names of files."""
    members = [metadata(member) for member in config.members]
    return {"members": members, "weights": config.weights, "segment": config.segment}


_MARKS = {
    "demucs": ("encoder", "decoder", "tencoder", "tdecoder", "freq_emb", "crosstransformer", "channel_upsampler"),
    "metalaudio": (
        "time_encoder",
        "freq_encoder",
        "time_decoder",
        "freq_decoder",
        "cross_transformer",
        "time_output_heads",
    ),
}


def find_naming(names: Iterable[str]) -> tuple[str, str]:
    """Whose naming a set of tensors follows, "demucs", "metalaudio" or "unknown", and the reason.

    The prefix `models.N.` of a bag's state dict is looked past.
    """
    heads = set()
    for name in names:
        parts = name.split(".")
        heads.add(parts[2] if parts[0] == "models" and len(parts) > 2 and parts[1].isdigit() else parts[0])
    scores = {kind: [mark for mark in marks if mark in heads] for kind, marks in _MARKS.items()}
    kind, found = max(scores.items(), key=lambda item: len(item[1]))
    if len(found) < 3:
        return "unknown", f"names begin with {shorten(', '.join(sorted(heads)))}"
    return kind, f"names begin with {', '.join(found)}"


def _record_nothing(config: HTDemucsConfig | BagConfig, original: Original) -> None:
    """The configuration leads back to the metadata."""


MODEL = Converter("htdemucs", "htdemucs", config, rules, metadata, record=_record_nothing, lay_out=lay_out_checkpoint)
BAG = Converter(
    "htdemucs_bag", "htdemucs_bag", bag_config, rules, describe_bag, record=_record_nothing, lay_out=lay_out_checkpoint
)
CONVERTERS = (MODEL, BAG)
