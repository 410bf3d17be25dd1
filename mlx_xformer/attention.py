"""attention(), the maths, and Attention, its projections: one core for every head grouping, mask and source.

Axes: B batch, H query heads, G key/value heads, L queries, S keys, D head_dim, E embed_dim.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from .kernels import unmasked_attention
from .masks import causal_mask


def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float | None = None,
    mask: mx.array | None = None,
    bias: mx.array | None = None,
    causal: bool = False,
) -> mx.array:
    """softmax(q k^T * scale + bias) v over the keys that `mask` allows.

    q (B, H, L, D), k (B, G, S, D), v (B, G, S, Dv) -> (B, H, L, Dv); G divides H, and query head h reads key/value
    head h // (H // G). `mask` is boolean, True = attend, and `bias` is an additive float; both broadcast to
    (B, H, L, S). `causal` takes the queries as the last L of the S positions. A row that may attend nothing gives 0,
    with gradient 0. `scale` defaults to 1 / sqrt(D).
    """
    _check(q, k, v, mask, bias, causal)
    L, S = q.shape[2], k.shape[2]
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    if S == 0:
        return mx.zeros((*q.shape[:3], v.shape[-1]), q.dtype)
    if mask is None and bias is None and not causal:
        return unmasked_attention(q, k, v, scale)
    if mask is None and bias is None:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")
    if causal:
        allowed = causal_mask(L, S)
        mask = allowed if mask is None else mask & allowed
    if bias is not None:
        bias = bias.astype(q.dtype)  # in half precision -1e9 becomes -inf, and so does what it blocks
        open_ = bias != -mx.inf
        mask = open_ if mask is None else mask & open_
        bias = mx.where(open_, bias, mx.array(0, q.dtype))
    assert mask is not None  # for the type checker: one of the three was given
    mask = mask.reshape(1) if mask.ndim == 0 else mask
    some = mx.any(mask, axis=-1, keepdims=True)
    # A row without a key attends to all of them, so that it stays finite, and is then set to 0.
    mask = mask | ~some
    if bias is not None:
        mask = mx.where(mask, bias, mx.array(-mx.inf, q.dtype))
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    return mx.where(some, out, mx.array(0, out.dtype))


def _check(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None, bias: mx.array | None, causal: bool) -> None:
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.ndim != 4:
            raise ValueError(f"{name} must be (batch, heads, length, dim), got shape {array.shape}")
        if array.shape[0] != q.shape[0]:
            raise ValueError(f"{name} must have the batch size of q, {q.shape[0]}, got {array.shape[0]}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k must have the head_dim of q, {q.shape[-1]}, got {k.shape[-1]}")
    if v.shape[1:3] != k.shape[1:3]:
        raise ValueError(f"v must have the heads and length of k, {k.shape[1:3]}, got {v.shape[1:3]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"num_kv_heads must divide num_heads, {q.shape[1]}, got {k.shape[1]}")
    if causal and q.shape[2] > k.shape[2]:
        raise ValueError(f"causal needs at most as many queries as keys, {k.shape[2]}, got {q.shape[2]}")
    scores = (*q.shape[:3], k.shape[2])
    if mask is not None and mask.dtype != mx.bool_:
        raise ValueError(f"mask must be boolean (True = attend; an additive float is `bias`), got {mask.dtype}")
    if bias is not None and not mx.issubdtype(bias.dtype, mx.floating):
        raise ValueError(f"bias must be a float (a boolean mask is `mask`), got {bias.dtype}")
    for name, extra in (("mask", mask), ("bias", bias)):
        if extra is not None and not _broadcasts(extra.shape, scores):
            raise ValueError(f"{name} must broadcast to (batch, heads, L, S) = {scores}, got shape {extra.shape}")


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    return len(shape) <= len(target) and all(
        a in (1, b) for a, b in zip(reversed(shape), reversed(target), strict=False)
    )


class Attention(nn.Module):
    """Multi-head attention: q_proj, k_proj, v_proj, attention(), out_proj.

    Self-attention of x (B, L, E), or cross-attention from x to a source (B, S, kv_dim); both give (B, L, E). Without a
    batch axis in x and source, the result has none either.
    num_kv_heads = num_heads is multi-head, 1 multi-query, anything between grouped-query attention.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        kv_dim: int | None = None,
        bias: bool = True,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        kv_dim = embed_dim if kv_dim is None else kv_dim
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, {num_heads}, got {embed_dim}")
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads, {num_heads}, got {num_kv_heads}")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = embed_dim // num_heads
        self.scale = 1 / math.sqrt(self.head_dim)
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.k_proj = nn.Linear(kv_dim, num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(kv_dim, num_kv_heads * self.head_dim, bias=bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)

    def __call__(
        self,
        x: mx.array,
        source: mx.array | None = None,
        *,
        mask: mx.array | None = None,
        causal: bool = False,
    ) -> mx.array:
        source = x if source is None else source
        if x.ndim == 2:
            return self(x[None], source[None], mask=mask, causal=causal)[0]
        q = _heads(self.q_proj(x), self.num_heads)
        k = _heads(self.k_proj(source), self.num_kv_heads)
        v = _heads(self.v_proj(source), self.num_kv_heads)
        out = attention(q, k, v, scale=self.scale, mask=mask, causal=causal)
        return self.out_proj(mx.flatten(out.swapaxes(1, 2), 2, 3))  # (B, H, L, D) -> (B, L, E)


def _heads(x: mx.array, heads: int) -> mx.array:
    """(B, L, heads * D) -> (B, heads, L, D)"""
    return mx.unflatten(x, -1, (heads, x.shape[-1] // heads)).swapaxes(1, 2)
