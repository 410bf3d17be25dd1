"""Samples of separate(): a small HTDemucs over whole recordings. Axes: S sources, C channels, N samples."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from ...models.htdemucs import HTDemucs, HTDemucsConfig
from ...reference import separation as twin
from ...reference.models.htdemucs import htdemucs
from ...separation.separator import separate
from ..samples import Arrays, Case, Options, Rng, Sample, described, drawn, with_params

_CONFIG = HTDemucsConfig(
    ("drums", "voice", "rest"),
    samplerate=8000,
    segment=0.128,
    channels=4,
    nfft=256,
    depth=2,
    dconv_mode=3,
    dconv_comp=2,
    bottom_channels=8,
    t_layers=2,
    t_heads=2,
)
_N = _CONFIG.segment_samples
_CALLS: tuple[tuple[int, dict[str, Any]], ...] = (  # samples, and options of separate()
    (100, {"shifts": 0}),
    (_N, {"shifts": 0}),
    (3 * _N + 123, {"shifts": 0, "batch_size": 2}),
    (2 * _N, {"shifts": 0, "overlap": 0.0}),
    (2 * _N + 1, {"shifts": 0, "overlap": 0.6, "transition_power": 2.0}),
    (2 * _N, {"shifts": 2, "seed": 5}),
    (_N + 7, {"shifts": 1, "segment": 0.1}),
)


def _samples(rng: Rng) -> Iterator[Sample]:
    params = drawn(HTDemucs(_CONFIG), rng)
    for samples, options in _CALLS:
        audio = rng.normal(size=(2, samples)) * 0.3 + 0.02
        yield Sample(described(audio=audio.shape, **options), {"audio": audio}, options, params)


def _ours(params: dict, arrays: dict, options: Options) -> mx.array:
    model = HTDemucs(_CONFIG)
    with_params(model, params).eval()
    return mx.stack(list(separate(model, arrays["audio"], _CONFIG.samplerate, **options).values()))


def _twin(params: Arrays, arrays: Arrays, options: Options) -> np.ndarray:
    def forward(chunk: np.ndarray, position_shift: int = 0) -> np.ndarray:
        return htdemucs(params, _CONFIG, chunk[None], position_shift=position_shift)[0]

    audio, mean, divisor = twin.normalise(arrays["audio"])
    given = {name: value for name, value in options.items() if name not in ("batch_size", "seed")}
    stems = twin.apply(
        forward,
        audio,
        sources=len(_CONFIG.sources),
        samplerate=_CONFIG.samplerate,
        training_samples=_CONFIG.segment_samples,
        rng=random.Random(options.get("seed", 0)),
        random_shift=_CONFIG.t_sin_random_shift,
        **given,
    )
    return twin.denormalise(stems, mean, divisor)


CASES = {"separate": Case(_samples, _ours, _twin, vjp=False, float32_only=True)}
