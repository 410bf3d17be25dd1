"""Linear layers: their products, in floats and packed, and the views of their matrices that one row takes.

Axes: I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from . import cpu, openblas, runtime
from .kernels import by_rows

_CPU = mx.Device(mx.cpu)
_FEW = 8  # rows for which a CPU is quicker with pieces of the matrix
_HALF = (mx.float16, mx.bfloat16)  # a CPU multiplies them in scalar loops


def product(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """x weight^T + bias: (..., I), (O, I), (O,) -> (..., O). A CPU does it in float32, few rows with pieces of the
    weight and many by_rows."""
    if not x.size:  # CUDA refuses products of no rows
        return mx.zeros((*x.shape[:-1], weight.shape[0]), x.dtype)
    if mx.default_device() != _CPU:
        return x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)
    if x.dtype in _HALF and weight.dtype == x.dtype:
        return product(x.astype(mx.float32), weight.astype(mx.float32), bias).astype(x.dtype)
    rows = x[None] if x.ndim == 1 else mx.flatten(x, 0, -2)
    if len(rows) <= _FEW:
        y = cpu.few_rows(rows, weight)
        y = y if bias is None else y + bias
    elif any(openblas.in_turn):
        y = rows @ weight.T if bias is None else mx.addmm(bias, rows, weight.T)
    elif bias is None:
        y = by_rows(lambda rows: rows @ weight.T, rows, len(weight))
    else:
        y = by_rows(lambda rows: mx.addmm(bias, rows, weight.T), rows, len(weight))
    return y.reshape(*x.shape[:-1], weight.shape[0])


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
    if mx.default_device() == _CPU:
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

    if runtime.workers == 1 or mx.default_device() != _CPU or packed[0].size < _LARGE_PACKED:
        return form(x, *packed)
    rows = x[None] if x.ndim == 1 else mx.flatten(x, 0, -2)
    y = cpu.by_rows(lambda *some: form(rows, *some).T, *packed).T
    return y.reshape(*x.shape[:-1], packed[0].shape[0])


_LARGE_PACKED = 2**14  # words


class Row:
    """The product of one row with a weight (O, I), plus a bias (O,) or None, by views of both that have the row's form.
    A step of generation has some hundred operations of microseconds, and views made anew are half of them. It is not
    kept beyond decoding.stepping(), as a weight may be changed in place."""

    def __init__(self, weight: mx.array, bias: mx.array | None):
        self._given = weight, bias
        self._views = weight.T[None], None if bias is None else bias[None, None]

    def holds(self, weight: mx.array, bias: mx.array | None) -> bool:
        """Whether it is of these very arrays."""
        return weight is self._given[0] and bias is self._given[1]

    def __call__(self, x: mx.array) -> mx.array:
        """(..., I) -> (..., O)"""
        weight, bias = self._views
        row = x if x.ndim == 3 else x.reshape(1, 1, -1)
        y = row @ weight if bias is None else mx.addmm(bias, row, weight)
        return y if x.ndim == 3 else y.reshape(*x.shape[:-1], -1)


def one_row(x: mx.array) -> bool:
    """Whether x (..., I) is a single row."""
    return x.size == x.shape[-1] > 0


def steps(x: mx.array) -> bool:
    """Whether x (..., I) is the row of a step of generation on a CPU."""
    return bool(openblas.in_turn) and one_row(x) and x.dtype == mx.float32 and mx.default_device() == _CPU


def applied(layer: nn.Module, x: mx.array) -> mx.array:
    """layer(x), as product() computes it, or in steps a Row that the layer has until release()."""
    weight, bias = layer["weight"], layer.get("bias")
    if not steps(x):
        return product(x, weight, bias)
    row = vars(layer).get("_row")
    if row is None or not row.holds(weight, bias):
        row = layer._row = Row(weight, bias)
    return row(x)


def release(module: nn.Module) -> None:
    """Lets go of what applied() has made for a module."""
    vars(module).pop("_row", None)


class Linear(nn.Linear):
    """nn.Linear, as applied() computes it."""

    def __call__(self, x: mx.array) -> mx.array:
        return applied(self, x)

    def to_quantized(self, group_size: int | None = None, bits: int | None = None, *_: Any, **__: Any) -> nn.Module:
        """The layer with its matrix quantized."""
        return QuantizedLinear.from_linear(self, group_size or 64, bits or 4)


class QuantizedLinear(nn.QuantizedLinear):
    """nn.QuantizedLinear in affine mode, as quantized_product() computes it."""

    def __call__(self, x: mx.array) -> mx.array:
        packed: Any = (self.weight, self.scales, self.biases, self.get("bias"))
        return quantized_product(x, *packed, group_size=self.group_size, bits=self.bits)
