"""Fits the rational forms of backend/activations.py: x P(x^2) / Q(x^2) for erf on [-4, 4] and tanh on [-9, 9].

Lawson's iteration: weighted linear least squares, weights driven towards the largest errors. Prints the coefficients,
lowest power first, and the largest error in double and in single precision arithmetic.
"""

import math

import numpy as np


def fit(function, limit: float, degree: int, rounds: int = 400) -> tuple[np.ndarray, np.ndarray]:
    x = (np.cos(np.pi * (np.arange(4000) + 0.5) / 4000) + 1) / 2 * limit
    u, truth = x * x / limit**2, np.array([function(v) for v in x])
    weight, q, best = np.ones_like(x), np.ones_like(x), (np.inf, None, None)
    powers = u[:, None] ** np.arange(degree + 1)
    for _ in range(rounds):
        system = np.concatenate([x[:, None] * powers, -truth[:, None] * powers[:, 1:]], axis=1)
        rows = np.sqrt(weight) / np.abs(q)
        solution, *_ = np.linalg.lstsq(system * rows[:, None], truth * rows, rcond=None)
        p_coefficients, q_coefficients = solution[: degree + 1], np.concatenate([[1.0], solution[degree + 1 :]])
        q = powers @ q_coefficients
        error = np.abs(x * (powers @ p_coefficients) / q - truth)
        if error.max() < best[0]:
            scale = limit ** (-2.0 * np.arange(degree + 1))
            best = (error.max(), p_coefficients * scale, q_coefficients * scale)
        weight *= error + 1e-12 * error.max()
        weight /= weight.mean()
    return best[1], best[2]


def evaluate(p: np.ndarray, q: np.ndarray, x: np.ndarray, limit: float) -> np.ndarray:
    """In the precision of x."""
    x = np.clip(x, -limit, limit)
    u, kind = x * x, x.dtype.type
    top, bottom = kind(p[-1]) + 0 * u, kind(q[-1]) + 0 * u
    for c in p[-2::-1]:
        top = top * u + kind(c)
    for c in q[-2::-1]:
        bottom = bottom * u + kind(c)
    return x * top / bottom


if __name__ == "__main__":
    for function, limit, degree in ((math.erf, 4.0, 5), (math.tanh, 9.0, 4)):
        p, q = fit(function, limit, degree)
        x = np.linspace(-1.5 * limit, 1.5 * limit, 200_001)
        truth = np.array([function(v) for v in x])
        errors = [np.abs(evaluate(p, q, x.astype(kind), limit) - truth).max() for kind in (np.float64, np.float32)]
        print(f"{function.__name__}: errors {errors[0]:.1e} in float64, {errors[1]:.1e} in float32")
        print("  P", tuple(float(f"{c:.9g}") for c in p))
        print("  Q", tuple(float(f"{c:.9g}") for c in q))
