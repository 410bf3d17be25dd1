"""Samples of samplers: what they leave of logits, and the tokens that they draw with MLX's random numbers.

Where a filter's limit is decided by rounding the sample is drawn again. Axes: B batch, V vocabulary, n tokens so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from ...reference import text as twin
from ...reference.backend import softmax
from ...text import samplers
from ..samples import Case, Options, Rng, Sample, described, function

_SHAPES = ((1, 2), (3, 11), (2, 211), (1, 1))
_MARGIN = 1e-4  # of probabilities, from what float32 makes of them


def _logits(rng: Rng, B: int, V: int, decided: Callable[[np.ndarray], bool] = lambda _: True) -> np.ndarray:
    """Logits (B, V) whose probabilities, in order, are decided."""
    while True:
        logits = (rng.normal(size=(B, V)) * 2).astype(np.float32).astype(np.float64)
        if all(decided(-np.sort(-softmax(row))) for row in logits):
            return logits


def _history(rng: Rng, B: int, V: int) -> np.ndarray:
    """(B, n): tokens, some twice, behind the padding of a row."""
    history = rng.integers(0, V, (B, 7))
    history[-1, :3] = -1
    return history


def _top_k(rng: Rng) -> Iterator[Sample]:
    for B, V in _SHAPES:
        for k in (1, 2, 5, 300):
            yield Sample(described(logits=(B, V), k=k), {"logits": _logits(rng, B, V)}, {"k": k})
    ties = np.repeat(rng.normal(size=(2, 5)), 3, axis=1)
    yield Sample("k=4, each logit three times", {"logits": ties}, {"k": 4})
    yield Sample("k=2, views with gaps", {"logits": _logits(rng, 3, 11)}, {"k": 2}, strided=True)


def _reaches(p: float) -> Callable[[np.ndarray], bool]:
    """Whether no sum of the likeliest probabilities is p but for rounding."""
    return lambda ordered: bool(np.abs(np.cumsum(ordered) - p).min() > _MARGIN)


def _is_apart(p: float) -> Callable[[np.ndarray], bool]:
    """Whether no probability is p times the largest but for rounding."""
    return lambda ordered: bool(np.abs(ordered / ordered[0] - p).min() > _MARGIN)


def _top_p(rng: Rng) -> Iterator[Sample]:
    for B, V in _SHAPES:
        for p in (0.01, 0.5, 0.9, 0.99):
            yield Sample(described(logits=(B, V), p=p), {"logits": _logits(rng, B, V, _reaches(p))}, {"p": p})
        yield Sample(described(logits=(B, V), p=1), {"logits": _logits(rng, B, V)}, {"p": 1.0})
    ties = np.log(np.array([[0.2, 0.1, 0.2, 0.3, 0.2]]))
    yield Sample("p=0.45, ties", {"logits": ties.astype(np.float32).astype(np.float64)}, {"p": 0.45})


def _min_p(rng: Rng) -> Iterator[Sample]:
    for B, V in _SHAPES:
        for p in (0.01, 0.3, 0.9):
            yield Sample(described(logits=(B, V), p=p), {"logits": _logits(rng, B, V, _is_apart(p))}, {"p": p})


def _penalty(rng: Rng) -> Iterator[Sample]:
    for B, V in _SHAPES:
        for penalty in (1.3, 0.7):
            options = {"history": _history(rng, B, V), "penalty": penalty}
            yield Sample(described(logits=(B, V), penalty=penalty), {"logits": _logits(rng, B, V)}, options)
    nothing = {"history": np.zeros((2, 0), np.int64), "penalty": 1.3}
    yield Sample("no history", {"logits": _logits(rng, 2, 11)}, nothing)


def _greedy(rng: Rng) -> Iterator[Sample]:
    for B, V in _SHAPES:
        yield Sample(described(logits=(B, V)), {"logits": _logits(rng, B, V)}, {"history": _history(rng, B, V)})
    ties = np.array([[0.0, 1.0, 1.0], [2.0, 2.0, -np.inf]])
    yield Sample("ties", {"logits": ties}, {"history": np.zeros((2, 1), np.int64)})


_SAMPLERS: dict[str, dict[str, Any]] = {
    "greedy, penalty": {"temperature": 0.0, "repetition_penalty": 1.7},
    "temperature 0.6": {"temperature": 0.6},
    "temperature 1.7": {"temperature": 1.7},
    "top-k": {"temperature": 0.9, "top_k": 3},
    "top-p": {"temperature": 1.1, "top_p": 0.8},
    "min-p": {"temperature": 1.3, "min_p": 0.1},
    "penalty": {"temperature": 0.7, "repetition_penalty": 1.7},
    "all": {"temperature": 0.8, "top_k": 9, "top_p": 0.93, "min_p": 0.03, "repetition_penalty": 1.2},
}


def _draws(rng: Rng) -> Iterator[Sample]:
    """A batch of 97 rows each, so that a wrong distribution draws other tokens somewhere."""
    for what, options in _SAMPLERS.items():
        for V in (11, 53):
            logits, history = _logits(rng, 97, V), _history(rng, 97, V)
            seed = int(rng.integers(0, 2**32))
            noise = mx.random.gumbel((97, V), key=mx.array([seed, history.shape[1]], mx.uint32))
            given = {"history": history, "seed": seed, "noise": np.array(noise), "options": options}
            yield Sample(f"{what}: {described(logits=(97, V))}", {"logits": logits}, given)


def _drawn(_: dict, arrays: dict, options: Options) -> mx.array:
    sampler = samplers.make_sampler(**options["options"], seed=options["seed"])
    return sampler(arrays["logits"], options["history"])


def _twin_drawn(_: dict, arrays: dict, options: Options) -> np.ndarray:
    return twin.sample(arrays["logits"], options["history"], options["noise"], **options["options"])


def _filter(samples: Callable[[Rng], Iterator[Sample]], ours: Callable[..., Any], theirs: Callable[..., Any]) -> Case:
    return Case(samples, function(ours), function(theirs), vjp=False, float32_only=True)


CASES = {
    "greedy": _filter(_greedy, samplers.greedy, lambda logits, history: twin.greedy(logits)),
    "keep_top_k": _filter(_top_k, samplers.keep_top_k, twin.keep_top_k),
    "keep_top_p": _filter(_top_p, samplers.keep_top_p, twin.keep_top_p),
    "keep_min_p": _filter(_min_p, samplers.keep_min_p, twin.keep_min_p),
    "penalize": _filter(_penalty, samplers.penalize, twin.penalize),
    "make_sampler": Case(_draws, _drawn, _twin_drawn, vjp=False, float32_only=True),
}
