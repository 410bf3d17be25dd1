"""An attention layer alone, under ferrotorch's names, which are the names here.

They are {q,k,v,out}_proj.weight and, all or none, .bias. Settings give num_heads and, for a causal layer, causal.

Source: ferrotorch-nn, MultiheadAttention::named_parameters, with grouped queries or without.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ....models.guides.ferrotorch import AttentionLayerConfig
from ...converter import Converter
from ...rules import Rule
from ...stored import Tensors

_WEIGHTS, _BIASES = ({f"{name}_proj.{leaf}" for name in ("q", "k", "v", "out")} for leaf in ("weight", "bias"))


def detect(tensors: Tensors) -> str | None:
    """Why the tensors are an attention layer; None if they are not."""
    bias = tensors.keys() == _WEIGHTS | _BIASES
    if not bias and tensors.keys() != _WEIGHTS:
        return None
    return f"q_proj, k_proj, v_proj and out_proj, {'each with' if bias else 'without'} a bias, and nothing else"


def config(values: Mapping[str, Any], tensors: Tensors) -> AttentionLayerConfig:
    """The configuration that the settings and the shapes mean. ValueError names what is missing."""
    heads = values.get("num_heads")
    if type(heads) is not int or heads < 1:
        raise ValueError(f"num_heads must be set to how many heads there are, from 1, got {heads!r:.80}")
    rows, columns = (tensors[f"{name}_proj.weight"].shape for name in "kq")
    if len(rows) != 2 or len(columns) != 2:
        raise ValueError(f"q_proj.weight and k_proj.weight must be matrices, got {columns} and {rows}")
    embed_dim = columns[1]
    if not embed_dim or embed_dim % heads:
        raise ValueError(f"num_heads must divide the columns of q_proj.weight, {embed_dim}, got {heads}")
    width = embed_dim // heads
    if rows[0] % width:
        raise ValueError(f"the rows of k_proj.weight must be a multiple of a head's {width}, got {rows[0]}")
    found = {"embed_dim": embed_dim, "num_kv_heads": rows[0] // width, "bias": "q_proj.bias" in tensors}
    return AttentionLayerConfig.from_dict({**found, **values})


def rules(config: Any, names: Collection[str] = ()) -> list[Rule]:
    """The table from ferrotorch's names."""
    part, leaf = "{part:q|k|v|out}", "{leaf:weight|bias}"
    return [Rule(f"{part}_proj.{leaf}", f"{part}_proj.{leaf}")]


def original(config: AttentionLayerConfig) -> dict[str, Any]:
    """The settings that mean the configuration."""
    return {"num_heads": config.num_heads, "causal": config.causal}


CONVERTERS = (Converter("ferrotorch", "ferrotorch", config, rules, original, detect=detect),)
