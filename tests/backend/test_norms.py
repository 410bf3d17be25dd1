"""Accurate statistics and what is normalised by them, against the NumPy twin."""

import mlx.core as mx
import numpy as np
import pytest
from support.harness import check_forward, check_gradient

from mlx_xformer.backend import norms
from mlx_xformer.reference import backend as twin


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((3, 5, 7), (1,)),
        ((2, 1025, 3), (1, 2)),
        ((2, 3001, 5, 3), (1, 3)),
        ((1_000_003,), (0,)),
        ((2, 40_000, 11), (1, 2)),
    ],
)
def test_mean_var(shape, axes):
    x = np.random.default_rng(2).normal(size=shape) * 0.5 + 0.3
    check_forward(lambda a: norms.mean_var(a, axes), lambda a: twin.mean_var(a, axes), x)


def test_statistics_of_ten_million():
    """Where MLX's own mean on the CPU loses three digits, the staged one keeps float32's."""
    x = (np.random.default_rng(3).normal(size=(10_000_019,)) * 0.5 + 0.3).astype(np.float32)
    mean, var = norms.mean_var(mx.array(x), (0,))
    truth = x.astype(np.float64)
    assert abs(mean.item() - truth.mean()) < 5e-7 * truth.mean()
    assert abs(var.item() - truth.var()) < 5e-7 * truth.var()


def test_mean_var_gradient():
    x = np.random.default_rng(4).normal(size=(2, 13, 3))
    check_gradient(lambda a: norms.mean_var(a, (1, 2))[1], lambda a: twin.mean_var(a, (1, 2))[1], x)


def test_normalize_keeps_half_precision():
    x = (np.random.default_rng(5).normal(size=(2, 50, 6)) * 3 + 1).astype(np.float16)
    weight, bias = np.linspace(0.7, 1.3, 6), np.linspace(-0.2, 0.2, 6)
    out = norms.normalize(
        mx.array(x), mx.array(weight.astype(np.float16)), mx.array(bias.astype(np.float16)), axes=(1,), eps=1e-5
    )
    assert out.dtype == mx.float16
    mean, var = twin.mean_var(x.astype(np.float64), (1, 2))
    expected = (x - mean) / np.sqrt(var + 1e-5) * weight + bias
    assert np.abs(np.array(out) - expected).max() <= 2 * 2**-10 * np.abs(expected).max()
