"""Matrix products: in floats, packed, and of groups of rows with a matrix each.

Axes: I inputs, O outputs, E matrices, n groups of b rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, cast

import mlx.core as mx

from . import dispatch
from .linux import blas, streams
from .linux.products import few_rows

HALF = (mx.float16, mx.bfloat16)  # a CPU multiplies them in scalar loops, and gathers none


@mx.custom_function
def _dispatched(x: mx.array, weight: mx.array) -> mx.array:
    return streams.by_rows(lambda x, weight: x @ weight.swapaxes(1, 2), x, weight)


@_dispatched.vjp
def _(primals, cotangent, _):
    x, weight = primals
    by_x = streams.by_rows(lambda y, weight: y @ weight, cotangent, weight)
    return by_x, streams.by_rows(lambda y, x: y.swapaxes(1, 2) @ x, cotangent, x)


@mx.custom_function
def _blocked(x: mx.array, weight: mx.array, experts: mx.array) -> mx.array:
    turned = weight.swapaxes(1, 2)
    return streams.by_rows(lambda x, experts: mx.gather_mm(x, turned, rhs_indices=experts), x, experts)


@_blocked.vjp
def _(primals, cotangent, _):
    x, weight, experts = primals
    own = mx.arange(len(weight))[:, None]
    ends = [(experts < own).sum(axis=1), (experts <= own).sum(axis=1)]  # the groups of each lie side by side
    segments = mx.stack(ends, axis=1).astype(mx.uint32) * x.shape[1]
    rows, columns = mx.flatten(x, 0, 1), mx.flatten(cotangent, 0, 1).T
    by_x = streams.by_rows(lambda y, experts: mx.gather_mm(y, weight, rhs_indices=experts), cotangent, experts)
    by_weight = streams.by_rows(lambda some: mx.segmented_mm(columns, rows, some), segments)
    return by_x, by_weight, mx.zeros_like(experts)


def grouped_product(x: mx.array, weight: mx.array, experts: mx.array | None) -> mx.array:
    """x (n, b, I) with the matrices (E, O, I) of experts (n,), or of all in order -> (n, b, O)."""
    if not dispatch.on_cpu():
        turned = weight.swapaxes(1, 2)
        return x @ turned if experts is None else mx.gather_mm(x, turned, rhs_indices=experts)
    x, weight = (y.astype(mx.float32) if y.dtype in HALF else y for y in (x, weight))
    return cast(mx.array, _dispatched(x, weight) if experts is None else _blocked(x, weight, experts))


@lru_cache
def in_stretches(elementwise: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """The function of arrays (n, b, C), whose gradient a CPU computes side by side: exp is slow there."""
    function = mx.custom_function(elementwise)

    @function.vjp
    def gradient(primals, cotangent, _):
        primals = primals if isinstance(primals, (tuple, list)) else (primals,)
        step = -(-len(cotangent) // blas.workers)
        parts = [slice(at, at + step) for at in range(0, len(cotangent), step)]
        ones: Any = [partial(_gradients, elementwise, primals, cotangent, part) for part in parts]
        found: Any = streams.side_by_side(ones)
        gradients = [mx.concatenate(list(pieces)) for pieces in zip(*found, strict=True)]
        return tuple(gradients) if len(gradients) > 1 else gradients[0]

    return cast(Callable[..., mx.array], function)


def _gradients(
    elementwise: Callable[..., mx.array], primals: Sequence[mx.array], cotangent: mx.array, part: slice
) -> list[mx.array]:
    """Of a stretch, which is cut on the worker's own stream: on another it would wait for what that does."""
    return cast(list[mx.array], mx.vjp(elementwise, [x[part] for x in primals], [cotangent[part]])[1])


_FEW = 8  # rows for which a CPU is quicker with pieces of the matrix


def product(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """x weight^T + bias: (..., I), (O, I), (O,) -> (..., O). A CPU does it in float32, few rows as few_rows() and
    many by_rows(). The form depends on shapes and the number of workers alone, so that equal inputs give equal bits,
    whatever else the process computes."""
    if not x.size:  # CUDA refuses products of no rows
        return mx.zeros((*x.shape[:-1], weight.shape[0]), x.dtype)
    if not dispatch.on_cpu():
        return x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)
    if x.itemsize == 2 and x.dtype in HALF and weight.dtype == x.dtype:
        return product(x.astype(mx.float32), weight.astype(mx.float32), bias).astype(x.dtype)
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    if len(rows) <= _FEW:
        y = few_rows(rows, weight, bias)
    elif bias is None:
        y = dispatch.by_rows(lambda rows: rows @ weight.T, rows, len(weight))
    else:
        y = dispatch.by_rows(lambda rows: mx.addmm(bias, rows, weight.T), rows, len(weight))
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], weight.shape[0])


def quantized_product(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    bias: mx.array | None = None,
    *,
    group_size: int,
    bits: int,
) -> mx.array:
    """x weight^T + bias for an affine quantized weight (O, I). A CPU does it in float32, and for three rows or more
    makes floats of the weight: its quantized product is a scalar loop for each row."""
    kind = mx.result_type(x, scales)
    if dispatch.on_cpu():
        x, scales, biases = (y.astype(mx.float32) for y in (x, scales, biases))
        if x.size > 2 * x.shape[-1]:
            weight = mx.dequantize(weight, scales, biases, group_size=group_size, bits=bits)
            return product(x, weight, bias).astype(kind)
    y = _few_packed(x, (weight, scales, biases), group_size, bits)
    return (y if bias is None else y + bias).astype(kind)


def _few_packed(x: mx.array, packed: tuple[mx.array, mx.array, mx.array], group_size: int, bits: int) -> mx.array:
    """x weight^T for few rows x; the rows of a large weight are shared out among a CPU's workers."""

    def form(x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        return mx.quantized_matmul(x, weight, scales, biases, transpose=True, group_size=group_size, bits=bits)

    if blas.workers == 1 or not dispatch.on_cpu() or packed[0].size < _LARGE_PACKED:
        return form(x, *packed)
    rows = x[None] if x.ndim == 1 else mx.flatten(x, 0, -2)
    y = streams.by_rows(lambda *some: form(rows, *some).T, *packed).T
    return y.reshape(*x.shape[:-1], packed[0].shape[0])


_LARGE_PACKED = 2**14  # words
