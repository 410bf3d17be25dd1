"""BERT, step by step. Axes: B batch, L tokens, E embed_dim.

The tables may have a narrower dtype than the norm of the embeddings, which sets that of the result.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np

from ..nn.layers import Params, layer_norm, linear, sub
from ..nn.transformer import layer


def embed(params: Params, config: Any, tokens: np.ndarray, token_types: np.ndarray | None = None) -> np.ndarray:
    """tokens and their segments, (B, L) each -> (B, L, E)."""
    params = sub(params, "embeddings")
    x = params["word_embeddings.weight"][tokens].astype(params["norm.weight"].dtype)
    for place in range(tokens.shape[1]):
        x[:, place] += params["position_embeddings.weight"][place]
    kinds = np.zeros_like(tokens) if token_types is None else token_types
    x = x + params["token_type_embeddings.weight"][kinds]
    return layer_norm(sub(params, "norm"), x, config.norm_eps)


def layer_config(config: Any) -> Any:
    """The fields of a layer that nn.transformer.layer reads."""
    plain = {"num_kv_heads": None, "scale": None, "window": None, "moe": None, "gated": False, "norm": "layer"}
    plain |= {"causal": False, "cross": False, "norm_first": False}
    own = {"num_heads": config.num_heads, "activation": config.activation, "norm_eps": config.norm_eps}
    return SimpleNamespace(**plain, **own)


def encode(params: Params, config: Any, x: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """All but the embeddings: (B, L, E) -> the same. mask (B, L): True = valid."""
    for index in range(config.num_layers):
        seen = None if mask is None else mask[:, None, None]
        x = layer(sub(params, f"encoder.layers.{index}"), layer_config(config), x, mask=seen)
    return x


def bert(
    params: Params,
    config: Any,
    tokens: np.ndarray,
    *,
    mask: np.ndarray | None = None,
    token_types: np.ndarray | None = None,
) -> np.ndarray:
    """tokens (B, L) -> (B, L, E)."""
    return encode(params, config, embed(params, config, tokens, token_types), mask)


def pool(params: Params, hidden: np.ndarray) -> np.ndarray:
    """(B, L, E) -> (B, E), of the first token."""
    return np.tanh(linear(sub(params, "pooler"), hidden[:, 0]))


def pool_mean(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(B, L, E) and (B, L) -> (B, E): one text after the other."""
    rows = [text[valid].mean(axis=0) if valid.any() else text[0] * 0 for text, valid in zip(hidden, mask, strict=True)]
    return np.stack(rows)


def normalize(x: np.ndarray) -> np.ndarray:
    """(B, E) to length 1."""
    return np.stack([row / max(np.sqrt(np.sum(row * row)), 1e-12) for row in x])
