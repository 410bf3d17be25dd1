"""Linear layers: their products, in floats and packed, and the views of their matrices that one row takes.

Axes: I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..backend import dispatch
from ..backend.linux import blas
from ..backend.products import product, quantized_product


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
        """(..., I) -> (..., O)."""
        weight, bias = self._views
        row = x if x.ndim == 3 else x.reshape(1, 1, -1)
        y = row @ weight if bias is None else mx.addmm(bias, row, weight)
        return y if x.ndim == 3 else y.reshape(*x.shape[:-1], -1)


def one_row(x: mx.array) -> bool:
    """Whether x (..., I) is a single row."""
    return x.size == x.shape[-1] > 0


def steps(x: mx.array) -> bool:
    """Whether x (..., I) is the row of a step of generation on a CPU."""
    return bool(blas.in_turn) and one_row(x) and x.dtype == mx.float32 and dispatch.on_cpu()


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
        """(..., I) -> (..., O)."""
        return applied(self, x)

    def to_quantized(self, group_size: int | None = None, bits: int | None = None, *_: Any, **__: Any) -> nn.Module:
        """The layer with its matrix quantized."""
        return QuantizedLinear.from_linear(self, group_size or 64, bits or 4)


class QuantizedLinear(nn.QuantizedLinear):
    """nn.QuantizedLinear in affine mode, as quantized_product() computes it."""

    def __call__(self, x: mx.array) -> mx.array:
        """(..., I) -> (..., O)."""
        packed: Any = (self.weight, self.scales, self.biases, self.get("bias"))
        return quantized_product(x, *packed, group_size=self.group_size, bits=self.bits)
