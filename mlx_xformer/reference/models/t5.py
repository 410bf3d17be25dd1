"""T5, step by step. Axes: B batch, S tokens of the text, L of the answer, H heads, E embed_dim, V vocab_size."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from ..nn.layers import Params, linear, sub
from ..nn.positions import relative_buckets
from ..nn.transformer import stack


def layer_config(config: Any, *, decoder: bool) -> Any:
    """The fields of a layer that nn.transformer.layer reads."""
    plain = {"num_kv_heads": None, "scale": 1.0, "window": None, "moe": None, "norm": "rms", "norm_first": True}
    own = {"num_heads": config.num_heads, "activation": config.activation, "gated": config.gated}
    return SimpleNamespace(**plain, **own, norm_eps=config.norm_eps, causal=decoder, cross=decoder)


def bias(params: Params, config: Any, length: int, *, bidirectional: bool) -> np.ndarray:
    """What a side adds to its scores, (H, L, L), by `relative.weight` (buckets, H)."""
    sizes = {"num_buckets": config.num_buckets, "max_distance": config.max_distance}
    table, buckets = params["relative.weight"], relative_buckets(length, length, **sizes, bidirectional=bidirectional)
    out = np.zeros((config.num_heads, length, length), table.dtype)
    for i in range(length):
        for j in range(length):
            out[:, i, j] = table[buckets[i, j]]
    return out


def encode(params: Params, config: Any, x: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Embedded tokens of the text (B, S, E) -> the memory; mask (B, S), True = valid."""
    own = sub(params, "encoder")
    added = bias(own, config, x.shape[1], bidirectional=True)
    seen = None if mask is None else mask[:, None, None]
    return stack(sub(own, "stack"), layer_config(config, decoder=False), x, mask=seen, bias=added)


def decode(
    params: Params, config: Any, x: np.ndarray, memory: np.ndarray, memory_mask: np.ndarray | None = None
) -> np.ndarray:
    """Embedded tokens of the answer (B, L, E) and the memory -> what the head takes, (B, L, E)."""
    own = sub(params, "decoder")
    added = bias(own, config, x.shape[1], bidirectional=False)
    seen = None if memory_mask is None else memory_mask[:, None, None]
    return stack(sub(own, "stack"), layer_config(config, decoder=True), x, memory, memory_mask=seen, bias=added)


def logits(params: Params, config: Any, x: np.ndarray) -> np.ndarray:
    """(B, L, E) -> (B, L, V)."""
    if config.scale_logits:
        x = x / np.sqrt(np.asarray(config.embed_dim, x.dtype))
    return linear(sub(params, "shared" if config.tie_embeddings else "lm_head"), x)


def t5(
    params: Params, config: Any, source: np.ndarray, tokens: np.ndarray, *, mask: np.ndarray | None = None
) -> np.ndarray:
    """source (B, S), tokens (B, L) -> logits (B, L, V)."""
    table = params["shared.weight"]
    memory = encode(params, config, table[source], mask)
    return logits(params, config, decode(params, config, table[tokens], memory, mask))
