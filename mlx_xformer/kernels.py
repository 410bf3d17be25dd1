"""Elementwise chains and reductions that every layer shares: the one place where a form may depend on the device.

MLX's CPU backend keeps one float32 accumulator per reduction, so a mean over 10^7 elements is off by 1e-3. `mean_var`
sums in stages of 32 instead, as a tree would, and is good to a few 1e-8 on every device.

On Linux its exp, erf and sigmoid are scalar calls, 10 to 30 ns an element. Where a C++ compiler lets mx.compile fuse,
float32 chains use rational and polynomial forms instead, which vectorise and are good to 4e-7; their gradients are
those of the plain forms.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from typing import cast

import mlx.core as mx

_BLOCK = 32  # elements summed in sequence before the partial sums are summed themselves
_FUSES = sys.platform == "linux" and shutil.which("g++") is not None and "MLX_DISABLE_COMPILE" not in os.environ
_CPU = mx.Device(mx.cpu)

# x P(x^2) / Q(x^2), lowest power first, from bench/fit_rational.py.
_ERF = (
    4.0,
    (1.12837898, 0.196248762, 0.0534674435, 0.00400363533, 0.000288041, 1.97482888e-06),
    (1.0, 0.507252095, 0.116476332, 0.0154444003, 0.00121635705, 3.7480829e-05),
)
_TANH = (
    9.0,
    (0.999999906, 0.133731931, 0.0034865764, 2.04717397e-05, 1.31841002e-08),
    (1.0, 0.4670649, 0.0258419584, 0.000327137636, 7.70261227e-07),
)


def vectorizes(x: mx.array) -> bool:
    """Whether the rational forms serve x: float32, on a CPU whose built-in functions are scalar calls."""
    return _FUSES and x.dtype == mx.float32 and mx.default_device() == _CPU


def _odd_rational(x: mx.array, limit: float, p: tuple[float, ...], q: tuple[float, ...]) -> mx.array:
    x = mx.minimum(mx.maximum(x, -limit), limit)
    square = x * x
    top, bottom = square * p[-1] + p[-2], square * q[-1] + q[-2]
    for c in p[-3::-1]:
        top = top * square + c
    for c in q[-3::-1]:
        bottom = bottom * square + c
    return x * top / bottom


def _rational_sigmoid(x: mx.array) -> mx.array:
    return 0.5 + 0.5 * _odd_rational(0.5 * x, *_TANH)


def _rational_gelu(x: mx.array) -> mx.array:
    return x * (0.5 + 0.5 * _odd_rational(x * math.sqrt(0.5), *_ERF))


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


def _plain_gelu(x: mx.array) -> mx.array:
    return x * 0.5 * (1 + mx.erf(x * math.sqrt(0.5)))


_compiled_gelu = mx.compile(_plain_gelu, shapeless=True)
_fast_gelu = _with_gradient_of(_plain_gelu)(mx.compile(_rational_gelu, shapeless=True))


def gelu(x: mx.array) -> mx.array:
    """The exact GELU, x * Phi(x). Any shape."""
    return _fast_gelu(x) if vectorizes(x) else _compiled_gelu(x)


@partial(mx.compile, shapeless=True)
def gelu_tanh(x: mx.array) -> mx.array:
    """The tanh approximation of GELU, up to 4.8e-4 from the exact one. Any shape."""
    return 0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


@partial(mx.compile, shapeless=True)
def relu(x: mx.array) -> mx.array:
    """max(x, 0). Any shape."""
    return mx.maximum(x, 0)


def _plain_gate(a: mx.array, b: mx.array) -> mx.array:
    return a * mx.sigmoid(b)


def _rational_gate(a: mx.array, b: mx.array) -> mx.array:
    return a * _rational_sigmoid(b)


_compiled_gate = mx.compile(_plain_gate, shapeless=True)
_fast_gate = _with_gradient_of(_plain_gate)(mx.compile(_rational_gate, shapeless=True))


def glu(x: mx.array) -> mx.array:
    """Gated linear unit over the last axis: (..., 2C) -> (..., C), first half times the sigmoid of the second."""
    halves = mx.split(x, 2, axis=-1)
    return _fast_gate(*halves) if vectorizes(x) else _compiled_gate(*halves)


ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu}


# exp(x) = 2^n exp(r), r = x - n log 2, for x <= 0: the exponent's bits in one pass, the polynomial in the next.
_LOG2 = (0.693359375, -2.12194440e-4)  # in two parts, the first with zeros at its end
_EXP = (0.5, 1 / 6, 1 / 24, 1 / 120, 1 / 720, 1 / 5040)
_LOWEST = -87.0  # its exp is still a normal number, so that the exponent's bits are one
_ROUND = 12582912.0  # 1.5 * 2^23: adding and taking it off rounds to a whole number


@partial(mx.compile, shapeless=True)
def _exponent_bits(scores: mx.array, top: mx.array) -> mx.array:
    x = mx.maximum(scores - top, _LOWEST)
    return ((x * (1 / math.log(2)) + _ROUND) - _ROUND + 127.0).astype(mx.int32) * 2**23


@partial(mx.compile, shapeless=True)
def _times_remainder(scores: mx.array, top: mx.array, power: mx.array) -> mx.array:
    x = mx.maximum(scores - top, _LOWEST)
    n = (x * (1 / math.log(2)) + _ROUND) - _ROUND
    r = x - n * _LOG2[0] - n * _LOG2[1]
    p = r * _EXP[-1] + _EXP[-2]
    for c in _EXP[-3::-1]:
        p = p * r + c
    return (p * r * r + r + 1.0) * power


def _exp_below(scores: mx.array, top: mx.array) -> mx.array:
    """exp(scores - top), for scores <= top."""
    return _times_remainder(scores, top, _exponent_bits(scores, top).view(mx.float32))


def _plain_attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0)


@_with_gradient_of(_plain_attention)
def _row_blocked_attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    B, H, L, _ = q.shape
    keys = k.swapaxes(-1, -2)
    # A column of ones beside the values brings the sum of the weights out of the same product.
    values = mx.concatenate([v, mx.ones((*v.shape[:-1], 1))], axis=-1)
    rows = max(16, _SCORES // (B * H * k.shape[2]))
    out = []
    for first in range(0, L, rows):
        scores = q[:, :, first : first + rows] @ keys
        weighted = _exp_below(scores, scores.max(axis=-1, keepdims=True)) @ values
        out.append(weighted[..., :-1] / weighted[..., -1:])
    return mx.concatenate(out, axis=2)


_SCORES = 2**20  # scores that a block of rows holds at once
_SMALL = 2**16  # scores below which MLX's own attention is as fast


def unmasked_attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """softmax(q k^T * scale) v for q (B, H, L, D), k (B, G, S, D), v (B, G, S, Dv).

    Where MLX has no fused form and exp is slow, by blocks of rows, so that the scores are never held at once.
    """
    size = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    if vectorizes(q) and q.shape[1] == k.shape[1] and size >= _SMALL:
        return _row_blocked_attention(q * scale, k, v)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)


def mean(x: mx.array, axes: tuple[int, ...]) -> mx.array:
    """Mean over `axes`, kept as axes of length 1, summed axis by axis and in blocks."""
    count = math.prod(x.shape[axis] for axis in axes)
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
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


_normalized = mx.compile(_plain_normalized, shapeless=True)


def normalize(
    x: mx.array, weight: mx.array, bias: mx.array, *, axes: tuple[int, ...], num_groups: int = 1, eps: float
) -> mx.array:
    """Normalises x (..., C) over `axes` and the channels of each of `num_groups` groups, then scales and shifts.

    Statistics are accurate at any length and taken in float32; eps stands inside the root. `axes` leaves out the
    channel axis. weight and bias are (C,).
    """
    shape = (num_groups, x.shape[-1] // num_groups)
    axes = tuple(axis % x.ndim for axis in axes)
    grouped = mx.unflatten(x.astype(mx.float32), -1, shape)
    y = _normalized(grouped, *_moments(grouped, axes, eps), weight.reshape(shape), bias.reshape(shape))
    return mx.flatten(y, -2, -1).astype(x.dtype)


def _norm_gelu(activation: Callable[[mx.array], mx.array]) -> Callable[..., mx.array]:
    return lambda *normed: activation(_plain_normalized(*normed))


def _norm_gate(sigmoid: Callable[[mx.array], mx.array]) -> Callable[..., mx.array]:
    def chain(residual, scale, a, b, center, inverse, weight_a, weight_b, bias_a, bias_b):
        value = (a - center) * inverse * weight_a + bias_a
        gate = (b - center) * inverse * weight_b + bias_b
        return residual + value * sigmoid(gate) * scale

    return chain


_PLAIN_NORM_GELU, _PLAIN_NORM_GATE = _norm_gelu(_plain_gelu), _norm_gate(mx.sigmoid)
_compiled_norm_gelu = mx.compile(_PLAIN_NORM_GELU, shapeless=True)
_compiled_norm_gate = mx.compile(_PLAIN_NORM_GATE, shapeless=True)
_fast_norm_gelu = _with_gradient_of(_PLAIN_NORM_GELU)(mx.compile(_norm_gelu(_rational_gelu), shapeless=True))
_fast_norm_gate = _with_gradient_of(_PLAIN_NORM_GATE)(mx.compile(_norm_gate(_rational_sigmoid), shapeless=True))


def norm_gelu(x: mx.array, weight: mx.array, bias: mx.array, *, axes: tuple[int, ...], eps: float) -> mx.array:
    """gelu(normalize(x)) in one chain, for one group."""
    form = _fast_norm_gelu if vectorizes(x) else _compiled_norm_gelu
    return form(x, *_moments(x, axes, eps), weight, bias)


def norm_glu_add(
    x: mx.array,
    weight: mx.array,
    bias: mx.array,
    *,
    axes: tuple[int, ...],
    eps: float,
    scale: mx.array,
    residual: mx.array,
) -> mx.array:
    """residual + scale * glu(normalize(x)) in one chain, for one group: x (..., 2C), residual (..., C), scale (C,)."""
    form = _fast_norm_gate if vectorizes(x) else _compiled_norm_gate
    halves = [half for array in (weight, bias) for half in mx.split(array, 2)]
    return form(residual, scale, *mx.split(x, 2, axis=-1), *_moments(x, axes, eps), *halves)


def overlap_add(pieces: mx.array) -> mx.array:
    """(..., P, L, N) -> (..., L + P - 1, N): piece p of frame l is added into stretch l + p."""
    count = pieces.shape[-3]
    edge = [(0, 0)] * (pieces.ndim - 3)
    total = mx.pad(pieces[..., 0, :, :], [*edge, (0, count - 1), (0, 0)])
    for p in range(1, count):
        total = total + mx.pad(pieces[..., p, :, :], [*edge, (p, count - 1 - p), (0, 0)])
    return total
