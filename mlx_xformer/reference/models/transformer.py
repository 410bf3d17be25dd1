"""The Transformer, step by step. `config` has the fields of models.transformer.TransformerConfig.

Axes: B batch, L target positions, S source positions, E embed_dim, V vocabulary.
"""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..nn.layers import Params, linear, sub
from ..nn.positions import sinusoidal
from ..nn.transformer import stack


def layer_config(config: Any, *, decoder: bool) -> SimpleNamespace:
    """The fields of a layer that nn.transformer.layer reads."""
    return SimpleNamespace(
        num_heads=config.num_heads,
        num_kv_heads=None,
        scale=None,
        causal=decoder,
        window=None,
        cross=decoder,
        **{"norm": "layer", "norm_eps": config.norm_eps, "norm_first": config.norm_first},
        **{"gated": False, "activation": config.activation, "moe": None},
    )


def embedded(params: Params, config: Any, side: str, x: np.ndarray) -> np.ndarray:
    """Tokens (B, L) -> (B, L, E): rows of the table times sqrt(E), and their positions. Vectors stay as they are."""
    if config.vocab_size is None:
        return x
    table = params["embed.weight" if config.tie_embeddings else f"{side}_embed.weight"]
    y = table[x] * np.asarray(math.sqrt(config.embed_dim), table.dtype)
    return y + sinusoidal(*y.shape[1:]).astype(y.dtype)


def encode(params: Params, config: Any, source: np.ndarray, *, source_mask: np.ndarray | None = None) -> np.ndarray:
    """source (B, S) or (B, S, E) -> the memory (B, S, E)."""
    seen = None if source_mask is None else source_mask[:, None, None]
    x = embedded(params, config, "source", source)
    return stack(sub(params, "encoder"), layer_config(config, decoder=False), x, mask=seen)


def decode(
    params: Params,
    config: Any,
    target: np.ndarray,
    memory: np.ndarray,
    *,
    memory_mask: np.ndarray | None = None,
    target_mask: np.ndarray | None = None,
) -> np.ndarray:
    """target (B, L) or (B, L, E), memory (B, S, E) -> logits (B, L, V) or vectors (B, L, E)."""
    masks = [None if mask is None else mask[:, None, None] for mask in (target_mask, memory_mask)]
    x = embedded(params, config, "target", target)
    x = stack(
        sub(params, "decoder"), layer_config(config, decoder=True), x, memory, mask=masks[0], memory_mask=masks[1]
    )
    if config.vocab_size is None:
        return x
    return linear(sub(params, "embed" if config.tie_embeddings else "lm_head"), x)


def transformer(
    params: Params,
    config: Any,
    source: np.ndarray,
    target: np.ndarray,
    *,
    source_mask: np.ndarray | None = None,
    target_mask: np.ndarray | None = None,
) -> np.ndarray:
    """source and target to the logits of what follows each position of the target, or to vectors."""
    memory = encode(params, config, source, source_mask=source_mask)
    return decode(params, config, target, memory, memory_mask=source_mask, target_mask=target_mask)
