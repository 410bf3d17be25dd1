"""Attention, head by head. Axes: B batch, H heads, L queries, S keys, D and Dv head widths, E embed_dim."""

import math

import numpy as np

from .layers import Params, linear, sub
from .masks import causal_mask


def _check(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None, causal: bool) -> None:
    (_, H, L, D), (_, Hkv, S, _) = q.shape, k.shape
    if H % Hkv:
        raise ValueError(f"query heads must be a multiple of key/value heads, got {H} and {Hkv}")
    if k.shape[-1] != D or v.shape[:3] != k.shape[:3] or k.shape[0] != q.shape[0]:
        raise ValueError(f"q, k and v must fit together, got {q.shape}, {k.shape} and {v.shape}")
    if mask is not None and mask.dtype != np.bool_:
        raise ValueError(f"mask must be boolean, got {mask.dtype}")
    if causal and L > S:
        raise ValueError(f"causal queries must be at most as many as keys, got {L} and {S}")


def _head(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, visible: np.ndarray, bias) -> np.ndarray:
    """One head: q (L, D), k (S, D), v (S, Dv), visible (L, S), bias (L, S) or None -> (L, Dv)."""
    scores = (q * scale) @ k.T  # (L, S)
    if bias is not None:
        scores = scores + bias
    scores = np.where(visible, scores, -np.inf).astype(q.dtype, copy=False)
    top = np.max(scores, axis=-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isneginf(top), 0, top))  # a row that sees nothing: all 0
    total = np.sum(weights, axis=-1, keepdims=True)
    return (weights @ v) / np.where(total == 0, 1, total)


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    scale: float | None = None,
    mask: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    causal: bool = False,
) -> np.ndarray:
    """softmax(scale q k^T + bias) v over the keys that mask and causal leave; a row without keys gives 0.

    q (B, H, L, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv) -> (B, H, L, Dv); query head h uses key/value head
    h // (H // Hkv). `mask` (boolean, True = attend) and `bias` (float) broadcast to (B, H, L, S); `causal`
    takes the queries as the last L of the S positions. `scale` is D ** -0.5 by default.
    """
    _check(q, k, v, mask, causal)
    (B, H, L, D), (_, Hkv, S, Dv) = q.shape, v.shape
    scale = 1.0 / math.sqrt(D) if scale is None else float(scale)
    visible = causal_mask(L, S) if causal else np.ones((L, S), dtype=bool)
    visible = np.broadcast_to(visible if mask is None else visible & mask, (B, H, L, S))
    if bias is not None:
        bias = np.broadcast_to(bias.astype(q.dtype, copy=False), (B, H, L, S))

    out = np.zeros((B, H, L, Dv), dtype=q.dtype)
    if S == 0:
        return out
    for b in range(B):
        for h in range(H):
            g = h // (H // Hkv)
            head_bias = None if bias is None else bias[b, h]
            out[b, h] = _head(q[b, h], k[b, g], v[b, g], scale, visible[b, h], head_bias)
    return out


def attention_layer(
    params: Params,
    x: np.ndarray,
    source: np.ndarray | None = None,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    mask: np.ndarray | None = None,
    causal: bool = False,
) -> np.ndarray:
    """Project, attend, project back: x (B, L, E), source (B, S, E) or x itself -> (B, L, E).

    Parameters: q_proj, k_proj, v_proj and out_proj, each a weight and an optional bias.
    """
    source = x if source is None else source
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads

    def heads(name: str, y: np.ndarray, count: int) -> np.ndarray:
        y = linear(sub(params, name), y)  # (B, L, count D)
        return y.reshape(*y.shape[:2], count, -1).transpose(0, 2, 1, 3)  # (B, count, L, D)

    q = heads("q_proj", x, num_heads)
    k = heads("k_proj", source, num_kv_heads)
    v = heads("v_proj", source, num_kv_heads)
    out = attention(q, k, v, mask=mask, causal=causal)  # (B, H, L, D)
    out = out.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1)  # (B, L, H D)
    return linear(sub(params, "out_proj"), out)
