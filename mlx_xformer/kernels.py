"""Elementwise chains and reductions that every layer shares: the one place where a form may depend on the device.

MLX's CPU backend keeps one float32 accumulator per reduction, so a mean over 10^7 elements is off by 1e-3. `mean_var`
sums in stages of 32 instead, as a tree would, and is good to a few 1e-8 on every device.

Where MLX's CPU backend can compile (Linux with g++), float32 arrays take the forms of cpu.py. Each has a plain form
here, which other devices take and whose gradient it has.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import cast

import mlx.core as mx

from . import cpu, runtime

_BLOCK = 32  # elements summed in sequence before the partial sums are summed themselves
_FUSES = sys.platform == "linux" and shutil.which("g++") is not None and "MLX_DISABLE_COMPILE" not in os.environ
_CPU = mx.Device(mx.cpu)


def vectorizes(x: mx.array) -> bool:
    """Whether the forms of cpu.py serve x: float32, on a CPU whose built-in functions are scalar calls."""
    return _FUSES and x.dtype == mx.float32 and mx.default_device() == _CPU


def by_rows(function: Callable[[mx.array], mx.array], x: mx.array, columns: int = 0) -> mx.array:
    """function(x), where what becomes of each x[i] depends on it alone: on a CPU side by side, where x is large, or its
    product with so many columns."""
    if runtime.workers == 1 or mx.default_device() != _CPU or (x.size < _LARGE and x.size * columns < _MANY):
        return function(x)
    return cpu.by_rows(function, x)


def side_by_side(tasks: Sequence[Callable[[], mx.array]]) -> list[mx.array]:
    """What each task returns; on a CPU with several workers they run at the same time."""
    if runtime.workers == 1 or mx.default_device() != _CPU:
        return [task() for task in tasks]
    return cpu.side_by_side(tasks)


_LARGE, _MANY = 2**17, 2**23  # numbers, and multiplications, that are worth a meeting of workers
_FEW = 8  # rows where each operation counts


def _fused(chain: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """The elementwise chain in one kernel. Arrays without elements go around it: MLX 0.32.4 divides by 0 on CUDA."""
    compiled = cast(Callable[..., mx.array], mx.compile(chain, shapeless=True))

    def call(*arrays: mx.array) -> mx.array:
        return (compiled if all(x.size for x in arrays) else chain)(*arrays)

    return call


def _with_gradient_of(plain: Callable[..., mx.array]) -> Callable[[Callable], Callable[..., mx.array]]:
    """Marks a fast form as equal to `plain`, whose derivative it takes."""

    def decorate(fast: Callable[..., mx.array]) -> Callable[..., mx.array]:
        function = mx.custom_function(fast)

        @function.vjp
        def gradient(primals, cotangent, _):
            several = isinstance(primals, (tuple, list))
            gradients = mx.vjp(plain, list(primals) if several else [primals], [cotangent])[1]
            return tuple(gradients) if several else gradients[0]

        return cast(Callable[..., mx.array], function)

    return decorate


@_fused
def _plain_gelu(x: mx.array) -> mx.array:
    return x * 0.5 * (1 + mx.erf(x * math.sqrt(0.5)))


_fast_gelu = _with_gradient_of(_plain_gelu)(cpu.gelu)


def gelu(x: mx.array) -> mx.array:
    """The exact GELU, x * Phi(x). Any shape."""
    return _fast_gelu(x) if vectorizes(x) else _plain_gelu(x)


@_fused
def _plain_gelu_tanh(x: mx.array) -> mx.array:
    return 0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


_fast_gelu_tanh = _with_gradient_of(_plain_gelu_tanh)(cpu.gelu_tanh)


def gelu_tanh(x: mx.array) -> mx.array:
    """The tanh approximation of GELU, up to 4.8e-4 from the exact one. Any shape."""
    return _fast_gelu_tanh(x) if vectorizes(x) else _plain_gelu_tanh(x)


def relu(x: mx.array) -> mx.array:
    """max(x, 0). Any shape."""
    return _few_relu(x) if 0 < x.size <= _FEW_NUMBERS else mx.maximum(x, 0)


_FEW_NUMBERS = 2**13  # where an operation more costs a CPU as much as the work


@mx.compile
def _few_relu(x: mx.array) -> mx.array:
    return mx.maximum(x, 0)


@_fused
def _plain_gate(a: mx.array, b: mx.array) -> mx.array:
    return a * mx.sigmoid(b)


def _plain_glu(x: mx.array) -> mx.array:
    return _plain_gate(*mx.split(x, 2, axis=-1))


_fast_glu = _with_gradient_of(_plain_glu)(cpu.glu)


def glu(x: mx.array) -> mx.array:
    """Gated linear unit over the last axis: (..., 2C) -> (..., C), first half times the sigmoid of the second."""
    return _fast_glu(x) if vectorizes(x) else _plain_glu(x)


@_fused
def _plain_silu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)


_fast_silu = _with_gradient_of(_plain_silu)(cpu.silu)


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x). Any shape."""
    return _fast_silu(x) if vectorizes(x) else _plain_silu(x)


