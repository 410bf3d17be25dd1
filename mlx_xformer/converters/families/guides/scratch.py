"""The models of a transformer from scratch, under its author's names (W_Q, lin_1, gamma, ...).

There is a stack of blocks, and a token model around it.

Source: yucoder14/guitar_effects, transformer_fun.ipynb and myTransformer.py without the codec in it. A file has the
widths and the number of blocks; settings give num_heads and, where they differ from the defaults, causal, norm_eps and
the dropouts; of the token model also padding_idx, embed_dropout and, without its buffer pos.pe, max_len.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from ....models.guides.scratch import EncoderDecoderConfig, StackConfig
from ...converter import Converter
from ...rules import Rule, prefixed
from ...stored import Tensors

_PARTS = {"attention_layer": "self_attn", "cross_attention_layer": "cross_attn"}
_LETTERS = {"Q": "q", "K": "k", "V": "v", "O": "out"}
_SETTINGS = (
    *("num_heads", "causal", "norm", "norm_eps", "dropout_at", "score_dropout"),
    *("attention_dropout", "ffn_dropout", "block_dropout"),
)
_NAME = re.compile(
    r"blocks\.[0-9]+\.((cross_)?attention_layer\.W_[QKVO]\.weight|ffn\.lin_[12]\.(weight|bias)|norm_[123]\.(gamma|beta))"
)
_INSIDE = "decoder."  # what stands before the names of the stack inside a token model
_TOKEN_SETTINGS = ("padding_idx", "max_len", "embed_dropout")
_TOKEN_NAMES = {"embed.weight", "unembed.weight", "unembed.bias"}
_BUFFERS = {"mask", "pos.pe"}  # which PyTorch makes anew


def detect(tensors: Tensors) -> str | None:
    """Why the tensors are a stack; None if they are not."""
    return _detect_stack(tensors, "")


def _detect_stack(tensors: Tensors, prefix: str) -> str | None:
    names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
    if not names or not all(_NAME.fullmatch(name) for name in names):
        return None
    if "blocks.0.attention_layer.W_Q.weight" not in names or "blocks.0.norm_1.gamma" not in names:
        return None
    return f"{prefix}blocks.N.attention_layer.W_Q and blocks.N.norm_1.gamma, and such names alone"


def config(values: Mapping[str, Any], tensors: Tensors) -> StackConfig:
    """The configuration that the settings and the shapes mean. ValueError names what is missing."""
    return _stack_config(values, tensors, "")


def _stack_config(values: Mapping[str, Any], tensors: Tensors, prefix: str) -> StackConfig:
    heads = values.get("num_heads")
    if type(heads) is not int or heads < 1:
        raise ValueError(f"num_heads must be set to how many heads there are, from 1, got {heads!r:.80}")

    def shape(name: str) -> tuple[int, ...]:
        found = tensors.get(f"{prefix}blocks.0.{name}.weight")
        if found is None or found.ndim != 2:
            raise ValueError(
                f"{prefix}blocks.0.{name}.weight must be a matrix, got {None if found is None else found.shape}"
            )
        return found.shape

    (rows, model_dim), (hidden_dim, _) = shape("attention_layer.W_Q"), shape("ffn.lin_1")
    if rows % heads:
        raise ValueError(f"num_heads must divide the rows of W_Q, {rows}, got {heads}")
    found = {"model_dim": model_dim, "key_dim": rows // heads, "hidden_dim": hidden_dim}
    if f"{prefix}blocks.0.cross_attention_layer.W_K.weight" in tensors:
        found["enc_out_dim"] = shape("cross_attention_layer.W_K")[1]
    count = {name.removeprefix(prefix).split(".")[1] for name in tensors if name.startswith(f"{prefix}blocks.")}
    defaults = {"norm": "unbiased", "norm_eps": 1e-6, "num_stack": len(count)}
    return StackConfig.from_dict({**defaults, **found, **values})


def rules(config: StackConfig | None = None, names: Collection[str] = ()) -> list[Rule]:
    """The table of all blocks."""
    table = [
        Rule(f"blocks.{{i}}.{theirs}.W_{letter}.weight", f"blocks.{{i}}.{ours}.{name}_proj.weight")
        for theirs, ours in _PARTS.items()
        for letter, name in _LETTERS.items()
    ]
    leaf, place = "{leaf:weight|bias}", "blocks.{i}"
    table.append(Rule(f"{place}.ffn.lin_{{n:1|2}}.{leaf}", f"{place}.mlp.linear{{n}}.{leaf}"))
    for theirs, ours in (("gamma", "weight"), ("beta", "bias")):
        table.append(Rule(f"{place}.norm_{{n:1|2|3}}.{theirs}", f"{place}.norm_{{n}}.{ours}"))
    return table


def original(config: StackConfig) -> dict[str, Any]:
    """The settings that mean the configuration."""
    return {name: value for name, value in config.to_dict().items() if name in _SETTINGS}


STACK = Converter("scratch", "scratch", config, rules, original, detect=detect)


def _detect_tokens(tensors: Tensors) -> str | None:
    if not tensors.keys() >= _TOKEN_NAMES:
        return None
    found = _detect_stack(tensors, _INSIDE)
    others = {name for name in tensors if not name.startswith(_INSIDE)} - _TOKEN_NAMES - _BUFFERS
    return None if found is None or others else f"embed and unembed beside {found}"


def _token_config(values: Mapping[str, Any], tensors: Tensors) -> EncoderDecoderConfig:
    own = {name: value for name, value in values.items() if name in _TOKEN_SETTINGS}
    if "pos.pe" in tensors and tensors["pos.pe"].ndim:
        own.setdefault("max_len", tensors["pos.pe"].shape[0])
    stack = {"causal": True, **{name: value for name, value in values.items() if name not in _TOKEN_SETTINGS}}
    shape = tensors["embed.weight"].shape
    if len(shape) != 2:
        raise ValueError(f"embed.weight must be a matrix, got {shape}")
    return EncoderDecoderConfig(shape[0], _stack_config(stack, tensors, _INSIDE), **own)


def _token_rules(config: EncoderDecoderConfig, names: Collection[str] = ()) -> list[Rule]:
    return [
        Rule("embed.weight", "embed.weight"),
        Rule("unembed.{leaf:weight|bias}", "unembed.{leaf}"),
        *prefixed(rules(), _INSIDE),
        Rule("mask", None),
        Rule("pos.pe", None),
    ]


def _token_settings(config: EncoderDecoderConfig) -> dict[str, Any]:
    own = {name: value for name, value in config.to_dict().items() if name in _TOKEN_SETTINGS}
    return {**original(config.stack), **own}


ENCODER_DECODER = Converter(
    "scratch_model", "scratch_encoder_decoder", _token_config, _token_rules, _token_settings, detect=_detect_tokens
)
CONVERTERS = (STACK, ENCODER_DECODER)
