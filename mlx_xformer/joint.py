"""Linear layers of one input as one product, where it is one row: a step of generation has many small products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .linear import Linear, Row, product, steps


class Joint:
    """Linear layers whose matrices lie one below the other, in one array of which their weights become parts.

    It holds until one of them has another weight: training, quantizing and loading weights leave it behind.
    """

    def __init__(self, layers: Sequence[nn.Module]):
        weights: list[mx.array] = [layer.weight for layer in layers]
        self._biases: list[Any] = [layer.get("bias") for layer in layers]
        self._weight = mx.concatenate(weights)
        self._bias = None if self._biases[0] is None else mx.concatenate(self._biases)
        self._row = Row(self._weight, self._bias)
        self._parts: list[mx.array] = []
        at = 0
        for layer, weight in zip(layers, weights, strict=True):
            self._parts.append(self._weight[at : at + len(weight)])
            layer.weight = self._parts[-1]
            at += len(weight)
        mx.eval(self._weight, self._bias, self._parts)

    def holds(self, layers: Sequence[nn.Module]) -> bool:
        """Whether the layers still have what was joined."""
        return all(
            layer.get("weight") is part and layer.get("bias") is bias
            for layer, part, bias in zip(layers, self._parts, self._biases, strict=True)
        )

    def __call__(self, x: mx.array) -> mx.array:
        """x (..., I) -> what the layers make of it, side by side: (..., sum of O)."""
        return self._row(x) if steps(x) else product(x, self._weight, self._bias)


def joined(layers: Sequence[nn.Module], joint: Joint | None) -> Joint | None:
    """The joint product of the layers, `joint` if it still holds; None for layers that cannot have one: of several
    kinds, dtypes or inputs, or some with a bias only."""
    if joint is not None and joint.holds(layers):
        return joint
    plain = all(type(layer) is Linear for layer in layers)
    if not plain or len({(layer.weight.shape[1], layer.weight.dtype, "bias" in layer) for layer in layers}) != 1:
        return None
    return Joint(layers)


def one_row(x: mx.array) -> bool:
    """Whether x (..., I) is one row, so that parts of a joint result are dense."""
    return math.prod(x.shape[:-1]) == 1
