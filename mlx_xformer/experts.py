"""The feed-forward networks of a MoE, as stacked matrices, and the forms of their products.

Axes: T tokens, E experts, k experts a token, I and O what a matrix is given and makes; n groups of b rows of one expert
each, into which tokens are spread: E of them, in order ("dispatch"), or as many as it takes ("blocks").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn

from . import cpu, kernels, runtime
from .moe_config import MoEConfig
from .routing import places

_HALF = (mx.float16, mx.bfloat16)  # a CPU multiplies them in scalar loops, and gathers none


def on_cpu() -> bool:
    """Whether MLX's default device is a CPU."""
    return mx.default_device() == mx.Device(mx.cpu)


class Table(NamedTuple):
    """Which token each row of n groups of b holds, and where the choices of the tokens are.

    source (n b,): a token, or T for a row that holds none. place (T, k): a row, or n b where the expert was full, which
    `full` says can be. experts (n,): of the groups, None for those in order.
    """

    source: mx.array
    place: mx.array
    rows: int
    experts: mx.array | None
    full: bool


def dispatch(experts: mx.array, num_experts: int, rows: int) -> Table:
    """A group for each expert: `rows` of the choices (T, k), those of the first tokens."""
    place, _ = places(experts, num_experts)
    full = rows < len(experts)
    at = experts * rows + place
    if full:
        at = mx.where(place < rows, at, num_experts * rows)
    return Table(_source(at, num_experts * rows), at, rows, None, full)


