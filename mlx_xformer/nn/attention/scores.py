"""The scores of attention(): which are hidden, what is added to them, and what a softmax makes of them.

Axes: B batch, H query heads, G key/value heads, L queries, S keys, D head_dim, Dv value_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx

from ...backend import activations
from ..cache import KeysOrValues, Quantized

_FLOAT16_MAX = 65504.0
Parts = tuple[mx.array, mx.array, mx.array]


@dataclass(frozen=True)
class Block:
    """A block of scores: which are allowed (None: all), what is added (None: nothing), whether every query is known to
    see a key, and whether the queries are the last of its keys, with nothing hidden but what comes after each."""

    allowed: mx.array | None
    bias: mx.array | None
    safe: bool
    causal: bool = False


@dataclass(frozen=True)
class Hidden:
    """What of the (L, S) scores is hidden or shifted, and by what."""

    L: int
    S: int
    mask: mx.array | None
    bias: mx.array | None
    causal: bool
    window: int | None
    by_distance: mx.array | None = None

    @property
    def nothing(self) -> bool:
        """Whether all keys are visible to all queries, with nothing added."""
        shifted = self.bias is not None or self.by_distance is not None
        return self.mask is None and not shifted and not self.causal and self.window is None

    def keys(self, rows: range) -> range:
        """The keys that any of the queries `rows` may see."""
        first, last = (row + self.S - self.L for row in (rows.start, rows.stop - 1))  # as positions
        start = 0 if self.window is None else max(0, first - self.window + 1)
        stop = self.S if self.window is None else min(self.S, last + self.window)
        return range(start, min(stop, last + 1) if self.causal else stop)

    def block(self, rows: range, keys: range) -> Block:
        """A block of it."""
        allowed, bias = self._band(rows, keys), None
        if self.mask is not None:
            part = part_of(self.mask, rows, keys)
            allowed = part if allowed is None else part & allowed
        if self.bias is not None:
            bias = part_of(self.bias, rows, keys)
            open_ = bias != -mx.inf
            allowed = open_ if allowed is None else allowed & open_
            bias = mx.where(open_, bias, mx.array(0, bias.dtype))
        safe = self.mask is None and self.bias is None
        if self.by_distance is not None:
            ahead = mx.arange(keys.start, keys.stop)[None] - mx.arange(rows.start, rows.stop)[:, None]  # and S - L more
            part = mx.take(self.by_distance, ahead + (self.L - 1), axis=1)  # (H, rows, keys)
            bias = part if bias is None else bias + part
        behind = rows.stop - 1 + self.S - self.L - keys.start  # how far the first key is behind the last query
        near = self.window is None or behind < self.window
        return Block(allowed, bias, safe, safe and bias is None and self.causal and near and allowed is not None)

    def _band(self, rows: range, keys: range) -> mx.array | None:
        """What causal and window leave of a block, (rows, keys); None for all of it."""
        shift = self.S - self.L
        ahead = keys.stop - 1 - (rows.start + shift)  # how far the last key is ahead of the first query
        behind = rows.stop - 1 + shift - keys.start
        hides = (self.causal and ahead > 0) or (self.window is not None and max(ahead, behind) >= self.window)
        if not hides:
            return None
        at = mx.arange(rows.start + shift, rows.stop + shift)[:, None] - mx.arange(keys.start, keys.stop)[None]
        allowed = at >= 0 if self.causal else None
        if self.window is not None:
            near = mx.abs(at) < self.window
            allowed = near if allowed is None else allowed & near
        return allowed


def part_of(x: mx.array, rows: range, keys: range) -> mx.array:
    """A block of an array that broadcasts to (B, H, L, S)."""
    x = x if x.ndim >= 2 else x.reshape(1, -1)
    x = x if x.shape[-2] == 1 else x[..., rows.start : rows.stop, :]
    return x if x.shape[-1] == 1 else x[..., keys.start : keys.stop]


@dataclass(frozen=True)
class Softmax:
    """What becomes of the scores."""

    scale: float
    sinks: mx.array | None
    softcap: float | None
    dropout: float

    @property
    def plain(self) -> bool:
        """Whether there is nothing but the scale."""
        return self.sinks is None and self.softcap is None and not self.dropout

    def fused(self, parts: Parts, block: Block, width: int | None = None) -> mx.array:
        """By MLX's function. Rows that see nothing first see all, so that they stay finite, and are then set to 0."""
        (q, k, v), value_dim = parts, parts[2].shape[-1]
        mask: mx.array | str | None = "causal" if block.causal else block.allowed  # by name, kernels skip what it hides
        some = None
        if isinstance(mask, mx.array) and not block.safe:
            some = mx.any(mask, axis=-1, keepdims=True)
            mask = mask | ~some
        if block.bias is not None:
            assert not isinstance(mask, str)  # a block with a bias is not causal by name
            mask = block.bias if mask is None else mx.where(mask, block.bias, mx.array(-mx.inf, q.dtype))
        if width is not None:
            q, k, v = (mx.pad(x, [(0, 0)] * 3 + [(0, width - x.shape[-1])]) for x in parts)
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.scale, mask=mask, sinks=self.sinks)
        out = out if width is None else out[..., :value_dim]
        return out if some is None else mx.where(some, out, mx.array(0, out.dtype))

    def explicit(
        self, parts: tuple[mx.array, KeysOrValues, KeysOrValues], block: Block, key: mx.array | None
    ) -> mx.array:
        """By products, the heads of a group in one; values in floats have a column of ones at their end."""
        q, k, v = parts
        B, G, S, _ = v.shape
        weights, rest = self.weights(q, k, block)
        grouped = weights.reshape(B, G, -1, S)  # (B, G, H / G * L, S)
        if isinstance(v, Quantized):
            out, total = v.weighed(grouped), grouped @ mx.ones((B, G, S, 1))
        elif self.dropout:
            kept = mx.random.bernoulli(1 - self.dropout, grouped.shape, key)
            out, total = (grouped * kept / (1 - self.dropout)) @ v[..., :-1], grouped @ v[..., -1:]
        else:
            out, total = mx.split(grouped @ v, [v.shape[-1] - 1], axis=-1)
        total = total.reshape(*q.shape[:3], 1) + rest
        return narrowed(out.reshape(*q.shape[:3], -1) / filled(total, 0.0, block.safe, 1.0), q.dtype)

    def weights(self, q: mx.array, k: KeysOrValues, block: Block) -> tuple[mx.array, mx.array | float]:
        """Weights (B, H, L, S) in float32, over the largest of each row, and what else belongs to their sum."""
        B, G, S, D = k.shape
        q = q.astype(mx.float32) * self.scale
        grouped = q.reshape(B, G, -1, D)
        scores = k.scores(grouped) if isinstance(k, Quantized) else grouped @ k.astype(mx.float32).swapaxes(-1, -2)
        scores = scores.reshape(*q.shape[:3], S)
        if self.softcap is not None:
            scores = mx.tanh(scores / self.softcap) * self.softcap
        if block.bias is not None:
            scores = scores + block.bias
        if block.allowed is not None:
            scores = mx.where(block.allowed, scores, -mx.inf)
        top = scores.max(axis=-1, keepdims=True)
        sinks = None if self.sinks is None else self.sinks.astype(mx.float32)[:, None, None]
        top = mx.stop_gradient(filled(top if sinks is None else mx.maximum(top, sinks), -mx.inf, block.safe, 0.0))
        weights = activations.exp_below_0(scores - top)
        if block.allowed is not None:
            weights = mx.where(block.allowed, weights, 0.0)
        return weights, 0.0 if sinks is None else mx.exp(sinks - top)


