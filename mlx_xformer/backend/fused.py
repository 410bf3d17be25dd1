"""Chains of operations that layers share and that have a fast form: convolution and gate, norm and gate, attention."""

from __future__ import annotations

import mlx.core as mx

from . import dispatch
from .activations import exp_below_0, gelu, plain_gelu, plain_glu
from .linux import products
from .norms import block_sum, mean, moments, plain_normalized


def _plain_conv_glu(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    if weight.ndim == 2:
        return plain_glu(mx.addmm(bias, x, weight.T))
    convolve = mx.conv1d if weight.ndim == 3 else mx.conv2d
    return plain_glu(convolve(x, weight, padding=weight.shape[1] // 2) + bias)


_fast_conv_glu = dispatch.with_gradient_of(_plain_conv_glu)(products.conv_glu)


def conv_glu(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """The GLU of a convolution that keeps the length, or of a product.

    x (B, T, C) or (B, T, F, C) -> the same with half the channels of the weight: (2O, K, C) or (2O, K, K, C) with odd K
    for a convolution, (2O, C) for a product of any x (..., C).
    """
    return (_fast_conv_glu if dispatch.vectorizes(x) else _plain_conv_glu)(x, weight, bias)


def _plain_attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0)


_fast_attention = dispatch.with_gradient_of(_plain_attention)(products.attention)


_SMALL = 2**16  # scores below which MLX's own attention is as fast


_FEW_SCORES = 2**12  # of one query, below which an operation more costs as much as MLX's exp


@mx.compile
def _times(x: mx.array, factor: float) -> mx.array:
    """In one operation, where MLX has a view of the factor made first."""
    return x * factor


def unmasked_attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """softmax(q k^T * scale) v for q (B, H, L, D), k (B, G, S, D), v (B, G, S, Dv).

    Where MLX has no fused form and exp is slow, by blocks of rows, so that the scores are never held at once.
    """
    if q.shape[2] == 1 and dispatch.on_cpu():  # MLX's own copies the keys for every query of a group
        (B, H, _, D), G = q.shape, k.shape[1]
        scaled = _times(q, scale)
        grouped = scaled if G == H else scaled.reshape(B, G, H // G, D)
        scores = grouped @ k.swapaxes(-1, -2)
        if scores.size < _FEW_SCORES or not dispatch.vectorizes(q):
            out = mx.softmax(scores, axis=-1) @ v
        else:
            weights = exp_below_0(scores - scores.max(axis=-1, keepdims=True))
            out = (weights @ v) / weights.sum(axis=-1, keepdims=True)
        return out if G == H else out.reshape(B, H, 1, -1)
    size = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    if dispatch.vectorizes(q) and q.shape[1] == k.shape[1] and size >= _SMALL:
        return _fast_attention(q * scale, k, v)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)


def _norm_gelu(x: mx.array, center: mx.array, inverse: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    return plain_gelu(plain_normalized(x, center, inverse, weight, bias))


_compiled_norm_gelu = dispatch.fuse(_norm_gelu)


def norm_gelu(x: mx.array, weight: mx.array, bias: mx.array, *, axes: tuple[int, ...], eps: float) -> mx.array:
    """gelu(normalize(x)), for one group."""
    center, inverse = moments(x, axes, eps)
    if dispatch.vectorizes(x):
        return gelu((x - center) * (inverse * weight) + bias)
    return _compiled_norm_gelu(x, center, inverse, weight, bias)


def _norm_gate_add(residual, scale, a, b, center, inverse, weight_a, weight_b, bias_a, bias_b):
    value = (a - center) * inverse * weight_a + bias_a
    gate = (b - center) * inverse * weight_b + bias_b
    return residual + value * mx.sigmoid(gate) * scale


_compiled_norm_gate_add = dispatch.fuse(_norm_gate_add)


def _plain_expand(x, weight, bias, norm_weight, norm_bias, scale, residual, eps):
    y = mx.addmm(bias, x, weight.T)
    halves = [half for array in (norm_weight, norm_bias) for half in mx.split(array, 2)]
    return _compiled_norm_gate_add(residual, scale, *mx.split(y, 2, axis=-1), *moments(y, (1,), eps), *halves)


@dispatch.with_gradient_of(_plain_expand)
def _fast_expand(x, weight, bias, norm_weight, norm_bias, scale, residual, eps):
    """Normalises y = x weight^T + bias without holding y.

    The statistics of y come from those of x, which has fewer channels; the norm's scale and shift become rows of the
    product.
    """
    C, H = weight.shape[0] // 2, weight.shape[1]
    center = mean(x, (1,))
    centers = center @ weight.T + bias  # (B, 1, ..., 2C), of the channels of y
    mu = mean(centers, (-1,))
    spread = mean(block_sum(products.products(x - center), 1) * (weight.T @ weight), (-2, -1)) * (
        H * H / (2 * C) / x.shape[1]
    )
    inverse = mx.rsqrt(spread.reshape(mu.shape) + mean(mx.square(centers - mu), (-1,)) + eps)
    ones = mx.ones((*x.shape[:-1], 1))
    x = mx.concatenate([x * inverse, ones * inverse, ones * (inverse * mu), ones], axis=-1)
    columns = [norm_weight[:, None] * weight, (norm_weight * bias)[:, None], -norm_weight[:, None], norm_bias[:, None]]
    rows = mx.concatenate(columns, axis=1)  # (2C, H + 3)
    out = products.add_gated_products(
        mx.flatten(residual, 0, -2), mx.flatten(x, 0, -2), (rows[:C] * scale[:, None]).T, rows[C:].T
    )
    return out.reshape(residual.shape)


def expand_norm_glu_add(
    x: mx.array,
    weight: mx.array,
    bias: mx.array,
    norm_weight: mx.array,
    norm_bias: mx.array,
    scale: mx.array,
    residual: mx.array,
    *,
    eps: float,
) -> mx.array:
    """residual + scale * glu(normalize(x weight^T + bias)), normalised over axis 1 and the channels.

    x (B, T, ..., H), weight (2C, H), bias and those of the norm (2C,), residual (B, T, ..., C), scale (C,).
    """
    form = _fast_expand if dispatch.vectorizes(x) else _plain_expand
    return form(x, weight, bias, norm_weight, norm_bias, scale, residual, mx.array(eps))


def overlap_add(pieces: mx.array) -> mx.array:
    """(..., P, L, N) -> (..., L + P - 1, N): piece p of frame l is added into stretch l + p."""
    total = pieces[..., 0, :, :]
    for p in range(1, pieces.shape[-3]):
        piece = pieces[..., p, :, :]
        both = total[..., p:, :] + piece[..., :-1, :]
        total = mx.concatenate([total[..., :p, :], both, piece[..., -1:, :]], axis=-2)
    return total
