"""Means, variances and normalisation.

MLX's CPU backend keeps one float32 accumulator per reduction, so a mean over 10^7 elements is off by 1e-3. `mean_var`
sums in stages of 32 instead, as a tree would, and is good to a few 1e-8 on every device.
"""

from __future__ import annotations

import math

import mlx.core as mx

from . import dispatch

_BLOCK = 32  # elements summed in sequence before the partial sums are summed themselves


def mean(x: mx.array, axes: tuple[int, ...]) -> mx.array:
    """Mean over `axes`, kept as axes of length 1, summed axis by axis and in blocks."""
    count = math.prod(x.shape[axis] for axis in axes)
    for axis in sorted(axis % x.ndim for axis in axes):  # whole rows are summed before what is in a row
        x = block_sum(x, axis)
    return x / count


def block_sum(x: mx.array, axis: int) -> mx.array:
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


def moments(x: mx.array, axes: tuple[int, ...], eps: float) -> tuple[mx.array, mx.array]:
    """Mean and 1 / sqrt(variance + eps) over `axes` and the last one."""
    center, var = mean_var(x, (*(axis % x.ndim for axis in axes), x.ndim - 1))
    return center, mx.rsqrt(var + eps)


def plain_normalized(x: mx.array, center: mx.array, inverse: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """(x - center) * inverse * weight + bias, in MLX's own operations."""
    return (x - center) * inverse * weight + bias


_normalized = dispatch.fuse(plain_normalized)


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
    form = plain_normalized if dispatch.vectorizes(x) else _normalized  # which on a CPU is a loop over strides
    y = form(grouped, *moments(grouped, axes, eps), weight.reshape(shape), bias.reshape(shape))
    return mx.flatten(y, -2, -1).astype(x.dtype)


_FEW = 8  # rows where each operation counts
_SEQUENTIAL = 1024  # widths up to here may go through MLX's own statistics


@mx.compile
def _few_layer_norm(x: mx.array, weight: mx.array, bias: mx.array, eps: float) -> mx.array:
    # x less its mean is written in two ways: written in one, mx.compile makes an operation more of it.
    total, n = mx.sum(x, axis=-1, keepdims=True), x.shape[-1]
    variance = mx.mean(mx.square(x + total * (-1 / n)), axis=-1, keepdims=True)
    return (x - total * (1 / n)) * mx.rsqrt(variance + eps) * weight + bias


def layer_norm(x: mx.array, weight: mx.array, bias: mx.array, eps: float) -> mx.array:
    """Layer normalisation over the last axis: biased variance, eps inside the root; any size, and none."""
    width = x.shape[-1]
    if not x.size:
        return x
    if (
        width <= _SEQUENTIAL
        and dispatch.vectorizes(x)
        and x.size <= _FEW * width
        and weight.dtype == bias.dtype == x.dtype
    ):
        return _few_layer_norm(x, weight, bias, eps)  # where few rows make each operation count, in four
    if width > _SEQUENTIAL or (
        dispatch.HAS_CUDA and width % 8
    ):  # MLX 0.32.4 on CUDA: wrong gradients, reads beyond the array
        return normalize(x, weight, bias, axes=(), eps=eps)
    return mx.fast.layer_norm(x, weight, bias, eps)


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
    if dispatch.vectorizes(x) and x.size <= _FEW * x.shape[-1] and weight.dtype == x.dtype:
        return _few_rms(x, weight, eps)  # where few rows make each operation count, in three
    return mx.fast.rms_norm(x, weight, eps).astype(x.dtype)
