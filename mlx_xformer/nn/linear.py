"""Linear layers, in floats and packed.

Axes: I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..backend.products import product, quantized_product


def apply_linear(layer: nn.Module, x: mx.array) -> mx.array:
    """x (..., I) times the layer's weight, plus its bias if it has one: (..., O)."""
    return product(x, layer["weight"], layer.get("bias"))


class Linear(nn.Linear):
    """nn.Linear, as product() computes it."""

    def __call__(self, x: mx.array) -> mx.array:
        """(..., I) -> (..., O)."""
        return apply_linear(self, x)

    def to_quantized(self, group_size: int | None = None, bits: int | None = None, *_: Any, **__: Any) -> nn.Module:
        """The layer with its matrix quantized."""
        return QuantizedLinear.from_linear(self, group_size or 64, bits or 4)


class QuantizedLinear(nn.QuantizedLinear):
    """nn.QuantizedLinear in affine mode, as quantized_product() computes it."""

    def __call__(self, x: mx.array) -> mx.array:
        """(..., I) -> (..., O)."""
        packed: Any = (self.weight, self.scales, self.biases, self.get("bias"))
        return quantized_product(x, *packed, group_size=self.group_size, bits=self.bits)
