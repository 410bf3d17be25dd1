"""Activations against the NumPy twin, in both of their forms."""

import mlx.core as mx
import numpy as np
import pytest
from support.harness import check_forward, check_gradient

from mlx_xformer.backend import activations, dispatch
from mlx_xformer.reference import backend as twin


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "relu", "glu"])
def test_elementwise(name):
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.normal(size=(7, 22)) * 3, np.linspace(-40, 40, 22)[None]])
    check_forward(getattr(activations, name), getattr(twin, name), x)
    check_gradient(getattr(activations, name), getattr(twin, name), rng.normal(size=(5, 6)) * 2)


@pytest.mark.parametrize("name", ["gelu", "silu", "gelu_tanh"])
def test_nothing_is_left_far_below_zero(name):
    """A rest of half a step in Phi would be multiplied with x: 6e-8 of -6, or of -1e6."""
    x = -np.geomspace(20, 1e6, 4096).astype(np.float32)
    assert (np.array(activations.ACTIVATIONS[name](mx.array(x))) == 0).all()
    assert (np.array(activations.ACTIVATIONS[name](mx.array(-x))) == -x).all()


def test_gelu_is_the_exact_one():
    x = np.array([-2.7, 2.7])
    assert np.abs(np.array(activations.gelu(mx.array(x.astype(np.float32)))) - twin.gelu(x)).max() < 1e-6
    assert np.abs(twin.gelu_tanh(x) - twin.gelu(x)).min() > 4e-4


def test_both_forms_of_gelu_and_glu(form):
    x = np.concatenate([np.linspace(-30, 30, 4001), np.linspace(-1e-3, 1e-3, 100), [0.0, 1e30, -1e30]])
    single = mx.array(x.astype(np.float32))
    exact = twin.gelu(single.astype(mx.float32).__array__().astype(np.float64))
    assert np.abs(np.array(activations.gelu(single)) - exact).max() <= 6e-7 * np.maximum(np.abs(x), 1).max()
    inside = np.abs(x) <= 30
    assert np.abs(np.array(activations.gelu(single)) - exact)[inside].max() <= 4e-6  # 3.3e-7 of erf, times x / 2
    pair = mx.stack([mx.ones(single.shape), single], axis=-1)
    assert np.abs(np.array(activations.glu(pair))[:, 0] - twin.sigmoid(x)).max() <= 4e-7
    check_gradient(activations.gelu, twin.gelu, x[:4001:40])
    check_gradient(activations.glu, twin.glu, np.random.default_rng(7).normal(size=(5, 6)) * 3)


def test_half_precision_keeps_the_built_in_forms():
    for dtype in (mx.float16, mx.bfloat16):
        x = mx.random.normal((8,)).astype(dtype)
        assert not dispatch.vectorizes(x) and activations.gelu(x).dtype == activations.glu(x).dtype == dtype
