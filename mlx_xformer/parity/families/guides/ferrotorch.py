"""The attention layer of ferrotorch with its own weights.

Axes: B batch, L positions, E embed_dim.
"""

from __future__ import annotations

import mlx.nn as nn
import numpy as np

from ....models.guides.ferrotorch import AttentionLayer, AttentionLayerConfig
from ....reference.models.guides import ferrotorch as twin
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
    config = model.layer_config  # the attention module's own might be made of it wrongly

    def theirs(params: Arrays, arrays: Arrays, _: Options) -> np.ndarray:
        return twin.attention_layer(params, config, arrays["x"])

    return {"attention": layer_case(model, theirs, [{"x": (2, L, config.embed_dim)} for L in _LENGTHS])}