def narrowed(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """x in another dtype; in float16, a finite number beyond its range becomes the largest."""
    if dtype == mx.float16 and x.dtype != dtype:
        x = mx.where(mx.isinf(x), x, mx.clip(x, -_FLOAT16_MAX, _FLOAT16_MAX))
    return x.astype(dtype)


def bias_in(bias: mx.array, dtype: mx.Dtype) -> mx.array:
    """A bias in the dtype of the queries; in float16, what is too large is the largest finite number, and what is below
    the range is -inf, which hides a key."""
    if dtype == mx.float16 and bias.dtype != dtype:
        bias = mx.where(mx.isinf(bias), bias, mx.minimum(bias, _FLOAT16_MAX))
    return bias.astype(dtype)


def filled(x: mx.array, empty: float, safe: bool, value: float) -> mx.array:
    """x, where some rows may be `empty` with `value` in its place."""
    return x if safe else mx.where(x == empty, mx.array(value, x.dtype), x)


def make_softmax(
    q: mx.array,
    scale: float | None,
    sinks: mx.array | None,
    softcap: float | None,
    dropout: float,
    key: mx.array | None,
) -> Softmax:
    """The softmax of scores in blocks, with what is hidden, added and dropped in them."""
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(f"sinks must be one number per head, ({q.shape[1]},), got shape {sinks.shape}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, got {softcap}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    if dropout and key is None:
        raise ValueError(f"dropout of {dropout} needs a random key, got none")
    sinks = sinks if sinks is None else narrowed(sinks, q.dtype)
    return Softmax(1 / math.sqrt(q.shape[-1]) if scale is None else scale, sinks, softcap, dropout)


def check(
    q: mx.array,
    k: KeysOrValues,
    v: KeysOrValues,
    mask: mx.array | None,
    bias: mx.array | None,
    by_distance: mx.array | None,
    causal: bool,
    window: int | None,
) -> None:
    """ValueError for what does not fit together, by the name of the argument."""
    shapes = of_q, of_k, of_v = q.shape, k.shape, v.shape
    for name, shape, array in zip("qkv", shapes, (q, k, v), strict=True):
        if len(shape) != 4 or shape[-1] == 0:
            raise ValueError(f"{name} must be (batch, heads, length, dim) with dim above 0, got shape {shape}")
        if not mx.issubdtype(array.dtype, mx.floating):
            raise ValueError(f"{name} must be a float, got {array.dtype}")
        if shape[0] != of_q[0]:
            raise ValueError(f"{name} must have the batch size of q, {of_q[0]}, got {shape[0]}")
    if of_k[-1] != of_q[-1]:
        raise ValueError(f"k must have the head_dim of q, {of_q[-1]}, got {of_k[-1]}")
    if of_v[1:3] != of_k[1:3]:
        raise ValueError(f"v must have the heads and length of k, {of_k[1:3]}, got {of_v[1:3]}")
    if of_k[1] == 0 or of_q[1] % of_k[1]:
        raise ValueError(f"num_kv_heads must divide num_heads, {of_q[1]}, got {of_k[1]}")
    if (causal or window is not None) and of_q[2] > of_k[2]:
        what = "causal" if causal else "window"
        raise ValueError(f"{what} needs at most as many queries as keys, {of_k[2]}, got {of_q[2]}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if mask is None and bias is None and by_distance is None:
        return
    distances = (of_q[1], of_k[2] + of_q[2] - 1)
    if by_distance is not None and by_distance.shape != distances:
        raise ValueError(f"by_distance must be (heads, S + L - 1) = {distances}, got shape {by_distance.shape}")
    scores = (*of_q[:3], of_k[2])
    for name, extra in (("mask", mask), ("bias", bias)):
        if extra is not None and not isinstance(extra, mx.array):
            raise ValueError(f"{name} must be an mx.array, got {type(extra).__name__}")
    if mask is not None and mask.dtype != mx.bool_:
        raise ValueError(f"mask must be boolean (True = attend; an additive float is `bias`), got {mask.dtype}")
    if bias is not None and not mx.issubdtype(bias.dtype, mx.floating):
        raise ValueError(f"bias must be a float (a boolean mask is `mask`), got {bias.dtype}")
    for name, extra in (("mask", mask), ("bias", bias)):
        if extra is not None and not _broadcasts(extra.shape, scores):
            raise ValueError(f"{name} must broadcast to (batch, heads, L, S) = {scores}, got shape {extra.shape}")


def check_one_head(q: mx.array, k: KeysOrValues, v: KeysOrValues) -> None:
    """ValueError unless k and v have three axes, as q has."""
    for name, x in (("k", k), ("v", v)):
        if x.ndim != 3 or isinstance(x, Quantized):
            raise ValueError(f"{name} must be (batch, length, dim), as q is, {q.shape}, got shape {x.shape}")


def of_one_head(x: mx.array | None) -> mx.array | None:
    """A mask or bias over (B, L, S) as one over (B, 1, L, S)."""
    return x[:, None] if x is not None and x.ndim == 3 else x


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    return len(shape) <= len(target) and all(
        a in (1, b) for a, b in zip(reversed(shape), reversed(target), strict=False)
    )
