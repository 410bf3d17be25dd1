"""Samples of masks. Axes: B batch, L queries, S keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np

from ...nn import masks
from ...reference.nn import masks as twin
from ..samples import Case, Rng, Sample, described, function

SIZES = ((1, 1), (5, 7), (7, 7), (1, 7), (11, 5), (0, 3), (3, 0), (197, 211))


def option_sample(options: dict[str, Any]) -> Sample:
    """A sample of options alone."""
    shown = {name: value if not isinstance(value, np.ndarray) else value.tolist() for name, value in options.items()}
    return Sample(described(**shown)[:100], {}, options)


def _causal(rng: Rng) -> Iterator[Sample]:
    for (L, S), alignment in product(SIZES, ("lower_right", "upper_left")):
        yield option_sample({"L": L, "S": S, "alignment": alignment})


def _create(rng: Rng) -> Iterator[Sample]:
    for n, given in product((0, 1, 7), ({}, {"offset": 3}, {"m": 11}, {"m": 5, "offset": 2}, {"m": 0, "offset": 0})):
        yield option_sample({"n": n, **given})


def _padding(rng: Rng) -> Iterator[Sample]:
    for S in (1, 7, 211):
        lengths = rng.integers(0, S + 1, 5)
        lengths[:2] = 0, S
        yield option_sample({"lengths": lengths, "S": S})
        yield option_sample({"lengths": lengths.tolist(), "S": S})


def _sliding(rng: Rng) -> Iterator[Sample]:
    for (L, S), window in product(SIZES, (1, 2, 3, 50)):
        yield option_sample({"L": L, "S": S, "window": window})


def _prefix(rng: Rng) -> Iterator[Sample]:
    for L, S in SIZES:
        if S:
            yield option_sample({"L": L, "S": S, "lengths": int(rng.integers(0, S + 1))})
            yield option_sample({"L": L, "S": S, "lengths": rng.integers(0, S + 1, 3).tolist()})


def _segment(rng: Rng) -> Iterator[Sample]:
    for B, L, S in ((1, 1, 1), (2, 5, 7), (3, 13, 11), (1, 23, 23), (2, 0, 3)):
        queries, keys = np.sort(rng.integers(-1, 4, (B, L))), rng.integers(-1, 4, (B, S))
        yield option_sample({"queries": queries})
        yield option_sample({"queries": queries, "keys": keys})


def table_case(
    samples: Callable[[Rng], Iterator[Sample]], ours: Callable[..., Any], theirs: Callable[..., Any]
) -> Case:
    """A function of options alone."""
    return Case(samples, function(ours), function(theirs), constant=True)


CASES = {
    "causal_mask": table_case(_causal, masks.causal_mask, twin.causal_mask),
    "create_causal_mask": table_case(_create, masks.create_causal_mask, twin.create_causal_mask),
    "padding_mask": table_case(_padding, masks.padding_mask, twin.padding_mask),
    "sliding_mask": table_case(_sliding, masks.sliding_mask, twin.sliding_mask),
    "prefix_mask": table_case(_prefix, masks.prefix_mask, twin.prefix_mask),
    "segment_mask": table_case(_segment, masks.segment_mask, twin.segment_mask),
}
