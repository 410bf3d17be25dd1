"""The feed-forward networks of a MoE, as stacked matrices, and the forms of their products.

Axes: T tokens, E experts, k experts a token, I and O what a matrix is given and makes; n groups of b rows of one expert
each, see grouping.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from . import cpu, kernels, runtime
from .moe_config import MoEConfig

_HALF = (mx.float16, mx.bfloat16)  # a CPU multiplies them in scalar loops, and gathers none


def on_cpu() -> bool:
    """Whether MLX's default device is a CPU."""
    return mx.default_device() == mx.Device(mx.cpu)


# Products of groups of rows. Each gradient is shared out by itself: MLX computes what was asked for last, so that the
# gradients by weights, side by side with those by x, would all run at the end on one core.


@mx.custom_function
def _dispatched(x: mx.array, weight: mx.array) -> mx.array:
    return cpu.by_rows(lambda x, weight: x @ weight.swapaxes(1, 2), x, weight)


@_dispatched.vjp
def _(primals, cotangent, _):
    x, weight = primals
    by_x = cpu.by_rows(lambda y, weight: y @ weight, cotangent, weight)
    return by_x, cpu.by_rows(lambda y, x: y.swapaxes(1, 2) @ x, cotangent, x)


@mx.custom_function
def _blocked(x: mx.array, weight: mx.array, experts: mx.array) -> mx.array:
    turned = weight.swapaxes(1, 2)
    return cpu.by_rows(lambda x, experts: mx.gather_mm(x, turned, rhs_indices=experts), x, experts)


@_blocked.vjp
def _(primals, cotangent, _):
    x, weight, experts = primals
    own = mx.arange(len(weight))[:, None]
    ends = [(experts < own).sum(axis=1), (experts <= own).sum(axis=1)]  # the groups of each lie side by side
    segments = mx.stack(ends, axis=1).astype(mx.uint32) * x.shape[1]
    rows, columns = mx.flatten(x, 0, 1), mx.flatten(cotangent, 0, 1).T
    by_x = cpu.by_rows(lambda y, experts: mx.gather_mm(y, weight, rhs_indices=experts), cotangent, experts)
    by_weight = cpu.by_rows(lambda some: mx.segmented_mm(columns, rows, some), segments)
    return by_x, by_weight, mx.zeros_like(experts)


def grouped_product(x: mx.array, weight: mx.array, experts: mx.array | None) -> mx.array:
    """x (n, b, I) with the matrices (E, O, I) of experts (n,), or of all in order -> (n, b, O)."""
    if not on_cpu():
        turned = weight.swapaxes(1, 2)
        return x @ turned if experts is None else mx.gather_mm(x, turned, rhs_indices=experts)
    x, weight = (y.astype(mx.float32) if y.dtype in _HALF else y for y in (x, weight))
    return cast(mx.array, _dispatched(x, weight) if experts is None else _blocked(x, weight, experts))


@lru_cache
def _in_stretches(elementwise: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """The function of arrays (n, b, C), whose gradient a CPU computes side by side: exp is slow there."""
    function = mx.custom_function(elementwise)

    @function.vjp
    def gradient(primals, cotangent, _):
        primals = primals if isinstance(primals, (tuple, list)) else (primals,)
        step = -(-len(cotangent) // runtime.workers)
        parts = [slice(at, at + step) for at in range(0, len(cotangent), step)]
        ones: Any = [partial(_gradients, elementwise, primals, cotangent, part) for part in parts]
        found: Any = cpu.side_by_side(ones)
        gradients = [mx.concatenate(list(pieces)) for pieces in zip(*found, strict=True)]
        return tuple(gradients) if len(gradients) > 1 else gradients[0]

    return cast(Callable[..., mx.array], function)


def _gradients(
    elementwise: Callable[..., mx.array], primals: Sequence[mx.array], cotangent: mx.array, part: slice
) -> list[mx.array]:
    """Of a stretch, which is cut on the worker's own stream: on another it would wait for what that does."""
    return cast(list[mx.array], mx.vjp(elementwise, [x[part] for x in primals], [cotangent[part]])[1])


# Products of single rows. MLX 0.32.4 on CUDA (and before 0.32.2 on Metal) takes the stride of an axis that indexing has
# inserted for that of rows, if indices are sorted, and so all rows but the first are wrong. That of reshape() is right,
# and so is that of the gradient, which is reshaped back.


def _single(x: mx.array) -> mx.array:
    """(..., I) -> (..., 1, I), with the strides of an array of its own."""
    return x.reshape(*x.shape[:-1], 1, x.shape[-1])


def _rows(y: mx.array) -> mx.array:
    """(..., 1, O) -> (..., O)"""
    return y.reshape(*y.shape[:-2], y.shape[-1])


# Modules


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
        if not on_cpu():
            turned = self.weight.swapaxes(1, 2)
            y = _rows(mx.gather_mm(_single(x), turned, rhs_indices=experts, sorted_indices=sorted_indices))
        elif self.weight.dtype in _HALF:  # the matrices chosen, as a CPU gathers float32 only
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
    """ExpertLinear in affine mode: weight, scales and biases (E, O, packed), bias (E, O) if any. A CPU makes floats of
    all matrices where groups of rows go through them: one layer's at a time, as its quantized product is a scalar loop
    for each row."""

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
        if not on_cpu():
            return self.weight, self.scales, self.biases
        return self.weight, self.scales.astype(mx.float32), self.biases.astype(mx.float32)

    def __call__(self, x: mx.array, experts: mx.array, sorted_indices: bool = False) -> mx.array:
        """x (T, 1 or k, I) through the experts (T, k) -> (T, k, O); or (T, I), (T,) -> (T, O)."""
        x = x.astype(mx.float32) if on_cpu() else x
        options: dict[str, Any] = {"group_size": self.group_size, "bits": self.bits, "sorted_indices": sorted_indices}
        y = _rows(mx.gather_qmm(_single(x), *self._packed(), rhs_indices=experts, transpose=True, **options))
        return y + self.bias[experts] if "bias" in self else y

    def grouped(self, x: mx.array, experts: mx.array | None) -> mx.array:
        """x (n, b, I) through the experts (n,), or all in order -> (n, b, O)."""
        options: dict[str, Any] = {"group_size": self.group_size, "bits": self.bits}
        if on_cpu():
            y = grouped_product(x, mx.dequantize(*self._packed(), **options), experts)
        elif experts is None:
            y = mx.quantized_matmul(x, *self._packed(), transpose=True, **options)
        else:
            y = mx.gather_qmm(x, *self._packed(), rhs_indices=experts, transpose=True, **options)
        return _biased(y, self.get("bias"), experts)


class Experts(nn.Module):
    """As many feed-forward networks of one kind: gate_proj, up_proj and down_proj, or linear1 and linear2. They make
    float32 of half precisions on a CPU; the result has the dtype of x and the matrices."""

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
        return self._network(lambda layer, x: layer.grouped(x, experts), x, _in_stretches if on_cpu() else None)

    def _network(
        self,
        through: Callable[[Any, mx.array], mx.array],
        x: mx.array,
        form: Callable[[Callable], Callable[..., mx.array]] | None = None,
    ) -> mx.array:
        activation: Callable[..., mx.array] = (kernels.GATED if self.gated else kernels.ACTIVATIONS)[self.activation]
        activation = activation if form is None else form(activation)
        if self.gated:
            return through(self.down_proj, activation(through(self.gate_proj, x), through(self.up_proj, x)))
        return through(self.linear2, activation(through(self.linear1, x)))
