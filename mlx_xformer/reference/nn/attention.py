"""Attention, head by head. Axes: B batch, H heads, L queries, S keys, D and Dv head widths, E embed_dim."""

import math
from typing import Any

import numpy as np

from .layers import Params, linear, sub
from .masks import causal_mask, sliding_mask
from .positions import alibi_bias, relative_buckets
from .positions import rotary as turn


def _check(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None, causal: bool, window: int | None
) -> None:
    (_, H, L, D), (_, Hkv, S, _) = q.shape, k.shape
    if H % Hkv:
        raise ValueError(f"query heads must be a multiple of key/value heads, got {H} and {Hkv}")
    if k.shape[-1] != D or v.shape[:3] != k.shape[:3] or k.shape[0] != q.shape[0]:
        raise ValueError(f"q, k and v must fit together, got {q.shape}, {k.shape} and {v.shape}")
    if mask is not None and mask.dtype != np.bool_:
        raise ValueError(f"mask must be boolean, got {mask.dtype}")
    if (causal or window is not None) and L > S:
        raise ValueError(f"causal queries must be at most as many as keys, got {L} and {S}")


def attention_weights(
    q: np.ndarray,
    k: np.ndarray,
    *,
    scale: float | None = None,
    mask: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    by_distance: np.ndarray | None = None,
    causal: bool = False,
    window: int | None = None,
    sinks: np.ndarray | None = None,
    softcap: float | None = None,
) -> np.ndarray:
    """softmax(softcap(scale q k^T) + bias) over the keys that mask, causal and window leave, (B, H, L, S); a row
    without keys is 0.

    q (B, H, L, D), k (B, Hkv, S, D), or of one head (B, L, D) and (B, S, D) -> (B, L, S), with mask and bias over
    (B, L, S); query head h uses key head h // (H // Hkv). `mask` (boolean, True = attend) and
    `bias` (float) broadcast to (B, H, L, S); `by_distance` (H, S + L - 1) is a bias by how far a key is ahead of the
    query, from -(S - 1); the queries are the last L of the S positions. `sinks` (H,) are scores
    that take part in the sum only. `softcap` c bounds scores to c tanh(score / c). `scale` is D ** -0.5 by default.
    """
    if q.ndim == 3:
        mask, bias = (x[:, None] if x is not None and x.ndim == 3 else x for x in (mask, bias))
        given: dict[str, Any] = {
            "mask": mask,
            "bias": bias,
            "by_distance": by_distance,
            "causal": causal,
            "window": window,
        }
        return attention_weights(q[:, None], k[:, None], **given, scale=scale, sinks=sinks, softcap=softcap)[:, 0]
    _check(q, k, k, mask, causal, window)
    (B, H, L, D), (_, Hkv, S, _) = q.shape, k.shape
    scale = 1.0 / math.sqrt(D) if scale is None else float(scale)
    visible = causal_mask(L, S) if causal else np.ones((L, S), dtype=bool)
    if window is not None:
        visible = visible & sliding_mask(L, S, window)
    visible = np.broadcast_to(visible if mask is None else visible & mask, (B, H, L, S))
    if by_distance is not None:
        ahead = np.arange(S)[None] - (S - L + np.arange(L))[:, None]  # (L, S)
        bias = by_distance[:, ahead + S - 1] + (0 if bias is None else bias)
    added = None if bias is None else np.broadcast_to(bias.astype(q.dtype, copy=False), (B, H, L, S))
    weights = np.zeros((B, H, L, S), dtype=q.dtype)
    for b in range(B):
        for h in range(H):
            scores = (q[b, h] * scale) @ k[b, h // (H // Hkv)].T  # (L, S)
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            if added is not None:
                scores = scores + added[b, h]
            scores = np.where(visible[b, h], scores, -np.inf).astype(q.dtype, copy=False)
            sink = -np.inf if sinks is None else sinks[h]
            top = np.maximum(np.max(scores, axis=-1, keepdims=True, initial=-np.inf), sink)
            top = np.where(np.isneginf(top), 0, top)  # a row that sees nothing: all 0
            raised = np.exp(scores - top)
            total = np.sum(raised, axis=-1, keepdims=True) + np.exp(sink - top)
            weights[b, h] = raised / np.where(total == 0, 1, total)
    return weights


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> np.ndarray:
    """The values v (B, Hkv, S, Dv), weighed: (B, H, L, Dv); or of one head (B, S, Dv): (B, L, Dv). The options are
    those of attention_weights."""
    if q.ndim == 3:
        return attention_weights(q, k, **options) @ v
    _check(q, k, v, options.get("mask"), False, None)
    weights = attention_weights(q, k, **options)
    B, H = weights.shape[:2]
    group = H // v.shape[1]
    return np.stack([np.stack([weights[b, h] @ v[b, h // group] for h in range(H)]) for b in range(B)])


def reshape_to_heads(x: np.ndarray, num_heads: int) -> np.ndarray:
    """x (..., L, H D) -> (..., H, L, D)."""
    D = x.shape[-1] // num_heads
    return np.stack([x[..., h * D : (h + 1) * D] for h in range(num_heads)], axis=-3)


def transpose_heads_to_2d(x: np.ndarray) -> np.ndarray:
    """x (..., H, L, D) -> (..., L, H D)."""
    return np.concatenate([x[..., h, :, :] for h in range(x.shape[-3])], axis=-1)


def repeat_kv(x: np.ndarray, group_size: int) -> np.ndarray:
    """x (..., G, S, D) -> (..., G group_size, S, D), whose head h is head h // group_size of x."""
    return np.stack([x[..., h // group_size, :, :] for h in range(x.shape[-3] * group_size)], axis=-3)


def online_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, *, block: int, scale: float) -> np.ndarray:
    """One head, q (L, D), k (S, D), v (S, Dv), by blocks of keys: what is summed so far is turned down when a larger
    score comes (Milakov and Gimelshein 2018, arXiv 1805.02867), so that no row of scores is ever held whole."""
    top = np.full((len(q), 1), -np.inf, q.dtype)
    total, out = np.zeros((len(q), 1), q.dtype), np.zeros((len(q), v.shape[1]), q.dtype)
    for first in range(0, len(k), block):
        scores = (q * scale) @ k[first : first + block].T  # (L, block)
        higher = np.maximum(top, scores.max(axis=-1, keepdims=True))
        weights, shrink = np.exp(scores - higher), np.exp(top - higher)
        total = total * shrink + weights.sum(axis=-1, keepdims=True)
        out = out * shrink + weights @ v[first : first + block]
        top = higher
    return out / total


def attention_layer(
    params: Params,
    x: np.ndarray,
    source: np.ndarray | None = None,
    value_source: np.ndarray | None = None,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    qk_norm: str | None = None,
    norm_eps: float = 1e-6,
    rotary: dict[str, Any] | None = None,
    positions: np.ndarray | None = None,
    alibi: bool = False,
    relative: tuple[int, int] | None = None,
    bias: np.ndarray | None = None,
    causal: bool = False,
    **options: Any,
) -> np.ndarray:
    """Project, attend, project back: x (B, L, E), keys' source (B, S, ...) or x itself, values' source or the keys'.

    Parameters: q_proj, k_proj, v_proj and out_proj, each a weight and an optional bias; with qk_norm q_norm and k_norm;
    with relative a table `relative.weight` (buckets, H). rotary: the options of positions.rotary, applied at
    `positions` (B, L).
    """
    source = x if source is None else source
    value_source = source if value_source is None else value_source
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads

    def heads(name: str, y: np.ndarray, count: int) -> np.ndarray:
        y = linear(sub(params, name), y)  # (B, L, count D)
        if qk_norm == "rms_whole" and name != "v_proj":
            y = _normed(sub(params, name.replace("proj", "norm")), y, "rms", norm_eps)
        return y.reshape(*y.shape[:2], count, -1).transpose(0, 2, 1, 3)  # (B, count, L, D)

    q, k = heads("q_proj", x, num_heads), heads("k_proj", source, num_kv_heads)
    if qk_norm in ("rms", "layer"):
        q, k = (_normed(sub(params, name), y, qk_norm, norm_eps) for name, y in (("q_norm", q), ("k_norm", k)))
    if rotary is not None:
        assert positions is not None
        q, k = turn(q, positions, **rotary), turn(k, positions, **rotary)
    L, S = q.shape[2], k.shape[2]
    added = 0 if bias is None else bias
    if alibi:
        added = added + alibi_bias(num_heads, L, S).astype(x.dtype)
    if relative is not None:
        buckets = relative_buckets(L, S, num_buckets=relative[0], max_distance=relative[1], bidirectional=not causal)
        added = added + params["relative.weight"][buckets].transpose(2, 0, 1)  # (H, L, S)
    options["bias"] = None if np.isscalar(added) else added
    if "sinks" in params:
        options["sinks"] = params["sinks"]
    out = attention(q, k, heads("v_proj", value_source, num_kv_heads), causal=causal, **options)  # (B, H, L, Dv)
    out = out.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1)  # (B, L, H Dv)
    return linear(sub(params, "out_proj"), out)


def _normed(params: Params, x: np.ndarray, kind: str, eps: float) -> np.ndarray:
    """RMS or layer norm of the last axis."""
    if kind == "layer":
        x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.asarray(eps, x.dtype))
    return x * params["weight"] + params.get("bias", 0)


def initialize(params: Params, scheme: str, noise: Params) -> dict[str, np.ndarray]:
    """New weights for the four projections of a layer: uniform within a bound of each matrix, (2 noise - 1) bound.

    "xavier" has the bound sqrt(6 / (inputs + outputs)) (Glorot and Bengio 2010). "torch" is what
    torch.nn.MultiheadAttention has: one matrix for q, k and v where their inputs are as wide, and 1 / sqrt(inputs) for
    the output. Biases are 0. noise: numbers in [0, 1) in the shape of each weight, by its name.
    """
    shapes = {name: params[f"{name}_proj.weight"].shape for name in ("q", "k", "v", "out")}
    rows = sum(shapes[name][0] for name in "qkv")
    one_matrix = shapes["q"][1] == shapes["k"][1] == shapes["v"][1]
    made = {name: np.zeros_like(x) for name, x in params.items() if name.endswith("_proj.bias")}
    for name, (outputs, inputs) in shapes.items():
        if scheme == "torch" and name == "out":
            bound = 1 / math.sqrt(inputs)
        elif scheme == "torch" and one_matrix:
            bound = math.sqrt(6 / (inputs + rows))
        else:
            bound = math.sqrt(6 / (inputs + outputs))
        made[f"{name}_proj.weight"] = (2 * noise[name] - 1) * bound
    return made
