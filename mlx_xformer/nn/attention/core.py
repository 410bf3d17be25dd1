"""attention(): scaled dot-product attention, whole, in blocks of rows, or in bands, and its weights.

Axes: B batch, H query heads, G key/value heads, L queries, S keys, D head_dim, Dv value_dim.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx

from ...backend import dispatch, fused
from ..cache import KeysOrValues, Quantized
from .plans import BLOCK_SCORES, plan
from .scores import (
    Hidden,
    Softmax,
    bias_in,
    check,
    check_one_head,
    filled,
    make_softmax,
    narrowed,
    of_one_head,
    part_of,
)

_BLOCK = 2**17  # scores of a head's block of queries on a CPU
_FEW = 8  # queries up to which quantized keys and values are not made floats, head by head
_HALF = (mx.float16, mx.bfloat16)
_FEW_ROWS = 16  # and on a CPU those of all heads that share them


def attention(
    q: mx.array,
    k: KeysOrValues,
    v: KeysOrValues,
    *,
    scale: float | None = None,
    mask: mx.array | None = None,
    bias: mx.array | None = None,
    by_distance: mx.array | None = None,
    causal: bool = False,
    window: int | None = None,
    sinks: mx.array | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    key: mx.array | None = None,
) -> mx.array:
    """Scaled dot-product attention: softmax(softcap(q k^T * scale) + bias) v over the keys that may be attended to.

    A query that may attend to no key gives 0, with gradient 0. Softmax and sums are in float32. The queries are the
    last L of the S positions. Causal attention and attention with a window skip what is hidden: with a window, time
    and memory are linear in L.

    Args:
        q: Queries, floats (B, H, L, D), or (B, L, D) of one head; then k and v have three axes too.
        k: Keys (B, G, S, D), where G divides H: query head h reads key/value head h // (H // G). Keys and values may
            both be Quantized, without dropout; no more than one head of them is ever held as floats.
        v: Values (B, G, S, Dv).
        scale: What the scores are multiplied with; by default 1 / sqrt(D).
        mask: Boolean, True = attend, broadcast to (B, H, L, S), or to (B, L, S) of one head.
        bias: Floats that are added to the scores, broadcast likewise, in the dtype of q: where that is float16, what
            is below its range is -inf and hides a key. On a GPU, a NaN in a hidden key shows where there is a bias.
        by_distance: Finite floats (H, S + L - 1) that are added by how far a key is ahead of the query, from -(S - 1)
            to L - 1: ALiBi and T5's relative positions, in little memory.
        causal: Hides the keys after a query's own position.
        window: Hides the keys `window` or more positions away, to either side.
        sinks: (H,), for each head the score of a key that has no value.
        softcap: c bounds the scores to c tanh(score / c).
        dropout: The probability that a weight is dropped.
        key: The random key of the dropout.

    Returns:
        (B, H, L, Dv), or (B, L, Dv) of one head, in the dtype of q. It is computed in a dtype that holds every number
        of q, k and v; a float16 result is clipped to the finite numbers.

    Raises:
        ValueError: The arguments do not fit together; the message names one of them.
    """
    if q.ndim == 3:
        check_one_head(q, k, v)
        options: dict[str, Any] = {"scale": scale, "mask": of_one_head(mask), "bias": of_one_head(bias)}
        options |= {"by_distance": by_distance, "causal": causal, "window": window, "sinks": sinks}
        options |= {"softcap": softcap, "dropout": dropout, "key": key}
        return attention(q[:, None], k[:, None], v[:, None], **options)[:, 0]  # type: ignore[index]
    check(q, k, v, mask, bias, by_distance, causal, window)
    softmax = make_softmax(q, scale, sinks, softcap, dropout, key)
    if isinstance(k, Quantized) or isinstance(v, Quantized):
        if not (isinstance(k, Quantized) and isinstance(v, Quantized)) or dropout:
            raise ValueError("quantized keys need quantized values, and no dropout")
        hidden = Hidden(q.shape[2], k.shape[2], mask, bias, causal, window, by_distance)
        return _quantized(q, k, v, softmax, hidden)
    L, S, gpu = q.shape[2], k.shape[2], not dispatch.on_cpu()
    if not S or not q.size:
        return mx.zeros((*q.shape[:3], v.shape[-1]), q.dtype)
    bias = None if bias is None else bias_in(bias, q.dtype)
    dtype = _compute_dtype(q, k, v)
    if dtype != q.dtype:
        options = {"scale": scale, "softcap": softcap, "dropout": dropout, "key": key, "causal": causal}
        options |= {"mask": mask, "bias": bias, "by_distance": by_distance, "sinks": sinks, "window": window}
        return narrowed(attention(*(x.astype(dtype) for x in (q, k, v)), **options), q.dtype)
    k, v = k.astype(dtype), v.astype(dtype)
    by_distance = None if by_distance is None else narrowed(by_distance, dtype)
    if L == 1:  # the last position
        causal, window = False, None if window is not None and window >= S else window
    hidden = Hidden(L, S, mask, bias, causal, window, by_distance)
    if softmax.plain and hidden.nothing:
        return fused.unmasked_attention(q, k, v, softmax.scale)
    # MLX's function adds a bias to hidden scores too, where NaN would stay NaN.
    shifted = bias is not None or by_distance is not None
    explicit = softmax.softcap is not None or softmax.dropout > 0 or (shifted and not gpu)
    how = plan(
        q.shape,
        k.shape,
        v.shape[-1],
        vectorizes=dispatch.vectorizes(q),
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

    if len(starts) == 1:
        return block(0, seeds[0])
    return mx.concatenate(
        dispatch.side_by_side([partial(block, *given) for given in zip(starts, seeds, strict=True)]), 2
    )


def _compute_dtype(q: mx.array, k: mx.array, v: mx.array) -> mx.Dtype:
    """The dtype that holds every number of q, k and v. A CPU multiplies half precisions in scalar loops and rounds
    every score to them: float32 there."""
    dtype = q.dtype if k.dtype == v.dtype == q.dtype else mx.result_type(q, k, v)
    return mx.float32 if dtype in _HALF and dispatch.on_cpu() else dtype


def _quantized(q: mx.array, k: Quantized, v: Quantized, softmax: Softmax, hidden: Hidden) -> mx.array:
    """Attention to quantized keys and values: of few queries by quantized products, of many head by head of them."""
    (B, H, L), (G, S) = q.shape[:3], k.shape[1:3]
    group, gpu = H // max(G, 1), not dispatch.on_cpu()
    if not S or not q.size:
        return mx.zeros((*q.shape[:3], v.shape[-1]), q.dtype)
    if L <= _FEW if gpu else group * L <= _FEW_ROWS and B * H * L * S <= BLOCK_SCORES:
        hidden = replace(hidden, bias=hidden.bias if hidden.bias is None else bias_in(hidden.bias, q.dtype))
        return softmax.explicit((q, k, v), hidden.block(range(L), range(S)), None)
    heads: list[mx.array] = []
    for row in range(B):
        for head in range(G):
            some = slice(row, row + 1), slice(head * group, (head + 1) * group)
            keys, values = k.head(row, head), v.head(row, head)
            if heads:  # one head after the other, so that no two are held as floats
                keys, values = keys.after(heads[-1]), values.after(heads[-1])
            own = replace(softmax, sinks=None if softmax.sinks is None else softmax.sinks[some[1]])
            far = None if hidden.by_distance is None else hidden.by_distance[some[1]]
            part = replace(hidden, mask=_of(hidden.mask, *some), bias=_of(hidden.bias, *some), by_distance=far)
            heads.append(_of_head(q[some], keys, values, own, part))
    return mx.concatenate(heads, axis=1).reshape(B, H, L, -1)  # (1, B H, L, Dv) before


def _of_head(q: mx.array, k: Quantized, v: Quantized, softmax: Softmax, hidden: Hidden) -> mx.array:
    """Attention to one quantized head, (1, 1, S, D), of the queries that share it. On a CPU in blocks of queries, one
    after the other, so that few scores are held at once."""
    (_, group, L, _), S, causal = q.shape, k.shape[2], hidden.causal
    gpu = not dispatch.on_cpu()
    dtype = mx.result_type(q.dtype, k.dtype) if gpu else mx.float32  # a CPU's half-precision products are slow
    keys, values = k.dequantized(dtype), v.dequantized(dtype)
    placed = hidden.window is not None or hidden.by_distance is not None  # where a query is counts, causal or not
    rows = L if gpu or (placed and not causal) else max(16, _BLOCK // (group * S))
    out: list[mx.array] = []
    for first in range(0, L, rows):
        last = min(first + rows, L)
        stop = S - L + last if causal else S
        asked = q[:, :, first:last].astype(dtype)
        if out:
            (asked,) = mx.depends([asked], out[-1:])
        options: dict[str, Any] = {"scale": softmax.scale, "sinks": softmax.sinks, "softcap": softmax.softcap}
        for name, x in (("mask", hidden.mask), ("bias", hidden.bias)):
            options[name] = x if x is None else part_of(x, range(first, last), range(stop))
        if hidden.by_distance is not None:
            options["by_distance"] = hidden.by_distance[:, S - stop : S + last - first - 1]
        some = keys[:, :, :stop], values[:, :, :stop]
        out.append(attention(asked, *some, causal=causal, window=hidden.window, **options))
    return narrowed(mx.concatenate(out, axis=2), q.dtype)


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
    by_distance: mx.array | None = None,
    causal: bool = False,
    window: int | None = None,
    sinks: mx.array | None = None,
    softcap: float | None = None,
    average: bool = False,
) -> mx.array:
    """The weights that attention() gives to the values.

    Args:
        q: Queries, floats (B, H, L, D), or (B, L, D) of one head; then k has three axes too.
        k: Keys (B, G, S, D), where G divides H.
        scale: What the scores are multiplied with; by default 1 / sqrt(D).
        mask: Boolean, True = attend; see attention() for this and what follows.
        bias: Floats that are added to the scores.
        by_distance: Floats that are added by how far a key is ahead of the query.
        causal: Hides the keys after a query's own position.
        window: Hides the keys `window` or more positions away, to either side.
        sinks: For each head the score of a key that has no value.
        softcap: The bound of the scores.
        average: Whether to return the mean over the heads.

    Returns:
        (B, H, L, S), or (B, L, S) averaged or of one head. Rows sum to 1 (to less with `sinks`), or to 0 where a query
        may attend to no key.

    Raises:
        ValueError: The arguments do not fit together; the message names one of them.
    """
    if q.ndim == 3:
        check_one_head(q, k, k)
        options: dict[str, Any] = {"scale": scale, "mask": of_one_head(mask), "bias": of_one_head(bias)}
        options |= {"by_distance": by_distance, "causal": causal, "window": window}
        return attention_weights(q[:, None], k[:, None], **options, sinks=sinks, softcap=softcap)[:, 0]
    check(q, k, k, mask, bias, by_distance, causal, window)
    softmax = make_softmax(q, scale, sinks, softcap, 0.0, None)
    L, S = q.shape[2], k.shape[2]
    if not S or not q.size:
        return mx.zeros((q.shape[0], L, S) if average else (*q.shape[:3], S), q.dtype)
    bias = None if bias is None else bias_in(bias, q.dtype)
    block = Hidden(L, S, mask, bias, causal, window, by_distance).block(range(L), range(S))
    weights, rest = softmax.weights(q, k, block)
    total = weights @ mx.ones((S, 1)) + rest
    weights = (weights / filled(total, 0.0, block.safe, 1.0)).astype(q.dtype)
    return weights.mean(axis=1) if average else weights