@_fused
def _plain_swiglu(x: mx.array, y: mx.array) -> mx.array:
    return x * mx.sigmoid(x) * y


_fast_swiglu = _with_gradient_of(_plain_swiglu)(cpu.swiglu)


def swiglu(x: mx.array, y: mx.array) -> mx.array:
    """silu(x) * y (Shazeer 2020, arXiv 2002.05202). Two arrays of any one shape."""
    return _fast_swiglu(x, y) if vectorizes(x) else _plain_swiglu(x, y)


@_fused
def _plain_geglu_tanh(x: mx.array, y: mx.array) -> mx.array:
    return 0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))) * y


_fast_geglu_tanh = _with_gradient_of(_plain_geglu_tanh)(cpu.geglu_tanh)


def geglu_tanh(x: mx.array, y: mx.array) -> mx.array:
    """gelu_tanh(x) * y, likewise."""
    return _fast_geglu_tanh(x, y) if vectorizes(x) else _plain_geglu_tanh(x, y)


GATED = {"silu": swiglu, "gelu_tanh": geglu_tanh}  # what checkpoints gate with: activation(x) * y
ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu, "silu": silu}


def _plain_conv_glu(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    if weight.ndim == 2:
        return _plain_glu(mx.addmm(bias, x, weight.T))
    convolve = mx.conv1d if weight.ndim == 3 else mx.conv2d
    return _plain_glu(convolve(x, weight, padding=weight.shape[1] // 2) + bias)


_fast_conv_glu = _with_gradient_of(_plain_conv_glu)(cpu.conv_glu)


def conv_glu(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """The GLU of a convolution that keeps the length: x (B, T, C) or (B, T, F, C) -> the same with half the channels
    of weight (2O, K, C) or (2O, K, K, C), odd K; or with weight (2O, C) of a product, for any x (..., C)."""
    return (_fast_conv_glu if vectorizes(x) else _plain_conv_glu)(x, weight, bias)


def _plain_attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0)


_fast_attention = _with_gradient_of(_plain_attention)(cpu.attention)
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
    if q.shape[2] == 1 and mx.default_device() == _CPU:  # MLX's own copies the keys for every query of a group
        (B, H, _, D), G = q.shape, k.shape[1]
        scaled = _times(q, scale)
        grouped = scaled if G == H else scaled.reshape(B, G, H // G, D)
        scores = grouped @ k.swapaxes(-1, -2)
        if scores.size < _FEW_SCORES or not vectorizes(q):
            out = mx.softmax(scores, axis=-1) @ v
        else:
            weights = exp_below_0(scores - scores.max(axis=-1, keepdims=True))
            out = (weights @ v) / weights.sum(axis=-1, keepdims=True)
        return out if G == H else out.reshape(B, H, 1, -1)
    size = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    if vectorizes(q) and q.shape[1] == k.shape[1] and size >= _SMALL:
        return _fast_attention(q * scale, k, v)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)


@mx.custom_function
def _fast_exp(x: mx.array) -> mx.array:
    return cpu.exp_below_0(x)


@_fast_exp.vjp
def _(_, cotangent, output):
    return cotangent * output


def exp_below_0(x: mx.array) -> mx.array:
    """exp(x) for x <= 0; where MLX's is slow, e^-87 below -87. Any shape."""
    return cast(mx.array, _fast_exp(x)) if vectorizes(x) else mx.exp(x)


def mean(x: mx.array, axes: tuple[int, ...]) -> mx.array:
    """Mean over `axes`, kept as axes of length 1, summed axis by axis and in blocks."""
    count = math.prod(x.shape[axis] for axis in axes)
    for axis in sorted(axis % x.ndim for axis in axes):  # whole rows are summed before what is in a row
        x = _sum(x, axis)
    return x / count


def _sum(x: mx.array, axis: int) -> mx.array:
    """Sum over one axis, kept: blocks of _BLOCK first, then the rest and the partial sums."""
    length = x.shape[axis]
    while length > 2 * _BLOCK:
        blocks = length // _BLOCK
        head, tail = mx.split(x, [blocks * _BLOCK], axis=axis)
        head = mx.unflatten(head, axis, (blocks, _BLOCK)).sum(axis=axis + 1)
        x = mx.concatenate([head, tail.sum(axis=axis, keepdims=True)], axis=axis) if tail.size else head
        length = x.shape[axis]
    return x.sum(axis=axis, keepdims=True)


def mean_var(x: mx.array, axes: tuple[int, ...]) -> tuple[mx.array, mx.array]:
    """Mean and biased variance (about that mean) over `axes`, kept as axes of length 1, in float32."""
    x = x.astype(mx.float32)
    center = mean(x, axes)
    return center, mean(mx.square(x - center), axes)


def _moments(x: mx.array, axes: tuple[int, ...], eps: float) -> tuple[mx.array, mx.array]:
    """Mean and 1 / sqrt(variance + eps) over `axes` and the last one."""
    center, var = mean_var(x, (*(axis % x.ndim for axis in axes), x.ndim - 1))
    return center, mx.rsqrt(var + eps)


def _plain_normalized(x: mx.array, center: mx.array, inverse: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    return (x - center) * inverse * weight + bias


_normalized = _fused(_plain_normalized)


def normalize(
    x: mx.array, weight: mx.array, bias: mx.array, *, axes: tuple[int, ...], num_groups: int = 1, eps: float
) -> mx.array:
    """Normalises x (..., C) over `axes` and the channels of each of `num_groups` groups, then scales and shifts.

    Statistics are accurate at any length and taken in float32; eps stands inside the root. `axes` leaves out the
    channel axis. weight and bias are (C,).
    """
    if not x.size:
        return x
    shape = (num_groups, x.shape[-1] // num_groups)
    axes = tuple(axis % x.ndim for axis in axes)
    grouped = mx.unflatten(x.astype(mx.float32), -1, shape)
    form = _plain_normalized if vectorizes(x) else _normalized  # which on a CPU is a loop over strides
    y = form(grouped, *_moments(grouped, axes, eps), weight.reshape(shape), bias.reshape(shape))
    return mx.flatten(y, -2, -1).astype(x.dtype)


_CUDA = mx.cuda.is_available()
_SEQUENTIAL = 1024  # widths up to here may go through MLX's own statistics


@mx.compile
def _few_layer_norm(x: mx.array, weight: mx.array, bias: mx.array, eps: float) -> mx.array:
    x = x - mx.mean(x, axis=-1, keepdims=True)
    return x * mx.rsqrt(mx.mean(mx.square(x), axis=-1, keepdims=True) + eps) * weight + bias


def layer_norm(x: mx.array, weight: mx.array, bias: mx.array, eps: float) -> mx.array:
    """Layer normalisation over the last axis: biased variance, eps inside the root; any size, and none."""
    width = x.shape[-1]
    if not x.size:
        return x
    if width <= _SEQUENTIAL and vectorizes(x) and x.size <= _FEW * width and weight.dtype == bias.dtype == x.dtype:
        return _few_layer_norm(x, weight, bias, eps)  # where few rows make each operation count, in four
    if width > _SEQUENTIAL or (_CUDA and width % 8):  # MLX 0.32.4 on CUDA: wrong gradients, reads beyond the array
        return normalize(x, weight, bias, axes=(), eps=eps)
    return mx.fast.layer_norm(x, weight, bias, eps)


def _norm_gelu(x: mx.array, center: mx.array, inverse: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    return _plain_gelu(_plain_normalized(x, center, inverse, weight, bias))


_compiled_norm_gelu = _fused(_norm_gelu)


def norm_gelu(x: mx.array, weight: mx.array, bias: mx.array, *, axes: tuple[int, ...], eps: float) -> mx.array:
    """gelu(normalize(x)), for one group."""
    center, inverse = _moments(x, axes, eps)
    if vectorizes(x):
        return gelu((x - center) * (inverse * weight) + bias)
    return _compiled_norm_gelu(x, center, inverse, weight, bias)


def _norm_gate_add(residual, scale, a, b, center, inverse, weight_a, weight_b, bias_a, bias_b):
    value = (a - center) * inverse * weight_a + bias_a
    gate = (b - center) * inverse * weight_b + bias_b
    return residual + value * mx.sigmoid(gate) * scale


_compiled_norm_gate_add = _fused(_norm_gate_add)


def _plain_expand(x, weight, bias, norm_weight, norm_bias, scale, residual, eps):
    y = mx.addmm(bias, x, weight.T)
    halves = [half for array in (norm_weight, norm_bias) for half in mx.split(array, 2)]
    return _compiled_norm_gate_add(residual, scale, *mx.split(y, 2, axis=-1), *_moments(y, (1,), eps), *halves)


@_with_gradient_of(_plain_expand)
def _fast_expand(x, weight, bias, norm_weight, norm_bias, scale, residual, eps):
    """The statistics of y = x weight^T + bias come from those of x, which has fewer channels; the norm's scale and
    shift are rows of the product, so that y itself is never held."""
    C, H = weight.shape[0] // 2, weight.shape[1]
    center = mean(x, (1,))
    centers = center @ weight.T + bias  # (B, 1, ..., 2C), of the channels of y
    mu = mean(centers, (-1,))
    spread = mean(_sum(cpu.products(x - center), 1) * (weight.T @ weight), (-2, -1)) * (H * H / (2 * C) / x.shape[1])
    inverse = mx.rsqrt(spread.reshape(mu.shape) + mean(mx.square(centers - mu), (-1,)) + eps)
    ones = mx.ones((*x.shape[:-1], 1))
    x = mx.concatenate([x * inverse, ones * inverse, ones * (inverse * mu), ones], axis=-1)
    columns = [norm_weight[:, None] * weight, (norm_weight * bias)[:, None], -norm_weight[:, None], norm_bias[:, None]]
    rows = mx.concatenate(columns, axis=1)  # (2C, H + 3)
    out = cpu.add_gated_products(
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
    form = _fast_expand if vectorizes(x) else _plain_expand
    return form(x, weight, bias, norm_weight, norm_bias, scale, residual, mx.array(eps))


@mx.compile
def _few_rms(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    return x * mx.rsqrt(mx.mean(mx.square(x), axis=-1, keepdims=True) + eps) * weight


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """x (..., C) over the root of its mean square plus eps, then scaled by weight (C,); accurate at any width."""
    if not x.size:
        return x
    if x.shape[-1] > _SEQUENTIAL:
        y = x.astype(mx.float32)
        return (y * mx.rsqrt(mean(mx.square(y), (-1,)) + eps) * weight).astype(x.dtype)
    if vectorizes(x) and x.size <= _FEW * x.shape[-1] and weight.dtype == x.dtype:
        return _few_rms(x, weight, eps)  # where few rows make each operation count, in three
    return mx.fast.rms_norm(x, weight, eps).astype(x.dtype)


def overlap_add(pieces: mx.array) -> mx.array:
    """(..., P, L, N) -> (..., L + P - 1, N): piece p of frame l is added into stretch l + p."""
    total = pieces[..., 0, :, :]
    for p in range(1, pieces.shape[-3]):
        piece = pieces[..., p, :, :]
        both = total[..., p:, :] + piece[..., :-1, :]
        total = mx.concatenate([total[..., :p, :], both, piece[..., -1:, :]], axis=-2)
    return total
