"""The mixture of experts, token by token."""

from typing import Any

import numpy as np

from . import kernels
from .layers import Params, gated_feed_forward, linear, sub


def moe(params: Params, config: Any, x: np.ndarray) -> np.ndarray:
    """x (..., D) -> the same."""
    tokens = x.reshape(-1, x.shape[-1])
    activation = getattr(kernels, config.activation)
    out = np.zeros_like(tokens)
    for t, token in enumerate(tokens):
        logits = linear(sub(params, "router"), token)
        chances = np.exp(logits - logits.max())
        chances = chances / chances.sum()
        best = np.argsort(-chances, kind="stable")[: config.num_experts_per_tok]
        total = chances[best].sum() if config.renormalizes else np.asarray(1, x.dtype)
        for e in best:
            own = {name: w[e] for name, w in sub(params, "experts").items()}
            out[t] += chances[e] / total * gated_feed_forward(own, token[None], activation=activation)[0]
        if config.shared_dim:
            y = gated_feed_forward(sub(params, "shared_expert"), token[None], activation=activation)[0]
            if config.shared_gate:
                y = y / (1 + np.exp(-linear(sub(params, "shared_expert_gate"), token)))
            out[t] += y
    return out.reshape(x.shape)
