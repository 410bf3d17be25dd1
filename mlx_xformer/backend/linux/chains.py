"""Float32 chains for MLX's Linux CPU backend, whose exp, erf and sigmoid are scalar calls of 10 to 30 ns an element.

Rational and polynomial forms, good to 4e-7, take 2 ns where g++ vectorises what mx.compile makes of them. It does so
(MLX 0.32.4, g++ 12) on three conditions, which every chain here keeps:
- its arrays have one shape and are dense: a broadcast or half an array makes a loop over strides, which stays scalar;
- the bounds of a minimum or maximum are arguments: constants are folded into its branches, and the loop keeps them;
- it is at most 11 operations deep, hence the polynomials in pairs, and is traced for each shape (a shapeless trace adds
  a broadcast to every operation). A deeper chain is cut into several passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx

# Odd functions as x P(x^2) / Q(x^2) up to a limit, lowest power first, from bench/fit_rational.py. They are fitted up
# to 4 and 9; of the limits just below, these are ones at which float32 gives exactly -1 / 2 for half of the function:
# what is left there would be multiplied with all that lies beyond, however large.
_ERF = (
    3.99,
    (1.12837898, 0.196248762, 0.0534674435, 0.00400363533, 0.000288041, 1.97482888e-06),
    (1.0, 0.507252095, 0.116476332, 0.0154444003, 0.00121635705, 3.7480829e-05),
)


_TANH = (
    8.75,
    (0.999999906, 0.133731931, 0.0034865764, 2.04717397e-05, 1.31841002e-08),
    (1.0, 0.4670649, 0.0258419584, 0.000327137636, 7.70261227e-07),
)


_Odd = tuple[float, tuple[float, ...], tuple[float, ...]]


def _half_of(odd: _Odd, factor: float) -> _Odd:
    """The form of f(factor x) / 2, from that of f."""
    limit, p, q = odd
    top = tuple(0.5 * c * factor ** (2 * i + 1) for i, c in enumerate(p))
    return limit / factor, top, tuple(c * factor ** (2 * i) for i, c in enumerate(q))


_NORMAL = _half_of(_ERF, math.sqrt(0.5))  # the normal distribution, less a half


_LOGISTIC = _half_of(_TANH, 0.5)  # the sigmoid, less a half


def _polynomial(x: mx.array, square: mx.array, coefficients: Sequence[float]) -> mx.array:
    """Horner's rule in x^2 over pairs; the deepest operand stands first, or the fusion loses count."""
    pairs = [
        x * coefficients[i + 1] + coefficients[i] if i + 1 < len(coefficients) else coefficients[i]
        for i in range(0, len(coefficients), 2)
    ]
    value = square * pairs[-1] + pairs[-2]
    for pair in pairs[-3::-1]:
        value = square * value + pair
    return value


def _bounds(odd: _Odd) -> tuple[mx.array, mx.array]:
    return mx.array(-odd[0]), mx.array(odd[0])


def _above_half(x: mx.array, low: mx.array, high: mx.array, odd: _Odd) -> mx.array:
    """1/2 + the odd function."""
    x = mx.minimum(mx.maximum(x, low), high)
    u = x * x
    square = u * u
    return x * _polynomial(u, square, odd[1]) / _polynomial(u, square, odd[2]) + 0.5


@mx.compile
def _gelu(x: mx.array, low: mx.array, high: mx.array) -> mx.array:
    return x * _above_half(x, low, high, _NORMAL)


@mx.compile
def _gate(a: mx.array, b: mx.array, low: mx.array, high: mx.array) -> mx.array:
    return a * _above_half(b, low, high, _LOGISTIC)


@mx.compile
def _add_gate(residual: mx.array, a: mx.array, b: mx.array, low: mx.array, high: mx.array) -> mx.array:
    return a * _above_half(b, low, high, _LOGISTIC) + residual


def gelu(x: mx.array) -> mx.array:
    """x * Phi(x)."""
    return _gelu(x, *_bounds(_NORMAL))


def gate(a: mx.array, b: mx.array) -> mx.array:
    """a * sigmoid(b)."""
    return _gate(a, b, *_bounds(_LOGISTIC))


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x)."""
    return gate(x, x)


@mx.compile
def _bent(x: mx.array) -> mx.array:
    return (x * x * 0.044715 + 1.0) * x * (2 * math.sqrt(2 / math.pi))


@mx.compile
def _gated(a: mx.array, b: mx.array, bent: mx.array, low: mx.array, high: mx.array) -> mx.array:
    return a * b * _above_half(bent, low, high, _LOGISTIC)


def swiglu(x: mx.array, y: mx.array) -> mx.array:
    """silu(x) * y."""
    return _gated(x, y, x, *_bounds(_LOGISTIC))


def geglu_tanh(x: mx.array, y: mx.array) -> mx.array:
    """gelu_tanh(x) * y."""
    return _gated(x, y, _bent(x), *_bounds(_LOGISTIC))


def gelu_tanh(x: mx.array) -> mx.array:
    """The tanh form of GELU: x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))."""
    return gate(x, _bent(x))


def add_gate(residual: mx.array, a: mx.array, b: mx.array) -> mx.array:
    """residual + a * sigmoid(b)."""
    return _add_gate(residual, a, b, *_bounds(_LOGISTIC))


# exp(x) = 2^n exp(r), r = x - n log 2, for x <= 0: the exponent's bits in one pass, the polynomial in the next.
_LOG2 = (0.693359375, -2.12194440e-4)  # in two parts, the first with zeros at its end


_EXP = (0.5, 1 / 6, 1 / 24, 1 / 120, 1 / 720, 1 / 5040)


_LOWEST = -87.0  # its exp is still a normal number, so that the exponent's bits are one


_ROUND = 12582912.0  # 1.5 * 2^23: adding and taking it off rounds to a whole number


def _whole(x: mx.array) -> mx.array:
    return (x * (1 / math.log(2)) + _ROUND) - _ROUND


@mx.compile
def _exponent_bits(x: mx.array, low: mx.array) -> mx.array:
    return mx.left_shift((_whole(mx.maximum(x, low)) + 127.0).astype(mx.int32), mx.array(23))


@mx.compile
def _times_remainder(x: mx.array, power: mx.array, low: mx.array) -> mx.array:
    x = mx.maximum(x, low)
    n = _whole(x)
    r = x - n * _LOG2[0] - n * _LOG2[1]
    square = r * r
    return (square * _polynomial(r, square, _EXP) + (r + 1.0)) * power


def exp_below_0(x: mx.array) -> mx.array:
    """exp(x) for x <= 0, good to 2e-7 of itself; e^-87 below -87."""
    low = mx.array(_LOWEST)
    return _times_remainder(x, _exponent_bits(x, low).view(mx.float32), low)


def dense(x: mx.array) -> mx.array:
    """A copy of a view in rows of its own: a product with 1 is MLX's fastest copy of rows longer than 16."""
    return x * mx.array(1, x.dtype)


def glu(x: mx.array, bias: mx.array | None = None) -> mx.array:
    """The GLU of x + bias: (..., 2C) -> (..., C)."""
    half = x.shape[-1] // 2
    if bias is None:
        return gate(dense(x[..., :half]), dense(x[..., half:]))
    return gate(x[..., :half] + bias[:half], x[..., half:] + bias[half:])  # the sums are dense
