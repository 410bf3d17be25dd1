"""attention(): scaled dot-product attention, whole, in blocks of rows, or in bands, and its weights.

Axes: B batch, H query heads, G key/value heads, L queries, S keys, D head_dim, Dv value_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx

from . import kernels
from .cache import KeysOrValues, Quantized

_SCORES = 2**20  # scores that a block of rows holds at once
_SMALL = 2**16  # scores up to which nothing is gained by blocks
_ROWS = 64  # queries of a block, at least
# Head widths that Metal's fused kernels take, for more than 8 queries and for up to 8 (MLX 0.32.4: 192 and 256 have a
# kernel for many queries too, which its heuristics do not choose).
_FUSED, _FUSED_FEW = (64, 72, 80, 96, 128), (64, 96, 128, 192, 256)
_BLOCK = 2**17  # scores of a head's block of queries on a CPU
_FEW = 8  # queries up to which quantized keys and values are not made floats, head by head
_FEW_ROWS = 16  # and on a CPU those of all heads that share them


@dataclass(frozen=True)
class Plan:
    """How attention is computed: in blocks of `rows` queries; each by MLX's own function (with heads padded to `width`
    if not None, on Metal) or, `explicit`, by products and a softmax of ours."""

    rows: int
    explicit: bool
    width: int | None = None


def plan(
    q: tuple[int, ...],
    k: tuple[int, ...],
    value_dim: int,
    *,
    vectorizes: bool,
    gpu: bool,
    causal: bool = False,
    window: int | None = None,
    explicit: bool = False,
) -> Plan:
    """The plan for shapes q (B, H, L, D) and k (B, G, S, D). vectorizes: our softmax outdoes MLX's (Linux's CPU);
    explicit: MLX has no function for what is asked."""
    B, H, L, D = q
    S = k[2]
    explicit = explicit or (vectorizes and B * H * L * S > _SMALL)
    rows = L
    if explicit:
        rows = max(16, _SCORES // max(1, B * H * S))
    if window is not None and 2 * window < S:
        rows = max(_ROWS, window // 8) if not gpu else max(256, window // 4)
    elif causal and not gpu and L > 2 * _ROWS:
        rows = min(rows, max(_ROWS, L // 16))
    width = None
    if gpu and not explicit and L > 1:
        sizes = _FUSED if L > 8 else _FUSED_FEW
        if value_dim != D or D not in sizes:
            wide = max(D, value_dim)
            # Padded heads cost their width, unfused scores L x S: worth it for long sequences.
            width = next((size for size in sizes if size >= wide), None) if L * S >= 2**20 else None
    return Plan(min(rows, L), explicit, width)


def attention(
    q: mx.array,
    k: KeysOrValues,
    v: KeysOrValues,
    *,
    scale: float | None = None,
    mask: mx.array | None = None,
    bias: mx.array | None = None,
    causal: bool = False,
    window: int | None = None,
    sinks: mx.array | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    key: mx.array | None = None,
) -> mx.array:
    """softmax(softcap(q k^T * scale) + bias) v over the keys that mask, causal and window allow.

    q (B, H, L, D), k (B, G, S, D), v (B, G, S, Dv) -> (B, H, L, Dv); G divides H, and query head h reads key/value
    head h // (H // G). `mask` is boolean, True = attend, and `bias` is an additive float; both broadcast to
    (B, H, L, S). The queries are the last L of the S positions: `causal` hides the keys after a query's own, `window`
    those `window` or more away to either side. `sinks` (H,) are the scores of a key per head that has no value.
    `softcap` c bounds scores to c tanh(score / c). `dropout` is the probability that a weight is dropped, by the
    random `key`. A row that may attend nothing gives 0, with gradient 0. `scale` defaults to 1 / sqrt(D). Causal and
    banded attention skip what is hidden: with a window, time and memory are linear in L. Keys and values may both be
    Quantized, without dropout; no more than one head of them is ever held as floats.
    """
    _check(q, k, v, mask, bias, causal, window)
    softmax = _softmax(q, scale, sinks, softcap, dropout, key)
    if isinstance(k, Quantized) or isinstance(v, Quantized):
        if not (isinstance(k, Quantized) and isinstance(v, Quantized)) or dropout:
            raise ValueError("quantized keys need quantized values, and no dropout")
        return _quantized(q, k, v, softmax, mask=mask, bias=bias, causal=causal, window=window)
    hidden = _Hidden(q.shape[2], k.shape[2], mask, bias if bias is None else bias.astype(q.dtype), causal, window)
    L, S = q.shape[2], k.shape[2]
    if not S or not q.size:
        return mx.zeros((*q.shape[:3], v.shape[-1]), q.dtype)
    if softmax.plain and hidden.nothing:
        return kernels.unmasked_attention(q, k, v, softmax.scale)
    gpu = mx.default_device() == mx.Device(mx.gpu)
    explicit = softmax.softcap is not None or softmax.dropout > 0
    how = plan(
        q.shape,
        k.shape,
        v.shape[-1],
        vectorizes=kernels.vectorizes(q),
        gpu=gpu,
        causal=causal,
        window=window,
        explicit=explicit,
    )
    if how.explicit:  # a column of ones beside the values brings the denominators out of the same product
        v = mx.concatenate([v.astype(mx.float32), mx.ones((*v.shape[:3], 1))], axis=-1)
    starts = range(0, L, how.rows)
    seeds = [None] * len(starts) if key is None else mx.random.split(key, len(starts))

    def block(first: int, seed: mx.array | None) -> mx.array:
        rows = range(first, min(first + how.rows, L))
        keys = hidden.keys(rows)
        some = slice(keys.start, keys.stop)
        parts = q[:, :, first : rows.stop], k[:, :, some], v[:, :, some]
        scores = hidden.block(rows, keys)
        return softmax.explicit(parts, scores, seed) if how.explicit else softmax.fused(parts, scores, how.width)

    blocks = kernels.side_by_side([partial(block, *given) for given in zip(starts, seeds, strict=True)])
    return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=2)


def _quantized(
    q: mx.array,
    k: Quantized,
    v: Quantized,
    softmax: _Softmax,
    *,
    mask: mx.array | None,
    bias: mx.array | None,
    causal: bool,
    window: int | None,
) -> mx.array:
    """Attention to quantized keys and values: of few queries by quantized products, of many head by head of them."""
    (B, H, L), (G, S) = q.shape[:3], k.shape[1:3]
    group, gpu = H // max(G, 1), mx.default_device() == mx.Device(mx.gpu)
    if not S or not q.size:
        return mx.zeros((*q.shape[:3], v.shape[-1]), q.dtype)
    if L <= _FEW if gpu else group * L <= _FEW_ROWS and B * H * L * S <= _SCORES:
        bias = bias if bias is None else bias.astype(q.dtype)
        block = _Hidden(L, S, mask, bias, causal, window).block(range(L), range(S))
        return softmax.explicit((q, k, v), block, None)
    heads: list[mx.array] = []
    for row in range(B):
        for head in range(G):
            some = slice(row, row + 1), slice(head * group, (head + 1) * group)
            keys, values = k.head(row, head), v.head(row, head)
            if heads:  # one head after the other, so that no two are held as floats
                keys, values = keys.after(heads[-1]), values.after(heads[-1])
            own = replace(softmax, sinks=None if softmax.sinks is None else softmax.sinks[some[1]])
            extra = {"mask": _of(mask, *some), "bias": _of(bias, *some)}
            heads.append(_of_head(q[some], keys, values, own, extra, causal=causal, window=window))
    return mx.concatenate(heads, axis=1).reshape(B, H, L, -1)  # (1, B H, L, Dv) before


def _of_head(
    q: mx.array,
    k: Quantized,
    v: Quantized,
    softmax: _Softmax,
    extra: dict[str, mx.array | None],
    *,
    causal: bool,
    window: int | None,
) -> mx.array:
    """Attention to one quantized head, (1, 1, S, D), of the queries that share it. On a CPU in blocks of queries, one
    after the other, so that few scores are held at once."""
    (_, group, L, _), S = q.shape, k.shape[2]
    gpu = mx.default_device() == mx.Device(mx.gpu)
    dtype = q.dtype if gpu else mx.float32  # a CPU's half-precision products are slow
    keys, values = k.dequantized(dtype), v.dequantized(dtype)
    rows = L if gpu or (window is not None and not causal) else max(16, _BLOCK // (group * S))
    out: list[mx.array] = []
    for first in range(0, L, rows):
        last = min(first + rows, L)
        stop = S - L + last if causal else S
        asked = q[:, :, first:last].astype(dtype)
        if out:
            (asked,) = mx.depends([asked], out[-1:])
        part = {name: x if x is None else _part(x, range(first, last), range(stop)) for name, x in extra.items()}
        options: dict[str, Any] = {"scale": softmax.scale, "sinks": softmax.sinks, "softcap": softmax.softcap, **part}
        out.append(attention(asked, keys[:, :, :stop], values[:, :, :stop], causal=causal, window=window, **options))
    return mx.concatenate(out, axis=2).astype(q.dtype)


def _of(x: mx.array | None, row: slice, heads: slice) -> mx.array | None:
    """What is for some heads of a row, of an array that broadcasts to (B, H, L, S)."""
    if x is None or x.ndim < 3:
        return x
    x = x if x.shape[-3] == 1 else x[..., heads, :, :]
    return x if x.ndim == 3 or x.shape[0] == 1 else x[row]


def attention_weights(
    q: mx.array,
    k: mx.array,
    *,
    scale: float | None = None,
    mask: mx.array | None = None,
    bias: mx.array | None = None,
    causal: bool = False,
    window: int | None = None,
    sinks: mx.array | None = None,
    softcap: float | None = None,
    average: bool = False,
) -> mx.array:
    """The weights that attention() gives to the values, (B, H, L, S), or (B, L, S) averaged over the heads. Rows sum
    to 1 (to less with `sinks`), or to 0 where nothing may be attended. Arguments as in attention()."""
    _check(q, k, k, mask, bias, causal, window)
    softmax = _softmax(q, scale, sinks, softcap, 0.0, None)
    L, S = q.shape[2], k.shape[2]
    if not S or not q.size:
        return mx.zeros((q.shape[0], L, S) if average else (*q.shape[:3], S), q.dtype)
    hidden = _Hidden(L, S, mask, bias if bias is None else bias.astype(q.dtype), causal, window)
    block = hidden.block(range(L), range(S))
    weights, rest = softmax.weights(q, k, block)
    total = weights @ mx.ones((S, 1)) + rest
    weights = (weights / _filled(total, 0.0, block.safe, 1.0)).astype(q.dtype)
    return weights.mean(axis=1) if average else weights


_Parts = tuple[mx.array, mx.array, mx.array]


@dataclass(frozen=True)
class _Block:
    """A block of scores: which are allowed (None: all), what is added (None: nothing), and whether every query is known
    to see a key."""

    allowed: mx.array | None
    bias: mx.array | None
    safe: bool


@dataclass(frozen=True)
class _Hidden:
    """What of the (L, S) scores is hidden or shifted, and by what."""

    L: int
    S: int
    mask: mx.array | None
    bias: mx.array | None
    causal: bool
    window: int | None

    @property
    def nothing(self) -> bool:
        return self.mask is None and self.bias is None and not self.causal and self.window is None

    def keys(self, rows: range) -> range:
        """The keys that any of the queries `rows` may see."""
        first, last = (row + self.S - self.L for row in (rows.start, rows.stop - 1))  # as positions
        start = 0 if self.window is None else max(0, first - self.window + 1)
        stop = self.S if self.window is None else min(self.S, last + self.window)
        return range(start, min(stop, last + 1) if self.causal else stop)

    def block(self, rows: range, keys: range) -> _Block:
        """A block of it."""
        allowed, bias = self._band(rows, keys), None
        if self.mask is not None:
            part = _part(self.mask, rows, keys)
            allowed = part if allowed is None else part & allowed
        if self.bias is not None:
            bias = _part(self.bias, rows, keys)
            open_ = bias != -mx.inf
            allowed = open_ if allowed is None else allowed & open_
            bias = mx.where(open_, bias, mx.array(0, bias.dtype))
        return _Block(allowed, bias, self.mask is None and self.bias is None)

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


def _part(x: mx.array, rows: range, keys: range) -> mx.array:
    """A block of an array that broadcasts to (B, H, L, S)."""
    x = x if x.ndim >= 2 else x.reshape(1, -1)
    x = x if x.shape[-2] == 1 else x[..., rows.start : rows.stop, :]
    return x if x.shape[-1] == 1 else x[..., keys.start : keys.stop]


@dataclass(frozen=True)
class _Softmax:
    """What becomes of the scores."""

    scale: float
    sinks: mx.array | None
    softcap: float | None
    dropout: float

    @property
    def plain(self) -> bool:
        """Whether there is nothing but the scale."""
        return self.sinks is None and self.softcap is None and not self.dropout

    def fused(self, parts: _Parts, block: _Block, width: int | None = None) -> mx.array:
        """By MLX's function. Rows that see nothing first see all, so that they stay finite, and are then set to 0."""
        (q, k, v), value_dim = parts, parts[2].shape[-1]
        mask, some = block.allowed, None
        if mask is not None and not block.safe:
            some = mx.any(mask, axis=-1, keepdims=True)
            mask = mask | ~some
        if block.bias is not None:
            assert mask is not None  # a bias tells what is open
            mask = mx.where(mask, block.bias, mx.array(-mx.inf, q.dtype))
        if width is not None:
            q, k, v = (mx.pad(x, [(0, 0)] * 3 + [(0, width - x.shape[-1])]) for x in parts)
        single = q.shape[2] == 1 and mask is None and self.sinks is None and mx.default_device() == mx.Device(mx.cpu)
        if single:  # a CPU copies the keys for each product: the queries of a group are rows of one
            q = q.reshape(*k.shape[:2], -1, q.shape[-1])  # (B, G, H / G, D)
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.scale, mask=mask, sinks=self.sinks)
        out = out.reshape(*parts[0].shape[:3], -1) if single else out
        out = out if width is None else out[..., :value_dim]
        return out if some is None else mx.where(some, out, mx.array(0, out.dtype))

    def explicit(
        self, parts: tuple[mx.array, KeysOrValues, KeysOrValues], block: _Block, key: mx.array | None
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
        return (out.reshape(*q.shape[:3], -1) / _filled(total, 0.0, block.safe, 1.0)).astype(q.dtype)

    def weights(self, q: mx.array, k: KeysOrValues, block: _Block) -> tuple[mx.array, mx.array | float]:
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
        top = mx.stop_gradient(_filled(top if sinks is None else mx.maximum(top, sinks), -mx.inf, block.safe, 0.0))
        weights = kernels.exp_below_0(scores - top)
        if block.allowed is not None:
            weights = mx.where(block.allowed, weights, 0.0)
        return weights, 0.0 if sinks is None else mx.exp(sinks - top)


def _filled(x: mx.array, empty: float, safe: bool, value: float) -> mx.array:
    """x, where some rows may be `empty` with `value` in its place."""
    return x if safe else mx.where(x == empty, mx.array(value, x.dtype), x)


def _softmax(
    q: mx.array,
    scale: float | None,
    sinks: mx.array | None,
    softcap: float | None,
    dropout: float,
    key: mx.array | None,
) -> _Softmax:
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(f"sinks must be one number per head, ({q.shape[1]},), got shape {sinks.shape}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, got {softcap}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    if dropout and key is None:
        raise ValueError(f"dropout of {dropout} needs a random key, got none")
    sinks = sinks if sinks is None else sinks.astype(q.dtype)
    return _Softmax(1 / math.sqrt(q.shape[-1]) if scale is None else scale, sinks, softcap, dropout)


def _check(
    q: mx.array,
    k: KeysOrValues,
    v: KeysOrValues,
    mask: mx.array | None,
    bias: mx.array | None,
    causal: bool,
    window: int | None,
) -> None:
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
    if (causal or window is not None) and q.shape[2] > k.shape[2]:
        what = "causal" if causal else "window"
        raise ValueError(f"{what} needs at most as many queries as keys, {k.shape[2]}, got {q.shape[2]}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
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
