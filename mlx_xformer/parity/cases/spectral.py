"""Samples of the short-time Fourier transform and its inverse, with real and imaginary parts as a last axis."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from ...nn import spectral
from ...reference.nn import spectral as twin
from ..samples import Case, Rng, Sample, described, function, signal


def _stft_samples(rng: Rng) -> Iterator[Sample]:
    for n_fft, hop in ((16, 4), (32, 8), (12, 5), (512, 128)):
        for shape in ((2, n_fft + 1), (3, 4 * n_fft + 7), (1, 2, 1031)):
            for flags in ({}, {"center": False}, {"normalized": False}):
                options = {"n_fft": n_fft, "hop_length": hop, **flags}
                yield Sample(described(shape=shape, **options), {"x": signal(rng, *shape)}, options)
    yield Sample("views with gaps", {"x": signal(rng, 3, 97)}, {"n_fft": 16, "hop_length": 4}, strided=True)


def _istft_samples(rng: Rng) -> Iterator[Sample]:
    for n_fft, hop in ((16, 4), (32, 8), (12, 6), (512, 128), (8192, 2048)):  # cuFFT has another algorithm for the last
        for lead, frames in (((2,), 7), ((1, 3), 11), ((1,), 29)):
            for flags in ({}, {"normalized": False}):
                length = (frames - 1) * hop - 3
                options = {"n_fft": n_fft, "hop_length": hop, "length": length, **flags}
                shape = (*lead, frames, n_fft // 2 + 1)
                arrays = {name: rng.normal(size=shape) for name in ("real", "imag")}
                yield Sample(described(shape=shape, **options), arrays, options)


def _twin_stft(x: np.ndarray, **options: Any) -> np.ndarray:
    z = twin.stft(x, **options)
    return np.stack([z.real, z.imag], axis=-1)


def _stft(x: mx.array, **options: Any) -> mx.array:
    z = spectral.stft(x, **options)
    return mx.stack([mx.real(z), mx.imag(z)], axis=-1)


def _twin_istft(real: np.ndarray, imag: np.ndarray, **options: Any) -> np.ndarray:
    return twin.istft(real + np.asarray(1j, np.result_type(real, np.complex64)) * imag, **options)


def _istft(real: mx.array, imag: mx.array, **options: Any) -> mx.array:
    return spectral.istft(real + 1j * imag, **options)


def _reflect(rng: Rng) -> Iterator[Sample]:
    for length, left, right in ((7, 3, 5), (7, 0, 0), (5, 4, 4), (3, 7, 5), (1, 2, 0), (11, 0, 10)):
        yield Sample(described(samples=length, left=left, right=right), {"x": signal(rng, 2, length)},
                     {"left": left, "right": right})  # fmt: skip


CASES = {
    "stft": Case(_stft_samples, function(_stft), function(_twin_stft), result="float32"),
    "istft": Case(_istft_samples, function(_istft), function(_twin_istft), result="float32"),
    "reflect_pad": Case(_reflect, function(spectral.reflect_pad), function(twin.reflect_pad)),
}
