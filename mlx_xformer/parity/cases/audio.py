"""Samples of a change of the sample rate: sums of tones that rise from silence and fall back to it. Nothing lies above
0.3 of half the lower rate, see reference/audio.py. Axes: C channels, N samples."""

from __future__ import annotations

import math
from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from ...audio.resampling import resample
from ...reference import audio as twin
from ..samples import Case, Options, Rng, Sample, described

_RATES = ((44100, 48000), (48000, 44100), (44100, 16000), (8000, 44100), (16000, 48000), (8000, 8000))


def _samples(rng: Rng) -> Iterator[Sample]:
    C, N = 2, 401
    t = np.arange(N)
    for from_rate, to_rate in _RATES:
        highest = 0.27 * math.pi * min(1.0, to_rate / from_rate)  # radians a sample
        frequency, phase = rng.uniform(0, highest, (C, 7, 1)), rng.uniform(0, 2 * math.pi, (C, 7, 1))
        tones = rng.uniform(0.1, 0.3, (C, 7, 1)) * np.sin(frequency * t + phase)
        audio = tones.sum(axis=1) * np.kaiser(N, 20)  # a side lobe is 200 dB down
        options = {"from_rate": from_rate, "to_rate": to_rate}
        yield Sample(described(audio=audio.shape, **options), {"audio": audio}, options)


def _ours(_: dict, arrays: dict, options: Options) -> mx.array:
    return mx.array(resample(np.array(arrays["audio"]), **options))


def _twin(_: dict, arrays: dict, options: Options) -> np.ndarray:
    return twin.resample(arrays["audio"], **options)


CASES = {"resample": Case(_samples, _ours, _twin, vjp=False, float32_only=True)}
