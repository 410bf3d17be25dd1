"""Elementwise chains and reductions that every layer shares: the one place where a form may depend on the device.

MLX's CPU backend keeps one float32 accumulator per reduction, so a mean over 10^7 elements is off by 1e-3. `mean_var`
sums in stages of 32 instead, as a tree would, and is good to a few 1e-8 on every device.
"""

from __future__ import annotations

import math
from functools import partial

import mlx.core as mx

_BLOCK = 32  # elements summed in sequence before the partial sums are summed themselves


@partial(mx.compile, shapeless=True)
def gelu(x: mx.array) -> mx.array:
    """The exact GELU, x * Phi(x). Any shape."""
    return x * 0.5 * (1 + mx.erf(x * math.sqrt(0.5)))


@partial(mx.compile, shapeless=True)
def gelu_tanh(x: mx.array) -> mx.array:
    """The tanh approximation of GELU, up to 4.8e-4 from the exact one. Any shape."""
    return 0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


@partial(mx.compile, shapeless=True)
def relu(x: mx.array) -> mx.array:
    """max(x, 0). Any shape."""
    return mx.maximum(x, 0)


@partial(mx.compile, shapeless=True)
def _gate(a: mx.array, b: mx.array) -> mx.array:
    return a * mx.sigmoid(b)


def glu(x: mx.array) -> mx.array:
    """Gated linear unit over the last axis: (..., 2C) -> (..., C), first half times the sigmoid of the second."""
    return _gate(*mx.split(x, 2, axis=-1))


ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu}


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
    """Mean and biased variance over `axes`, kept as axes of length 1. The variance is taken about the mean."""
    center = mean(x, axes)
    return center, mean(mx.square(x - center), axes)


@partial(mx.compile, shapeless=True)
def _normalize(
    x: mx.array, center: mx.array, var: mx.array, weight: mx.array, bias: mx.array, eps: mx.array
) -> mx.array:
    return (x - center) * mx.rsqrt(var + eps) * weight + bias


def normalize(
    x: mx.array, weight: mx.array, bias: mx.array, *, axes: tuple[int, ...], num_groups: int = 1, eps: float
) -> mx.array:
    """Normalises x (..., C) over `axes` and the channels of each of `num_groups` groups, then scales and shifts.

    Statistics are accurate at any length and taken in float32; eps stands inside the root. `axes` leaves out the
    channel axis. weight and bias are (C,).
    """
    channels = x.shape[-1]
    dtype = x.dtype
    axes = tuple(axis % x.ndim for axis in axes)
    grouped = mx.unflatten(x.astype(mx.float32), -1, (num_groups, channels // num_groups))
    center, var = mean_var(grouped, (*axes, grouped.ndim - 1))
    shape = (num_groups, channels // num_groups)
    y = _normalize(grouped, center, var, weight.reshape(shape), bias.reshape(shape), mx.array(eps, mx.float32))
    return mx.flatten(y, -2, -1).astype(dtype)


def overlap_add(pieces: mx.array) -> mx.array:
    """(..., P, L, N) -> (..., L + P - 1, N): piece p of frame l is added into stretch l + p."""
    count = pieces.shape[-3]
    edge = [(0, 0)] * (pieces.ndim - 3)
    total = mx.pad(pieces[..., 0, :, :], [*edge, (0, count - 1), (0, 0)])
    for p in range(1, count):
        total = total + mx.pad(pieces[..., p, :, :], [*edge, (p, count - 1 - p), (0, 0)])
    return total
