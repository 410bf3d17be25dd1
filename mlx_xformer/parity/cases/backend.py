"""Samples of activations, statistics and chains of operations that are fused.

Axes: B batch, T time, F frequencies, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ...backend import activations, fused, norms
from ...reference import backend as twin
from ...reference.nn import layers as twin_layers
from ..samples import NO_QUOTIENT, Case, Rng, Sample, described, function, signal

_KINK = "relu has no derivative at 0"


# Activations


def _elementwise(rng: Rng, *, special: np.ndarray, kink: bool = False) -> Iterator[Sample]:
    shapes = [(2,), (7, 22), (1, 2), (0, 6), (3, 0, 4), (2, 3, 5, 8), (1, 1, 2, 1, 4), (13, 38), (101, 26), (3001, 14)]
    for shape in shapes:
        for width in (1.0, 4.0):
            yield Sample(described(shape=shape, spread=width), {"x": rng.normal(size=shape) * width})
    yield Sample("shape=(5,6) (views with gaps)", {"x": rng.normal(size=(5, 6))}, strided=True)
    yield Sample("-40 .. 40", {"x": np.linspace(-40, 40, 4002).reshape(-1, 6) + 1e-3})
    why = _KINK if kink else NO_QUOTIENT
    yield Sample("NaN, infinities, zeros, 1e4", {"x": special}, skip_vjp=why)


_SPECIAL = np.array([[np.nan, np.inf, 0.0, -0.0, 1e4, -1e4]])
# The gated half of the last pairs decides: infinity times 0 is NaN on one side and large on the other.
_SPECIAL_GLU = np.array([[np.nan, 1.0, -1e4, 3.0, np.inf, 1.0, 2.0, np.nan, -1e4, 1.0, 0.0, 1e4]])


def _of(special: np.ndarray, kink: bool = False) -> Callable[[Rng], Iterator[Sample]]:
    return lambda rng: _elementwise(rng, special=special, kink=kink)


# Statistics


def _mean_var(rng: Rng) -> Iterator[Sample]:
    for shape, axes in [
        ((3, 5, 7), (1,)),
        ((3, 5, 7), (-1, 0)),
        ((1,), (0,)),
        ((2, 1025, 3), (1, 2)),
        ((2, 3001, 5, 3), (1, 3)),
        ((2, 65, 7), (1,)),
        ((40_013, 3), (0,)),
        ((5, 2, 3, 7), (1, 2, 3)),
        ((100_003,), (0,)),
    ]:
        for level in (0.3, -7.0):
            facts = described(shape=shape, axes=axes, level=level)
            yield Sample(facts, {"x": rng.normal(size=shape) * 0.5 + level}, {"axes": axes})
    yield Sample("all the same", {"x": np.full((2, 67, 3), 1.7)}, {"axes": (1,)})
    yield Sample("views with gaps", {"x": signal(rng, 2, 67, 3)}, {"axes": (1,)}, strided=True)
    odd = signal(rng, 5, 67)
    odd[0, 3], odd[2, 66] = np.nan, np.inf
    yield Sample("NaN and infinity", {"x": odd}, {"axes": (1,)}, skip_vjp=NO_QUOTIENT)


# Chains of operations that are fused


def _pairs(rng: Rng) -> Iterator[Sample]:
    for shape in ((3, 5, 7), (1,), (101,), (), (2, 0), (41, 67)):
        arrays = {"x": signal(rng, *shape), "y": signal(rng, *shape)}
        yield Sample(described(x=shape), arrays)
        yield Sample(described(x=shape, strided=True), arrays, strided=True)


def _conv_glu(rng: Rng) -> Iterator[Sample]:
    for weight, shape in [
        ((6, 5), (2, 7, 5)),
        ((6, 1, 5), (2, 7, 5)),
        ((6, 3, 5), (2, 7, 5)),
        ((6, 5, 5), (1, 211, 5)),
        ((6, 3, 3, 5), (2, 7, 11, 5)),
        ((6, 3, 3, 5), (1, 1, 1, 5)),
        ((46, 3, 3, 23), (1, 61, 29, 23)),
    ]:
        arrays = {
            "x": signal(rng, *shape),
            "weight": rng.normal(size=weight) * np.prod(weight[1:]) ** -0.5,
            "bias": rng.uniform(-0.2, 0.2, weight[0]),
        }
        yield Sample(described(x=shape, weight=weight), arrays)


def _twin_conv_glu(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    params = {"weight": weight, "bias": bias}
    if weight.ndim == 2:
        return twin.glu(twin_layers.linear(params, x))
    convolve = twin_layers.conv1d if weight.ndim == 3 else twin_layers.conv2d
    return twin.glu(convolve(params, x, padding=weight.shape[1] // 2))


_CHAIN = ("weight", "bias", "norm_weight", "norm_bias", "scale")


def _expand(rng: Rng) -> Iterator[Sample]:
    for shape in ((2, 13, 4), (1, 1, 4), (1, 701, 4), (2, 67, 3, 4), (1, 211, 7, 4)):
        H, C = shape[-1], 3
        arrays = {
            "x": signal(rng, *shape),
            "weight": rng.normal(size=(2 * C, H)) * H**-0.5,
            "bias": rng.uniform(-0.2, 0.2, 2 * C),
            "norm_weight": rng.uniform(0.7, 1.3, 2 * C),
            "norm_bias": rng.uniform(-0.2, 0.2, 2 * C),
            "scale": rng.uniform(0.3, 0.9, C),
            "residual": signal(rng, *shape[:-1], C),
        }
        yield Sample(described(x=shape, channels=C), arrays, {"eps": 1e-5})


def _twin_expand(x: np.ndarray, residual: np.ndarray, *, eps: float, **arrays: np.ndarray) -> np.ndarray:
    weight, bias, norm_weight, norm_bias, scale = (arrays[name] for name in _CHAIN)
    y = twin_layers.linear({"weight": weight, "bias": bias}, x)
    y = twin_layers.group_norm({"weight": norm_weight, "bias": norm_bias}, y, num_groups=1, axes=(1,), eps=eps)
    return residual + scale * twin.glu(y)


def _activation(name: str) -> Case:
    special = _SPECIAL_GLU if name == "glu" else _SPECIAL
    return Case(
        _of(special, name == "relu"),
        function(getattr(activations, name)),
        function(getattr(twin, name)),
        half=2.0,
        by_input=True,
    )


def _gating(name: str, ours: Callable[..., Any]) -> Case:
    activation = getattr(twin, name)
    return Case(_pairs, function(ours), lambda p, x, _: activation(x["x"]) * x["y"], half=2.0, by_input=True)


CASES = {
    **{name: _activation(name) for name in ("gelu", "gelu_tanh", "relu", "silu", "glu")},
    "swiglu": _gating("silu", activations.swiglu),
    "geglu_tanh": _gating("gelu_tanh", activations.geglu_tanh),
    "mean_var": Case(_mean_var, function(norms.mean_var), function(twin.mean_var), result="float32", by_input=True),
    "conv_glu": Case(_conv_glu, function(fused.conv_glu), function(_twin_conv_glu)),
    "expand_norm_glu_add": Case(_expand, function(fused.expand_norm_glu_add), function(_twin_expand), result="float32"),
}
