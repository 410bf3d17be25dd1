"""Elementwise functions and reductions, in the dtype of their input."""

import math
from collections.abc import Sequence

import numpy as np

# Rational Chebyshev approximations of W. J. Cody, Math. Comp. 23 (1969) 631-637. Coefficients from the
# highest power down: of x^2 below 0.46875, of x up to 4, of 1/x^2 beyond.
_SMALL_P = (
    1.85777706184603153e-1,
    3.16112374387056560e0,
    1.13864154151050156e2,
    3.77485237685302021e2,
    3.20937758913846947e3,
)
_SMALL_Q = (1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3, 2.84423683343917062e3)
_MIDDLE_P = (
    2.15311535474403846e-8,
    5.64188496988670089e-1,
    8.88314979438837594e0,
    6.61191906371416295e1,
    2.98635138197400131e2,
    8.81952221241769090e2,
    1.71204761263407058e3,
    2.05107837782607147e3,
    1.23033935479799725e3,
)
_MIDDLE_Q = (
    1.0,
    1.57449261107098347e1,
    1.17693950891312499e2,
    5.37181101862009858e2,
    1.62138957456669019e3,
    3.29079923573345963e3,
    4.36261909014324716e3,
    3.43936767414372164e3,
    1.23033935480374942e3,
)
_LARGE_P = (
    1.63153871373020978e-2,
    3.05326634961232344e-1,
    3.60344899949804439e-1,
    1.25781726111229246e-1,
    1.60837851487422766e-2,
    6.58749161529837803e-4,
)
_LARGE_Q = (
    1.0,
    2.56852019228982242e0,
    1.87295284992346047e0,
    5.27905102951428412e-1,
    6.05183413124413191e-2,
    2.33520497626869185e-3,
)


def _polynomial(coefficients: Sequence[float], x: np.ndarray) -> np.ndarray:
    """The polynomial with these coefficients, highest power first, at `x` (Horner)."""
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


def erf(x: np.ndarray) -> np.ndarray:
    """The error function, elementwise; accurate to rounding in the dtype of `x`. NaN stays NaN."""
    x = np.asarray(x)
    size = np.abs(x)
    out = np.where(np.isnan(x), x, np.ones_like(x))  # what lies beyond 6 rounds to 1
    small, middle, large = size <= 0.46875, (size > 0.46875) & (size <= 4.0), (size > 4.0) & (size < 6.0)

    y = size[small]
    out[small] = y * _polynomial(_SMALL_P, y * y) / _polynomial(_SMALL_Q, y * y)
    y = size[middle]
    out[middle] = 1.0 - np.exp(-y * y) * _polynomial(_MIDDLE_P, y) / _polynomial(_MIDDLE_Q, y)
    y = size[large]
    z = 1.0 / (y * y)
    tail = 1.0 / math.sqrt(math.pi) - z * _polynomial(_LARGE_P, z) / _polynomial(_LARGE_Q, z)
    out[large] = 1.0 - np.exp(-y * y) * tail / y
    return np.copysign(out, x)


def gelu(x: np.ndarray) -> np.ndarray:
    """GELU in its exact form, x Phi(x)."""
    return 0.5 * x * (1.0 + erf(x * math.sqrt(0.5)))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """GELU in its tanh form, for the checkpoints that were trained with it."""
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))


def relu(x: np.ndarray) -> np.ndarray:
    """max(x, 0)."""
    return np.maximum(x, 0)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), without overflow at either end."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0 / (1.0 + e), e / (1.0 + e))


def silu(x: np.ndarray) -> np.ndarray:
    """x times its sigmoid."""
    return x * sigmoid(x)


def glu(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """The first half of `axis` gated by the sigmoid of the second half."""
    if x.shape[axis] % 2:
        raise ValueError(f"the gated axis must be even, got {x.shape[axis]}")
    value, gate = np.split(x, 2, axis=axis)
    return value * sigmoid(gate)


def softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """exp(x) / sum(exp(x)) along `axis`, the maximum subtracted first."""
    e = np.exp(x - np.max(x, axis=axis, keepdims=True))
    return e / np.sum(e, axis=axis, keepdims=True)


def mean_var(x: np.ndarray, axes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and biased variance over `axes`, which keep their place with length 1."""
    axes = tuple(axis % x.ndim for axis in axes)
    kept = tuple(axis for axis in range(x.ndim) if axis not in axes)
    kept_shape = tuple(1 if axis in axes else x.shape[axis] for axis in range(x.ndim))
    # One contiguous last axis: only there does NumPy sum pairwise, which float32 needs.
    count = math.prod(x.shape[axis] for axis in axes)
    rows = np.ascontiguousarray(x.transpose(kept + axes)).reshape(*(x.shape[axis] for axis in kept), count)
    mean = np.mean(rows, axis=-1, keepdims=True)
    var = np.mean(np.square(rows - mean), axis=-1)
    return mean.reshape(kept_shape), var.reshape(kept_shape)
