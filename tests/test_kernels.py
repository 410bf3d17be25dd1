"""Elementwise chains and accurate statistics against the NumPy twin."""

import mlx.core as mx
import numpy as np
import pytest
from harness import assert_within_budget, check_forward, check_gradient

from mlx_xformer import kernels
from mlx_xformer.reference import kernels as twin


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "relu", "glu"])
def test_elementwise(name):
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.normal(size=(7, 22)) * 3, np.linspace(-40, 40, 22)[None]])
    check_forward(getattr(kernels, name), getattr(twin, name), x)
    check_gradient(getattr(kernels, name), getattr(twin, name), rng.normal(size=(5, 6)) * 2)


def test_gelu_is_the_exact_one():
    x = np.array([-2.7, 2.7])
    assert np.abs(np.array(kernels.gelu(mx.array(x.astype(np.float32)))) - twin.gelu(x)).max() < 1e-6
    assert np.abs(twin.gelu_tanh(x) - twin.gelu(x)).min() > 4e-4


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
    check_forward(lambda a: kernels.mean_var(a, axes), lambda a: twin.mean_var(a, axes), x)


def test_statistics_of_ten_million():
    """Where MLX's own mean on the CPU loses three digits, the staged one keeps float32's."""
    x = (np.random.default_rng(3).normal(size=(10_000_019,)) * 0.5 + 0.3).astype(np.float32)
    mean, var = kernels.mean_var(mx.array(x), (0,))
    truth = x.astype(np.float64)
    assert abs(mean.item() - truth.mean()) < 5e-7 * truth.mean()
    assert abs(var.item() - truth.var()) < 5e-7 * truth.var()


def test_mean_var_gradient():
    x = np.random.default_rng(4).normal(size=(2, 13, 3))
    check_gradient(lambda a: kernels.mean_var(a, (1, 2))[1], lambda a: twin.mean_var(a, (1, 2))[1], x)


def test_normalize_keeps_half_precision():
    x = (np.random.default_rng(5).normal(size=(2, 50, 6)) * 3 + 1).astype(np.float16)
    weight, bias = np.linspace(0.7, 1.3, 6), np.linspace(-0.2, 0.2, 6)
    out = kernels.normalize(
        mx.array(x), mx.array(weight.astype(np.float16)), mx.array(bias.astype(np.float16)), axes=(1,), eps=1e-5
    )
    assert out.dtype == mx.float16
    mean, var = twin.mean_var(x.astype(np.float64), (1, 2))
    expected = (x - mean) / np.sqrt(var + 1e-5) * weight + bias
    assert np.abs(np.array(out) - expected).max() <= 2 * 2**-10 * np.abs(expected).max()


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_overlap_add(pieces):
    x = np.random.default_rng(6).normal(size=(2, pieces, 5, 3))

    def loop(a):
        out = np.zeros((2, 5 + pieces - 1, 3), a.dtype)
        for p in range(pieces):
            out[:, p : p + 5] += a[:, p]
        return out

    assert_within_budget(kernels.overlap_add(mx.array(x.astype(np.float32))), loop(x), loop(x.astype(np.float32)))
