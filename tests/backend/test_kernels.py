"""Elementwise chains and accurate statistics against the NumPy twin."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from support.harness import assert_within_budget, check_forward, check_gradient

from mlx_xformer.backend import activations, dispatch, fused, norms
from mlx_xformer.backend.linux import blas, chains, products, streams
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


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_overlap_add(pieces):
    x = np.random.default_rng(6).normal(size=(2, pieces, 5, 3))

    def loop(a):
        out = np.zeros((2, 5 + pieces - 1, 3), a.dtype)
        for p in range(pieces):
            out[:, p : p + 5] += a[:, p]
        return out

    assert_within_budget(fused.overlap_add(mx.array(x.astype(np.float32))), loop(x), loop(x.astype(np.float32)))


@pytest.fixture(params=["built-in", "rational"])
def form(request, monkeypatch):
    """Both forms of the chains, whatever this machine would choose."""
    monkeypatch.setattr(dispatch, "vectorizes", lambda x: request.param == "rational" and x.dtype == mx.float32)
    return request.param


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


def test_exp_by_its_bits():
    """Good to 3e-7 of itself down to e^-87, and that value below, where the exponent has no more bits."""
    scores = np.linspace(-500, 0, 9001).astype(np.float32)
    weights = np.array(chains.exp_below_0(mx.array(scores)), np.float64)
    exact = np.exp(np.maximum(scores, -87).astype(np.float64))
    assert weights.min() >= np.finfo(np.float32).tiny
    assert np.abs(weights / exact - 1).max() < 3e-7


def test_half_precision_keeps_the_built_in_forms():
    for dtype in (mx.float16, mx.bfloat16):
        x = mx.random.normal((8,)).astype(dtype)
        assert not dispatch.vectorizes(x) and activations.gelu(x).dtype == activations.glu(x).dtype == dtype


def test_rows_are_computed_side_by_side(monkeypatch):
    """Several workers, a number that does not divide the rows, from a thread other than the importing one: forward and
    gradient are those of one."""
    x, weight = mx.random.normal((7, 13, 5)), mx.random.normal((5, 5))
    mx.eval(x, weight)

    def call(x):
        return dispatch.by_rows(lambda rows: mx.tanh(rows @ weight) + rows, x)

    def both():
        out, gradient = mx.vjp(call, [x], [mx.cos(x)])
        mx.eval(out, gradient)
        return np.array(out[0]), np.array(gradient[0])

    alone = both()
    monkeypatch.setattr(blas, "workers", 3)
    monkeypatch.setattr(dispatch, "_LARGE", 0)
    streams._streams.cache_clear()
    try:
        with ThreadPoolExecutor(1) as pool:
            for result in (both(), pool.submit(both).result()):
                assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(alone, result, strict=True))
    finally:
        streams._streams.cache_clear()


@pytest.mark.slow
@pytest.mark.skipif(not dispatch._FUSES, reason="nothing is compiled here")
def test_chains_are_vectorised(tmp_path):
    """Each chain is one library, whose loop g++ vectorises: a chain cut into passes, or a loop that stays scalar, is
    right, but two to four times slower."""
    code = """
import mlx.core as mx
from mlx_xformer.backend.linux import chains as cpu
x = mx.random.normal((1000,))
mx.eval(getattr(cpu, "{}")(*[-mx.abs(x)] * {}))
"""
    for name, count, passes in [("gelu", 1, 1), ("gate", 2, 1), ("add_gate", 3, 1), ("exp_below_0", 1, 2)]:
        folder = tmp_path / name
        folder.mkdir()
        run = [sys.executable, "-c", "import mlx_xformer" + code.format(name, count)]
        subprocess.run(run, check=True, env=os.environ | {"TMPDIR": str(folder)})
        sources = sorted(folder.rglob("*.cpp"))
        assert len(sources) == passes, name
        for source in sources:
            include = Path(mx.__file__).parent / "include"
            command = [
                "g++",
                "-std=c++17",
                "-O3",
                "-fPIC",
                "-shared",
                f"-I{include}",
                source,
                "-o",
                folder / "again.so",
            ]
            answer = subprocess.run([*command, "-fopt-info-vec"], capture_output=True, text=True, check=True)
            assert "loop vectorized" in answer.stderr, f"{name}: {source.name}"
