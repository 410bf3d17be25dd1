"""Samples of tables of positions and of rotary ones. Axes: B batch, H heads, L queries, S keys, D head_dim."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np

from ...nn import positions, rotary
from ...reference.nn import positions as twin
from ..samples import Case, Rng, Sample, described
from .masks import SIZES, option_sample, table_case


def _sinusoidal_1d(rng: Rng) -> Iterator[Sample]:
    for length, dim in ((1, 4), (7, 6), (50, 48), (1344, 24), (0, 4)):
        for given in ({}, {"shift": 13}, {"centered": True}, {"max_period": 77.0}):
            if length or not given.get("centered"):  # no positions have no mean
                yield option_sample({"length": length, "dim": dim, **given})


def _sinusoidal_2d(rng: Rng) -> Iterator[Sample]:
    for height, width, dim in ((1, 1, 4), (8, 336, 24), (5, 7, 12), (3, 2, 48)):
        for given in ({}, {"max_period": 77.0}):
            yield option_sample({"height": height, "width": width, "dim": dim, **given})


def _sinusoidal(rng: Rng) -> Iterator[Sample]:
    for length, dim in ((1, 1), (7, 2), (5, 7), (211, 16), (0, 3)):
        for given in ({}, {"offset": 1009}, {"max_period": 77.0}):
            yield option_sample({"length": length, "dim": dim, **given})


def _alibi(rng: Rng) -> Iterator[Sample]:
    for H, (L, S) in product((1, 2, 3, 6, 8, 12), SIZES[:6]):
        yield option_sample({"num_heads": H, "L": L, "S": S})


def _buckets(rng: Rng) -> Iterator[Sample]:
    for (L, S), bidirectional in product((*SIZES[:5], (67, 71)), (True, False)):
        yield option_sample({"L": L, "S": S, "bidirectional": bidirectional})
        given = {"num_buckets": 8, "max_distance": 20, "bidirectional": bidirectional}
        yield option_sample({"L": L, "S": S, **given})


def _by_distance(samples: Callable[[Rng], Iterator[Sample]]) -> Callable[[Rng], Iterator[Sample]]:
    """Those with a query and a key."""
    return lambda rng: (sample for sample in samples(rng) if sample.options["L"] and sample.options["S"])


def _rotary(rng: Rng) -> Iterator[Sample]:
    for (D, dims), interleaved in product(((2, 2), (6, 4), (11, 8), (64, 64)), (False, True)):
        for B, H, L in ((2, 3, 7), (1, 1, 1), (2, 1, 0)):
            far = 5000 if L > 1 else 50  # a single far position leaves too little to derive a tolerance from
            places: list[dict[str, Any]] = [
                {},
                {"offset": int(rng.integers(1, far))},
                {"offset": rng.integers(0, 50, B)},
                {"positions": rng.integers(0, far, L)},
                {"positions": rng.integers(0, 50, (B, L))},
            ]
            given = {"dims": dims, "theta": float(rng.choice([100.0, 1e4, 5e5])), "interleaved": interleaved}
            for place in places:
                shown = {name: value.shape if isinstance(value, np.ndarray) else value for name, value in place.items()}
                what = described(x=(B, H, L, D), **given, **shown)
                yield Sample(what, {"x": rng.normal(size=(B, H, L, D))}, {**given, **place}, strided=L == 7 and D == 6)


SCALINGS: tuple[dict[str, Any], ...] = (
    {"kind": "linear", "factor": 4.0},
    {"kind": "llama3", "factor": 8.0, "length": 97},
    {"kind": "llama3", "factor": 3.0, "length": 1009, "low": 0.7, "high": 11.0},
    {"kind": "yarn", "factor": 4.0, "length": 997, "high": 32.0, "magnitude": 1.1386},
    {"kind": "yarn", "factor": 2.5, "length": 211, "low": 0.3, "high": 5.0, "truncate": False},
)


def _scaled(rng: Rng) -> Iterator[Sample]:
    for (D, dims), scaling in product(((2, 2), (11, 8), (64, 64)), SCALINGS):
        given = {"dims": dims, "theta": float(rng.choice([100.0, 1e4, 5e5])), "interleaved": False, "scaling": scaling}
        for place in ({}, {"offset": int(rng.integers(1, 2000))}, {"positions": rng.integers(0, 2000, (2, 7))}):
            what = described(x=(2, 3, 7, D), **given, **dict.fromkeys(place, True))
            yield Sample(what, {"x": rng.normal(size=(2, 3, 7, D))}, {**given, **place})


def _ours(params: dict, arrays: dict, options: Any) -> mx.array:
    scaling = options.get("scaling")
    scaling = scaling and rotary.RotaryScaling(**scaling)
    made = rotary.Rotary(options["dims"], options["theta"], options["interleaved"], scaling)
    return made(arrays["x"], offset=options.get("offset", 0), positions=options.get("positions"))


def _twin(params: dict, arrays: dict, options: Any) -> np.ndarray:
    x = arrays["x"]
    kept = {name: options[name] for name in ("dims", "theta", "interleaved", "scaling") if name in options}
    start = np.reshape(options.get("offset", 0), (-1, 1))
    places = np.broadcast_to(options.get("positions", start + np.arange(x.shape[2])), (len(x), x.shape[2]))
    return twin.rotary(x, places, **kept)


CASES = {
    "sinusoidal_1d": table_case(_sinusoidal_1d, positions.sinusoidal_1d, twin.sinusoidal_1d),
    "sinusoidal_2d": table_case(_sinusoidal_2d, positions.sinusoidal_2d, twin.sinusoidal_2d),
    "sinusoidal": table_case(_sinusoidal, positions.sinusoidal, twin.sinusoidal),
    "alibi_bias": table_case(_alibi, positions.alibi_bias, twin.alibi_bias),
    "alibi_by_distance": table_case(_by_distance(_alibi), positions.alibi_by_distance, twin.alibi_by_distance),
    "buckets_by_distance": table_case(_by_distance(_buckets), positions.buckets_by_distance, twin.buckets_by_distance),
    "relative_buckets": table_case(_buckets, positions.relative_buckets, twin.relative_buckets),
    "Rotary": Case(_rotary, _ours, _twin),
    "RotaryScaling": Case(_scaled, _ours, _twin),
}
