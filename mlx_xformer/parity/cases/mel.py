"""Samples of log-mel spectrograms."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ...nn import mel
from ...reference.nn import mel as twin
from ..samples import Case, Rng, Sample, described, function


def _mel_samples(rng: Rng) -> Iterator[Sample]:
    """Clicks, at most one a frame, whose spectrum has no bin near 0: the logarithm of those is what float32 has lost.
    Zeros follow, which are raised. And silence."""
    for lead, length, bins, samples in (
        ((), 1601, 80, None),
        ((2,), 1999, 80, 4001),
        ((1, 3), 803, 128, 1601),
        ((2, 1), 1203, 40, None),
    ):
        audio = np.zeros((*lead, length))
        for at in range(211, length - 201, 401):
            audio[..., at] = rng.uniform(0.1, 1, lead) * rng.choice([-1, 1], lead)
        options = {"bins": bins, "samples": samples}
        yield Sample(described(shape=audio.shape, **options), {"audio": audio}, options)
    yield Sample("silence", {"audio": np.zeros(1009)}, {"bins": 7, "samples": None})


CASES = {
    "log_mel": Case(
        _mel_samples, function(mel.log_mel), function(twin.log_mel), result="float32", by_input=True, vjp=False
    ),
}
