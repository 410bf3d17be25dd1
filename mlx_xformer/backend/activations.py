"""Elementwise activations and gates, each one kernel."""

from __future__ import annotations

import math
from typing import cast

import mlx.core as mx

from . import dispatch
from .linux import chains


@dispatch.fuse
def plain_gelu(x: mx.array) -> mx.array:
    """x (1 + erf(x / sqrt(2))) / 2, in MLX's own operations."""
    return x * 0.5 * (1 + mx.erf(x * math.sqrt(0.5)))


_fast_gelu = dispatch.with_gradient_of(plain_gelu)(chains.gelu)


def gelu(x: mx.array) -> mx.array:
    """The exact GELU, x * Phi(x). Any shape."""
    return _fast_gelu(x) if dispatch.vectorizes(x) else plain_gelu(x)


@dispatch.fuse
def _plain_gelu_tanh(x: mx.array) -> mx.array:
    return 0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


_fast_gelu_tanh = dispatch.with_gradient_of(_plain_gelu_tanh)(chains.gelu_tanh)


def gelu_tanh(x: mx.array) -> mx.array:
    """The tanh approximation of GELU, up to 4.8e-4 from the exact one. Any shape."""
    return _fast_gelu_tanh(x) if dispatch.vectorizes(x) else _plain_gelu_tanh(x)


def relu(x: mx.array) -> mx.array:
    """max(x, 0). Any shape."""
    return _few_relu(x) if 0 < x.size <= _FEW_NUMBERS else mx.maximum(x, 0)


_FEW_NUMBERS = 2**13  # where an operation more costs a CPU as much as the work


@mx.compile
def _few_relu(x: mx.array) -> mx.array:
    return mx.maximum(x, 0)


@dispatch.fuse
def _plain_gate(a: mx.array, b: mx.array) -> mx.array:
    return a * mx.sigmoid(b)


def plain_glu(x: mx.array) -> mx.array:
    """The first half of the last axis times the sigmoid of the second, in MLX's own operations."""
    return _plain_gate(*mx.split(x, 2, axis=-1))


_fast_glu = dispatch.with_gradient_of(plain_glu)(chains.glu)


def glu(x: mx.array) -> mx.array:
    """Gated linear unit over the last axis: (..., 2C) -> (..., C), first half times the sigmoid of the second."""
    return _fast_glu(x) if dispatch.vectorizes(x) else plain_glu(x)


@dispatch.fuse
def _plain_silu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)


_fast_silu = dispatch.with_gradient_of(_plain_silu)(chains.silu)


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x). Any shape."""
    return _fast_silu(x) if dispatch.vectorizes(x) else _plain_silu(x)


@dispatch.fuse
def _plain_swiglu(x: mx.array, y: mx.array) -> mx.array:
    return x * mx.sigmoid(x) * y


_fast_swiglu = dispatch.with_gradient_of(_plain_swiglu)(chains.swiglu)


def swiglu(x: mx.array, y: mx.array) -> mx.array:
    """silu(x) * y (Shazeer 2020, arXiv 2002.05202). Two arrays of any one shape."""
    return _fast_swiglu(x, y) if dispatch.vectorizes(x) else _plain_swiglu(x, y)


@dispatch.fuse
def _plain_geglu_tanh(x: mx.array, y: mx.array) -> mx.array:
    return 0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))) * y


_fast_geglu_tanh = dispatch.with_gradient_of(_plain_geglu_tanh)(chains.geglu_tanh)


def geglu_tanh(x: mx.array, y: mx.array) -> mx.array:
    """gelu_tanh(x) * y, likewise."""
    return _fast_geglu_tanh(x, y) if dispatch.vectorizes(x) else _plain_geglu_tanh(x, y)


GATED = {"silu": swiglu, "gelu_tanh": geglu_tanh}  # what checkpoints gate with: activation(x) * y


ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu, "silu": silu}


@mx.custom_function
def _fast_exp(x: mx.array) -> mx.array:
    return chains.exp_below_0(x)


@_fast_exp.vjp
def _(_, cotangent, output):
    return cotangent * output


def exp_below_0(x: mx.array) -> mx.array:
    """exp(x) for x <= 0; where MLX's is slow, e^-87 below -87. Any shape."""
    return cast(mx.array, _fast_exp(x)) if dispatch.vectorizes(x) else mx.exp(x)
