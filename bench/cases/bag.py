"""One stem of a bag of four (htdemucs_ft) against one model of the same size, through separate(); random weights."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from cases.common import describe_ours
from mlx_xformer import Bag, BagConfig, HTDemucs, HTDemucsConfig, separate
from mlx_xformer.backend import device

mx = device.mx

SOURCES = ("drums", "bass", "other", "vocals")
CONFIG = HTDemucsConfig(sources=SOURCES, segment=Fraction(39, 5), bottom_channels=512)
SECONDS = 12


def case(model: Any, **options: Any) -> dict[str, Any]:
    """What bench/worker.py wants."""
    mx.eval(model.parameters())
    rng = np.random.default_rng(0)
    track = rng.normal(scale=0.1, size=(2, SECONDS * CONFIG.samplerate)).astype(np.float32)

    def run() -> None:
        mx.eval(separate(model, mx.array(track), CONFIG.samplerate, **options))

    return describe_ours(run)


def single(_: Path) -> dict[str, Any]:
    return case(HTDemucs(CONFIG))


def one_of_four(_: Path) -> dict[str, Any]:
    weights = tuple(tuple(float(source == member) for source in range(4)) for member in range(4))
    return case(Bag(BagConfig((CONFIG,) * 4, weights)), stems=["vocals"])
