"""Noise, and log-mel spectrograms against the twin."""

import math

import numpy as np

from mlx_xformer.nn.mel import HOP, N_FFT, mel_filters
from mlx_xformer.reference.nn import mel as twin
from mlx_xformer.reference.nn.spectral import stft


def noise(rows, samples, seed=0):
    """Noise whose spectrum falls, as that of speech does."""
    white = np.random.default_rng(seed).normal(size=(rows, samples))
    brown = np.cumsum(white - white.mean(axis=1, keepdims=True), axis=1)
    return (brown / np.abs(brown).max() * 0.9 + 0.01 * white).astype(np.float32)


def assert_like_the_twin(actual, audio, *, bins=80):
    """Within what the budget d of the Fourier transform means for each bin: a sum E of powers, with weights that add up
    to w, is off by 2 d sqrt(w E) + w d^2 at most, and a quarter of its logarithm by a share of that."""
    truth = twin.log_mel(audio.astype(np.float64), bins=bins, samples=None)
    options = {"n_fft": N_FFT, "hop_length": HOP, "normalized": False}
    z64, z32 = stft(audio.astype(np.float64), **options), stft(audio, **options)
    d = 4 * np.abs(z32 - z64).max() + 1e-6 * np.abs(z64).max()
    w, E = mel_filters(bins).sum(axis=0), 10 ** (4 * truth - 4)
    budget = (2 * d * np.sqrt(w / E) + w * d**2 / E) / (4 * math.log(10)) + 2e-6
    excess = np.abs(np.asarray(actual) - truth) / budget
    assert excess.shape == truth.shape and excess.max() <= 1, f"{excess.max():.2f} times its tolerance"
