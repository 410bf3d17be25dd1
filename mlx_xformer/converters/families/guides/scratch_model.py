"""The token model around a transformer from scratch's stack, under its author's names, into stack.EncoderDecoder.

Source: yucoder14/guitar_effects, myTransformer.py, without the codec in it. Settings are those of scratch and
padding_idx (0), embed_dropout. The buffers `mask` and `pos.pe` are dropped, which PyTorch makes anew; pos.pe tells
max_len.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from ....models.guides.scratch import EncoderDecoderConfig
from ...rules import Rule, prefixed
from . import scratch

FAMILY = "scratch_encoder_decoder"
MODEL_TYPES: tuple[str, ...] = ()
Tensors = Mapping[str, mx.array]
_OWN = ("padding_idx", "max_len", "embed_dropout")
_LEAVES = {"embed.weight", "unembed.weight", "unembed.bias"}


def detect(tensors: Tensors) -> str | None:
    """See networks.Kind."""
    if not tensors.keys() >= _LEAVES:
        return None
    found = scratch.why(tensors, "decoder.")
    others = {name for name in tensors if not name.startswith("decoder.")} - _LEAVES - {"mask", "pos.pe"}
    return None if found is None or others else f"embed and unembed beside {found}"


def config(values: Mapping[str, Any], tensors: Tensors) -> EncoderDecoderConfig:
    """See networks.Kind."""
    own = {name: value for name, value in values.items() if name in _OWN}
    if "pos.pe" in tensors and tensors["pos.pe"].ndim:
        own.setdefault("max_len", len(tensors["pos.pe"]))
    stack = {"causal": True, **{name: value for name, value in values.items() if name not in _OWN}}
    table = tensors["embed.weight"]
    if table.ndim != 2:
        raise ValueError(f"embed.weight must be a matrix, got {table.shape}")
    return EncoderDecoderConfig(len(table), scratch.stack_config(stack, tensors, "decoder."), **own)


def rules(config: Any, names: Tensors) -> list[Rule]:
    """See networks.Kind."""
    return [
        Rule("embed.weight", "embed.weight"),
        Rule("unembed.{leaf:weight|bias}", "unembed.{leaf}"),
        *prefixed(scratch.block_rules(), "decoder."),
        Rule("mask", None),
        Rule("pos.pe", None),
    ]


def original(config: EncoderDecoderConfig) -> dict[str, Any]:
    """See networks.Kind."""
    own = {name: value for name, value in config.to_dict().items() if name in _OWN}
    return {**scratch.original(config.stack), **own}
