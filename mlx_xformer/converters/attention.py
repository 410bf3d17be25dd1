"""Attention layers of other libraries, into and out of Attention and torch_layout.MultiheadAttention."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .rules import Rule, apply_rules, inverse_shapes, invert, prefixed

_KINDS = "{kind:weight|bias}"


def _renamed(*names: str) -> list[Rule]:
    """The names of the query, key, value and output projections."""
    ours = ("q_proj", "k_proj", "v_proj", "out_proj")
    return [Rule(f"{theirs}.{_KINDS}", f"{name}.{_KINDS}") for theirs, name in zip(names, ours, strict=True)]


_BOTH = [Rule(f"out_proj.{_KINDS}", f"out_proj.{_KINDS}"), Rule("bias_{kv:k|v}", "bias_{kv:k|v}")]
_BIASES = Rule("in_proj_bias", ("q_proj.bias", "k_proj.bias", "v_proj.bias"))
LAYOUTS: dict[str, list[Rule]] = {
    # torch.nn.MultiheadAttention: rows of q, k and v in one; apart where key or value have a width of their own
    "pytorch": [Rule("in_proj_weight", ("q_proj.weight", "k_proj.weight", "v_proj.weight")), _BIASES, *_BOTH],
    "pytorch-split": [Rule("{part:q|k|v}_proj_weight", "{part:q|k|v}_proj.weight"), _BIASES, *_BOTH],
    "mlx": _renamed("query_proj", "key_proj", "value_proj", "out_proj"),  # mlx.nn.MultiHeadAttention
    "plain": _renamed("q_proj", "k_proj", "v_proj", "out_proj"),  # as here: ferrotorch, llm_prep, Hugging Face
    "W": _renamed("W_q", "W_k", "W_v", "W_o"),
    "scratch": _renamed("W_Q", "W_K", "W_V", "W_O"),  # guitar_effects' transformer from scratch
}


def load_attention(module: nn.Module, tensors: Mapping[str, mx.array], layout: str, *, prefix: str = "") -> None:
    """Gives `module` the tensors of a layout, all of them and no others; they keep their dtype.

    prefix: what stands before every name. ValueError lists what is missing, unknown or misshapen, with both shapes.
    """
    expected = {prefix + name: x.shape for name, x in dict(tree_flatten(module.parameters())).items()}
    made = apply_rules(prefixed(_rules(layout), prefix), tensors, expected)
    module.load_weights([(name.removeprefix(prefix), x) for name, x in made.items()], strict=True)


def attention_state(module: nn.Module, layout: str, *, prefix: str = "") -> dict[str, mx.array]:
    """The parameters of `module` under the names and in the shapes of a layout: load_attention's inverse."""
    rules = _rules(layout)
    weights = dict(tree_flatten(module.parameters()))
    shapes = inverse_shapes(rules, {name: x.shape for name, x in weights.items()})
    return {prefix + name: x for name, x in apply_rules(invert(rules), weights, shapes).items()}


def _rules(layout: str) -> list[Rule]:
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    return LAYOUTS[layout]
