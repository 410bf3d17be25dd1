"""The attention layer of ferrotorch. Axes: B batch, L positions, E embed_dim."""

from typing import Any

import numpy as np

from ...nn import attention
from ...nn.layers import Params


def attention_layer(params: Params, config: Any, x: np.ndarray) -> np.ndarray:
    """Self-attention by a configuration: x (B, L, E) -> the same shape."""
    heads: dict[str, Any] = {"num_heads": config.num_heads, "num_kv_heads": config.num_kv_heads}
    return attention.attention_layer(params, x, **heads, causal=config.causal)
