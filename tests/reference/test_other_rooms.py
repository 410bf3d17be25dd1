"""The twins of samplers, resampling, new weights and packed matrices, against what is known of them otherwise."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_xformer.reference import text
from mlx_xformer.reference.audio import resample
from mlx_xformer.reference.nn.attention import initialize
from mlx_xformer.reference.nn.linear import dequantize, pack, quantize, quantized_linear, unpack

INF = np.inf


def test_filters_by_hand():
    """Probabilities 0.4, 0.1, 0.2, 0.1, 0.2."""
    logits = np.log(np.array([[0.4, 0.1, 0.2, 0.1, 0.2]]))
    kept = {
        text.keep_top_k: [(1, [0]), (2, [0, 2, 4]), (4, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])],
        text.keep_top_p: [(0.3, [0]), (0.5, [0, 2, 4]), (0.75, [0, 2, 4]), (0.85, [0, 1, 2, 3, 4])],
        text.keep_min_p: [(0.9, [0]), (0.4, [0, 2, 4]), (0.2, [0, 1, 2, 3, 4])],
    }
    for function, pairs in kept.items():
        for limit, tokens in pairs:
            out = function(logits, limit)
            assert np.flatnonzero(np.isfinite(out[0])).tolist() == tokens, (function.__name__, limit)
            assert (out[0, tokens] == logits[0, tokens]).all()


def test_penalty_by_hand():
    logits = np.array([[2.0, -2.0, 3.0, 0.0], [2.0, -2.0, 3.0, 0.0]])
    out = text.penalize(logits, np.array([[0, 1, 1, 0], [-1, -1, 2, 2]]), 2.0)
    assert out.tolist() == [[1.0, -4.0, 3.0, 0.0], [2.0, -2.0, 1.5, 0.0]]
    assert logits[0, 0] == 2.0


def test_tokens_have_their_probabilities():
    """Chi-squared of 4 degrees of freedom is above 33 once in a million."""
    probabilities = np.array([0.4, 0.1, 0.2, 0.05, 0.25])
    rows = 20_000
    noise = np.random.default_rng(0).gumbel(size=(rows, 5))
    logits, history = np.tile(np.log(probabilities), (rows, 1)), np.zeros((rows, 0), int)
    for temperature in (1.0, 2.0):
        expected = probabilities ** (1 / temperature)
        expected *= rows / expected.sum()
        counts = np.bincount(text.sample(logits, history, noise, temperature=temperature), minlength=5)
        assert ((counts - expected) ** 2 / expected).sum() < 33
    assert (text.sample(logits, history, noise, temperature=0) == 0).all()


@pytest.mark.parametrize(("from_rate", "to_rate"), [(44100, 16000), (16000, 44100), (48000, 44100)])
def test_resampling_a_tone_that_rises_and_falls(from_rate, to_rate):
    """It is the tone at other times."""
    N, frequency = 401, 0.6 * np.pi * min(1, to_rate / from_rate)

    def tone(t):
        return np.sin(frequency * t + 0.3) * np.exp(-(((t - 200) / 25) ** 2) / 2)

    out = resample(tone(np.arange(N))[None], from_rate, to_rate)
    assert out.shape == (1, round(N * to_rate / from_rate))
    assert np.abs(out[0] - tone(np.arange(out.shape[1]) * from_rate / to_rate)).max() < 1e-8


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_packed_matrices_are_those_of_mlx(bits):
    rng = np.random.default_rng(bits)
    weight, x = rng.normal(size=(7, 96)).astype(np.float32), rng.normal(size=(3, 96))
    words, scales, biases = (np.array(part) for part in mx.quantize(mx.array(weight), 32, bits))
    codes = unpack(words, bits)
    assert codes.max() == 2**bits - 1 and (pack(codes, bits) == words).all()
    exact = np.array(mx.dequantize(*map(mx.array, (words, scales, biases)), group_size=32, bits=bits))
    assert np.abs(dequantize(codes, scales, biases) - exact).max() < 1e-6
    made = quantize(weight.astype(np.float64), bits, 32)
    assert np.mean(made[0] == codes) > 0.99 and np.abs(made[1] - scales).max() < 1e-6
    params = {"weight": words, "scales": scales, "biases": biases, "bias": np.arange(7.0)}
    np.testing.assert_allclose(quantized_linear(params, x, bits=bits), x @ exact.T.astype(float) + np.arange(7), 1e-5)


def test_new_weights_have_the_bounds_of_pytorch():
    """For E = 512: 0.0541 for the packed three, 0.0442 for the output; apart 0.0765 each."""
    params = {f"{name}_proj.weight": np.zeros((512, 512)) for name in ("q", "k", "v", "out")}
    params["q_proj.bias"] = np.ones(512)
    noise = {name: np.random.default_rng(1).random((512, 512)) for name in ("q", "k", "v", "out")}
    for scheme, bounds in (("torch", (0.0541, 0.0541, 0.0541, 0.0442)), ("xavier", (0.0765,) * 4)):
        made = initialize(params, scheme, noise)
        assert (made["q_proj.bias"] == 0).all() and made.keys() == params.keys()
        for name, bound in zip(("q", "k", "v", "out"), bounds, strict=True):
            weight = made[f"{name}_proj.weight"]
            assert np.abs(weight).max() == pytest.approx(bound, rel=2e-3) and abs(weight.mean()) < 0.01 * bound
            assert weight.std() == pytest.approx(bound / 3**0.5, rel=1e-2)
