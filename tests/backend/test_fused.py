"""Fused steps against the NumPy twin, in both of their forms."""

import mlx.core as mx
import numpy as np
import pytest
from support.harness import assert_within_budget, check_forward, check_gradient

from mlx_xformer.backend import fused
from mlx_xformer.backend.linux import products
from mlx_xformer.reference import backend as twin


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_overlap_add(pieces):
    x = np.random.default_rng(6).normal(size=(2, pieces, 5, 3))

    def loop(a):
        out = np.zeros((2, 5 + pieces - 1, 3), a.dtype)
        for p in range(pieces):
            out[:, p : p + 5] += a[:, p]
        return out

    assert_within_budget(fused.overlap_add(mx.array(x.astype(np.float32))), loop(x), loop(x.astype(np.float32)))


@pytest.mark.parametrize("shape", [(2, 13, 6), (2, 700, 3, 6)])
def test_both_forms_of_norm_gelu(form, shape):
    rng = np.random.default_rng(8)
    x, weight, bias = rng.normal(size=shape) * 2 + 0.3, rng.uniform(0.7, 1.3, 6), rng.uniform(-0.2, 0.2, 6)

    def ours(*a):
        return fused.norm_gelu(*a, axes=(1,), eps=1e-5)

    def reference(x, weight, bias):
        return twin.gelu(normed(x, weight, bias))

    check_forward(ours, reference, x, weight, bias)
    if shape[1] < 100:
        check_gradient(ours, reference, x, weight, bias)


def normed(x, weight, bias):
    mean, var = twin.mean_var(x, (1, x.ndim - 1))
    return (x - mean) / np.sqrt(var + 1e-5) * weight + bias


@pytest.mark.parametrize("shape", [(2, 13, 5), (1, 700, 3, 5), (2, 129, 7, 1)])
@pytest.mark.parametrize("offset", [0.3, 30.0])
def test_both_forms_of_expand_norm_glu_add(form, shape, offset):
    """Also inputs far from 0, whose variance is a small difference, and stretches that end within a block."""
    rng = np.random.default_rng(11)
    H = shape[-1]
    x, residual = rng.normal(size=shape) * 2 + offset, rng.normal(size=(*shape[:-1], 3))
    weight, bias = rng.normal(size=(6, H)) * H**-0.5, rng.uniform(-0.2, 0.2, 6)
    norm_weight, norm_bias, scale = rng.uniform(0.7, 1.3, 6), rng.uniform(-0.2, 0.2, 6), rng.uniform(0.3, 0.9, 3)

    def ours(*a):
        return fused.expand_norm_glu_add(*a, eps=1e-5)

    def reference(x, weight, bias, norm_weight, norm_bias, scale, residual):
        return residual + scale * twin.glu(normed(x @ weight.T + bias, norm_weight, norm_bias))

    arguments = (x, weight, bias, norm_weight, norm_bias, scale, residual)
    check_forward(ours, reference, *arguments)
    if shape[1] < 100:
        check_gradient(ours, reference, *arguments)


@pytest.mark.parametrize(
    ("shape", "kernel"), [((2, 37, 5), ()), ((2, 37, 5), (3,)), ((2, 11, 7, 5), (3, 3)), ((1, 5, 3, 5), (5, 5))]
)
def test_both_forms_of_conv_glu(form, shape, kernel, monkeypatch):
    """Blocks of frames of which the last is shorter."""
    monkeypatch.setattr(products, "_PATCHES", 64)
    monkeypatch.setattr(products, "_ROWS", 16)
    rng = np.random.default_rng(12)
    x, weight, bias = rng.normal(size=shape), rng.normal(size=(6, *kernel, 5)) * 0.3, rng.uniform(-0.2, 0.2, 6)

    def reference(x, weight, bias):
        padded = np.pad(x, [(0, 0), *[(size // 2, size // 2) for size in kernel], (0, 0)]) if kernel else x
        total = bias
        for place in np.ndindex(kernel):
            part = [slice(at, at + length) for at, length in zip(place, x.shape[1:-1], strict=False)]
            total = total + padded[(slice(None), *part)] @ weight[(slice(None), *place)].T
        return twin.glu(total)

    check_forward(fused.conv_glu, reference, x, weight, bias)
    check_gradient(fused.conv_glu, reference, x, weight, bias)


@pytest.mark.parametrize("lengths", [(300, 257), (1, 70_000), (70_000, 1)])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_both_forms_of_attention(form, lengths, spread):
    """Rows that end in the middle of a block, and scores far apart."""
    rng = np.random.default_rng(9)
    q, k, v = (rng.normal(size=(1, 2, length, 7)) for length in (lengths[0], lengths[1], lengths[1]))
    q = q * spread

    def reference(q, k, v):
        scores = q @ k.swapaxes(-1, -2) * q.dtype.type(7**-0.5)
        return twin.softmax(scores) @ v

    check_forward(lambda q, k, v: fused.unmasked_attention(q, k, v, 7**-0.5), reference, q, k, v)


def test_row_blocks_and_their_gradient(form, monkeypatch):
    monkeypatch.setattr(fused, "_SMALL", 0)
    monkeypatch.setattr(products, "_SCORES", 16)
    rng = np.random.default_rng(10)
    q, k, v = rng.normal(size=(2, 3, 37, 5)), rng.normal(size=(2, 3, 11, 5)), rng.normal(size=(2, 3, 11, 4))

    def reference(q, k, v):
        return twin.softmax(q @ k.swapaxes(-1, -2) * q.dtype.type(0.4)) @ v

    check_forward(lambda q, k, v: fused.unmasked_attention(q, k, v, 0.4), reference, q, k, v)
    check_gradient(lambda q, k, v: fused.unmasked_attention(q, k, v, 0.4), reference, q, k, v)
