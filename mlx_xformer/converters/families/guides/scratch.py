"""The stack of a transformer from scratch, under its author's names (W_Q, lin_1, gamma, ...), into TransformerStack.

Source: yucoder14/guitar_effects, transformer_fun.ipynb. The file tells widths and how many blocks there are; settings
tell num_heads and, where they are not as there, causal, norm_eps and the dropouts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from ....models.guides.scratch import StackConfig
from ...rules import Rule

FAMILY = "scratch"
MODEL_TYPES: tuple[str, ...] = ()
Tensors = Mapping[str, mx.array]
_PARTS = {"attention_layer": "self_attn", "cross_attention_layer": "cross_attn"}
_LETTERS = {"Q": "q", "K": "k", "V": "v", "O": "out"}
_OWN = (
    *("num_heads", "causal", "norm", "norm_eps", "dropout_at", "score_dropout"),
    *("attention_dropout", "ffn_dropout", "block_dropout"),
)
_NAME = re.compile(
    r"blocks\.[0-9]+\.((cross_)?attention_layer\.W_[QKVO]\.weight|ffn\.lin_[12]\.(weight|bias)|norm_[123]\.(gamma|beta))"
)


def block_rules() -> list[Rule]:
    """The table of all blocks."""
    rules = [
        Rule(f"blocks.{{i}}.{theirs}.W_{letter}.weight", f"blocks.{{i}}.{ours}.{name}_proj.weight")
        for theirs, ours in _PARTS.items()
        for letter, name in _LETTERS.items()
    ]
    leaf, place = "{leaf:weight|bias}", "blocks.{i}"
    rules.append(Rule(f"{place}.ffn.lin_{{n:1|2}}.{leaf}", f"{place}.mlp.linear{{n}}.{leaf}"))
    for theirs, ours in (("gamma", "weight"), ("beta", "bias")):
        rules.append(Rule(f"{place}.norm_{{n:1|2|3}}.{theirs}", f"{place}.norm_{{n}}.{ours}"))
    return rules


def why(tensors: Tensors, prefix: str = "") -> str | None:
    """Why the tensors below a prefix are such a stack; None if they are not."""
    names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
    if not names or not all(_NAME.fullmatch(name) for name in names):
        return None
    if "blocks.0.attention_layer.W_Q.weight" not in names or "blocks.0.norm_1.gamma" not in names:
        return None
    return f"{prefix}blocks.N.attention_layer.W_Q and blocks.N.norm_1.gamma, and such names alone"


def stack_config(values: Mapping[str, Any], tensors: Tensors, prefix: str = "") -> StackConfig:
    """What the shapes below a prefix and the settings mean. ValueError names what lacks."""
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


def detect(tensors: Tensors) -> str | None:
    """See networks.Kind."""
    return why(tensors)


def config(values: Mapping[str, Any], tensors: Tensors) -> StackConfig:
    """See networks.Kind."""
    return stack_config(values, tensors)


def rules(config: Any, names: Tensors) -> list[Rule]:
    """See networks.Kind."""
    return block_rules()


def original(config: StackConfig) -> dict[str, Any]:
    """See networks.Kind."""
    return {name: value for name, value in config.to_dict().items() if name in _OWN}
