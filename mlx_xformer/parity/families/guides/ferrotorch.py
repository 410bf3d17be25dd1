"""The attention layer of ferrotorch with its own weights.

Axes: B batch, L positions, E embed_dim.
"""

from __future__ import annotations

from typing import Any

import mlx.nn as nn
import numpy as np

from ....models.guides.ferrotorch import AttentionLayer, AttentionLayerConfig
from ....reference.nn.attention import attention_layer
from ...samples import Arrays, Case, Options
from ..common import CHUNKS, layer_case

_LENGTHS = (3, sum(CHUNKS))


def examples() -> dict[str, nn.Module]:
    """Small models by what they are."""
    return {
        "multi-head": AttentionLayer(AttentionLayerConfig(18, 6)),
        "grouped, causal": AttentionLayer(AttentionLayerConfig(18, 6, num_kv_heads=2, bias=False, causal=True)),
        "multi-query": AttentionLayer(AttentionLayerConfig(18, 6, num_kv_heads=1)),
    }


def cases(model: AttentionLayer) -> dict[str, Case]:
    """A case for the layer."""
    config = model.config
    heads: dict[str, Any] = {"num_heads": config.num_heads, "num_kv_heads": config.kv_heads, "causal": config.causal}

    def theirs(params: Arrays, arrays: Arrays, _: Options) -> np.ndarray:
        return attention_layer(params, arrays["x"], **heads)

    return {"attention": layer_case(model, theirs, [{"x": (2, L, config.embed_dim)} for L in _LENGTHS])}