def blocks(experts: mx.array, num_experts: int, rows: int) -> Table:
    """As many groups for each expert as its choices (T, k) fill; those at the end may hold none."""
    place, load = places(experts, num_experts)
    ends = mx.cumsum((load + (rows - 1)) // rows)  # (E,), in groups
    groups = num_groups(experts.size, num_experts, rows)
    at = mx.take(mx.concatenate([mx.zeros((1,), ends.dtype), ends[:-1]]) * rows, experts) + place
    which = mx.minimum((mx.arange(groups)[:, None] >= ends).sum(axis=1), num_experts - 1)
    return Table(_source(at, groups * rows), at, rows, which, False)


def num_groups(choices: int, num_experts: int, rows: int) -> int:
    """The most groups of so many rows that as many choices fill, at any load."""
    return (choices + min(choices, num_experts) * (rows - 1)) // rows


def _source(at: mx.array, size: int) -> mx.array:
    """(T, k) -> (size,): the inverse."""
    T, k = at.shape
    source = mx.full((size + 1,), T, mx.int32)
    source[mx.flatten(at)] = mx.flatten(mx.broadcast_to(mx.arange(T, dtype=mx.int32)[:, None], (T, k)))
    return source[:-1]


def _below(x: mx.array) -> mx.array:
    """x (R, C) with a row of zeros below."""
    return mx.concatenate([x, mx.zeros((1, x.shape[1]), x.dtype)])


@mx.custom_function
def _spread(x: mx.array, source: mx.array, place: mx.array) -> mx.array:
    return _below(x)[source]


@_spread.vjp
def _(primals, cotangent, _):
    x, source, place = primals
    return _below(cotangent)[place].sum(axis=1), mx.zeros_like(source), mx.zeros_like(place)


def spread(x: mx.array, table: Table) -> mx.array:
    """x (T, D) -> (n, b, D). The gradient gathers too: MLX's scatters go element by element on a CPU."""
    rows = cast(mx.array, _spread(x, table.source, table.place))
    return mx.unflatten(rows, 0, (-1, table.rows))


def _weighted(rows: mx.array, weights: mx.array) -> mx.array:
    return (rows * weights[..., None]).sum(axis=1)


@mx.custom_function
def _collect(y: mx.array, weights: mx.array, source: mx.array, place: mx.array) -> mx.array:
    return _weighted(y[place], weights)


@mx.custom_function
def _collect_kept(y: mx.array, weights: mx.array, source: mx.array, place: mx.array) -> mx.array:
    return _weighted(_below(y)[place], weights)


def _uncollect(primals: tuple[mx.array, ...], cotangent: mx.array, _: Any) -> tuple[mx.array, ...]:
    y, weights, source, place = primals
    at = mx.zeros((len(source) + 1,), weights.dtype)
    at[mx.flatten(place)] = mx.flatten(weights)
    by_y = _below(cotangent)[source] * at[:-1, None]
    by_weights = (_below(y)[place] * cotangent[:, None]).sum(axis=-1)
    return by_y.astype(y.dtype), by_weights, mx.zeros_like(source), mx.zeros_like(place)


_collect.vjp(_uncollect)
_collect_kept.vjp(_uncollect)


def collect(y: mx.array, weights: mx.array, table: Table) -> mx.array:
    """y (n, b, D), weights (T, k) -> (T, D): the weighted sums of what the tokens chose and found."""
    form = _collect_kept if table.full else _collect
    return cast(mx.array, form(mx.flatten(y, 0, 1), weights, table.source, table.place))


# Products of groups of rows


def _by_weight(cotangent: mx.array, x: mx.array) -> mx.array:
    return cotangent.swapaxes(1, 2) @ x


def _both(by_x: Callable[..., mx.array], arrays: tuple[mx.array, ...], by_weight: Callable[[], mx.array]) -> list:
    """Both gradients of a product side by side: that by x in as many stretches as leave each worker one task."""
    stretches = max(1, runtime.workers - 1)
    step = -(-len(arrays[0]) // stretches)
    starts = range(0, len(arrays[0]), step)
    tasks = [by_weight, *(lambda at=at: by_x(*(a[at : at + step] for a in arrays)) for at in starts)]
    weight, *parts = kernels.side_by_side(tasks)
    return [parts[0] if len(parts) == 1 else mx.concatenate(parts), weight]


@mx.custom_function
def _dispatched(x: mx.array, weight: mx.array) -> mx.array:
    return cpu.by_rows(lambda x, weight: x @ weight.swapaxes(1, 2), x, weight)


@_dispatched.vjp
def _(primals, cotangent, _):
    x, weight = primals
    return tuple(_both(lambda y, w: y @ w, (cotangent, weight), lambda: _by_weight(cotangent, x)))


@mx.custom_function
def _blocked(x: mx.array, weight: mx.array, experts: mx.array) -> mx.array:
    turned = weight.swapaxes(1, 2)
    return cpu.by_rows(lambda x, experts: mx.gather_mm(x, turned, rhs_indices=experts), x, experts)


@_blocked.vjp
def _(primals, cotangent, _):
    x, weight, experts = primals

    def by_weight() -> mx.array:
        groups = mx.flatten(_by_weight(cotangent, x), 1, 2)  # (n, O I), summed by expert
        hot = (mx.arange(len(weight))[:, None] == experts).astype(x.dtype)
        return (hot @ groups).reshape(weight.shape)

    by_x = lambda y, experts: mx.gather_mm(y, weight, rhs_indices=experts)  # noqa: E731
    return (*_both(by_x, (cotangent, experts), by_weight), mx.zeros_like(experts))


def grouped_product(x: mx.array, weight: mx.array, experts: mx.array | None) -> mx.array:
    """x (n, b, I) with the matrices (E, O, I) of experts (n,), or of all in order -> (n, b, O)."""
    if not on_cpu():
        turned = weight.swapaxes(1, 2)
        return x @ turned if experts is None else mx.gather_mm(x, turned, rhs_indices=experts)
    x, weight = (y.astype(mx.float32) if y.dtype in _HALF else y for y in (x, weight))
    return cast(mx.array, _dispatched(x, weight) if experts is None else _blocked(x, weight, experts))


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
            y = mx.gather_mm(x[..., None, :], turned, rhs_indices=experts, sorted_indices=sorted_indices)[..., 0, :]
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
        y = mx.gather_qmm(
            x[..., None, :],
            *self._packed(),
            rhs_indices=experts,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            sorted_indices=sorted_indices,
        )[..., 0, :]
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
        return self._network(lambda layer, x: layer.grouped(x, experts), x)

    def _network(self, through: Callable[[Any, mx.array], mx.array], x: mx.array) -> mx.array:
        activation = kernels.ACTIVATIONS[self.activation]
        if self.gated:
            gate, up = through(self.gate_proj, x), through(self.up_proj, x)
            return through(self.down_proj, activation(gate) * up)
        return through(self.linear2, activation(through(self.linear1, x)))
