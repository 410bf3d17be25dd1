"""The feed-forward networks of a MoE, as stacked matrices, and the forms of their products.

Axes: T tokens, E experts, k experts a token, I and O what a matrix is given and makes; n groups of b rows of one expert
each, see grouping.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ...backend import activations, dispatch
from ...backend.products import HALF, grouped_product, in_stretches
from .config import MoEConfig


def _single(x: mx.array) -> mx.array:
    """(..., I) -> (..., 1, I), with the strides of an array of its own."""
    return x.reshape(*x.shape[:-1], 1, x.shape[-1])


def _rows(y: mx.array) -> mx.array:
    """(..., 1, O) -> (..., O)."""
    return y.reshape(*y.shape[:-2], y.shape[-1])


class ExpertLinear(nn.Module):
    """The matrices of all experts: weight (E, O, I), bias (E, O) if any."""

    def __init__(self, num_experts: int, given: int, made: int, bias: bool = False):
        super().__init__()
        bound = given**-0.5
        self.weight = mx.random.uniform(-bound, bound, (num_experts, made, given))
        if bias:
            self.bias = mx.zeros((num_experts, made))

    @property
    def dtype(self) -> mx.Dtype:
        """Of what it makes, for x of the same."""
        return cast(mx.Dtype, self.weight.dtype)

    def __call__(self, x: mx.array, experts: mx.array, sorted_indices: bool = False) -> mx.array:
        """x (T, 1 or k, I) through the experts (T, k) -> (T, k, O); or (T, I), (T,) -> (T, O)."""
        if not dispatch.on_cpu():
            turned = self.weight.swapaxes(1, 2)
            y = _rows(mx.gather_mm(_single(x), turned, rhs_indices=experts, sorted_indices=sorted_indices))
        elif self.weight.dtype in HALF:  # the matrices chosen, as a CPU gathers float32 only
            y = (self.weight[experts].astype(mx.float32) @ x.astype(mx.float32)[..., None])[..., 0]
        else:  # a CPU is quicker with the matrix on the left
            y = mx.gather_mm(self.weight, x.astype(mx.float32)[..., None], lhs_indices=experts)[..., 0]
        return y + self.bias[experts] if "bias" in self else y

    def grouped(self, x: mx.array, experts: mx.array | None) -> mx.array:
        """x (n, b, I) through the experts (n,), or all in order -> (n, b, O)."""
        return _biased(grouped_product(x, self.weight, experts), self.get("bias"), experts)

    def to_quantized(self, group_size: int | None = None, bits: int | None = None, *_: Any, **__: Any) -> nn.Module:
        """The layer with its matrices quantized."""
        return QuantizedExpertLinear(self, group_size or 64, bits or 4)


def _biased(y: mx.array, bias: mx.array | None, experts: mx.array | None) -> mx.array:
    if bias is None:
        return y
    return y + (bias if experts is None else bias[experts])[:, None]


class QuantizedExpertLinear(nn.Module):
    """ExpertLinear in affine mode: weight, scales and biases (E, O, packed), bias (E, O) if any.

    A CPU makes floats of all matrices where groups of rows go through them: one layer's at a time, as its quantized
    product is a scalar loop for each row.
    """

    def __init__(self, linear: ExpertLinear, group_size: int = 64, bits: int = 4):
        super().__init__()
        self.group_size, self.bits = group_size, bits
        self.weight, self.scales, self.biases = mx.quantize(linear.weight, group_size, bits)
        if "bias" in linear:
            self.bias = linear.bias
        self.freeze()

    @property
    def dtype(self) -> mx.Dtype:
        """Of what it makes, for x of the same."""
        return cast(mx.Dtype, self.scales.dtype)

    def _packed(self) -> tuple[mx.array, mx.array, mx.array]:
        if not dispatch.on_cpu():
            return self.weight, self.scales, self.biases
        return self.weight, self.scales.astype(mx.float32), self.biases.astype(mx.float32)

    def __call__(self, x: mx.array, experts: mx.array, sorted_indices: bool = False) -> mx.array:
        """x (T, 1 or k, I) through the experts (T, k) -> (T, k, O); or (T, I), (T,) -> (T, O)."""
        x = x.astype(mx.float32) if dispatch.on_cpu() else x
        options: dict[str, Any] = {"group_size": self.group_size, "bits": self.bits, "sorted_indices": sorted_indices}
        y = _rows(mx.gather_qmm(_single(x), *self._packed(), rhs_indices=experts, transpose=True, **options))
        return y + self.bias[experts] if "bias" in self else y

    def grouped(self, x: mx.array, experts: mx.array | None) -> mx.array:
        """x (n, b, I) through the experts (n,), or all in order -> (n, b, O)."""
        options: dict[str, Any] = {"group_size": self.group_size, "bits": self.bits}
        if dispatch.on_cpu():
            y = grouped_product(x, mx.dequantize(*self._packed(), **options), experts)
        elif experts is None:
            y = mx.quantized_matmul(x, *self._packed(), transpose=True, **options)
        else:
            y = mx.gather_qmm(x, *self._packed(), rhs_indices=experts, transpose=True, **options)
        return _biased(y, self.get("bias"), experts)


class Experts(nn.Module):
    """As many feed-forward networks of one kind: gate_proj, up_proj and down_proj, or linear1 and linear2.

    They make float32 of half precisions on a CPU; the result has the dtype of x and the matrices.
    """

    def __init__(self, config: MoEConfig):
        super().__init__()
        E, D, H = config.num_experts, config.embed_dim, config.hidden_dim
        self.activation, self.gated = config.activation, config.gated
        if config.gated:
            self.gate_proj, self.up_proj = ExpertLinear(E, D, H, config.bias), ExpertLinear(E, D, H, config.bias)
            self.down_proj = ExpertLinear(E, H, D, config.bias)
        else:
            self.linear1, self.linear2 = ExpertLinear(E, D, H, config.bias), ExpertLinear(E, H, D, config.bias)

    @property
    def dtype(self) -> mx.Dtype:
        """Of what they make, for x of the same."""
        return cast(mx.Dtype, (self.down_proj if self.gated else self.linear2).dtype)

    def __call__(self, x: mx.array, experts: mx.array, sorted_indices: bool = False) -> mx.array:
        """x (T, 1, D) through the experts (T, k) -> (T, k, D); or (T, D), (T,) -> (T, D)."""
        return self._network(lambda layer, x: layer(x, experts, sorted_indices), x)

    def sorted(self, x: mx.array, experts: mx.array) -> mx.array:
        """x (T, D) through the experts (T, k) -> (T, k, D), in their order, in which a GPU reads each matrix once."""
        k, experts = experts.shape[1], mx.flatten(experts)
        order = mx.argsort(experts)
        y = self(x[order // k], experts[order], True)
        return mx.unflatten(y[mx.argsort(order)], 0, (-1, k))

    def grouped(self, x: mx.array, experts: mx.array | None) -> mx.array:
        """x (n, b, D) through the experts (n,), or all in order -> (n, b, D)."""
        return self._network(lambda layer, x: layer.grouped(x, experts), x, in_stretches if dispatch.on_cpu() else None)

    def _network(
        self,
        through: Callable[[Any, mx.array], mx.array],
        x: mx.array,
        form: Callable[[Callable], Callable[..., mx.array]] | None = None,
    ) -> mx.array:
        activation: Callable[..., mx.array] = (activations.GATED if self.gated else activations.ACTIVATIONS)[
            self.activation
        ]
        activation = activation if form is None else form(activation)
        if self.gated:
            return through(self.down_proj, activation(through(self.gate_proj, x), through(self.up_proj, x)))
        return through(self.linear2, activation(through(self.linear1, x)))
