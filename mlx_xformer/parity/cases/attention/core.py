"""Samples of attention() and attention_weights().

Axes: B batch, H query heads, G key/value heads, L queries, S keys, D head_dim, Dv value_dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ....nn.attention.core import attention, attention_weights
from ....reference.nn import attention as twin
from ...samples import NO_QUOTIENT, Arrays, Case, Options, Rng, Sample, described, function

FEW = {"B": 2, "H": 6, "G": 3, "L": 5, "S": 7, "D": 11, "Dv": 13}
MANY = {**FEW, "L": 197, "S": 211}  # blocks of rows, bands, and the softmax of cpu.py
OPTIONS = ("mask", "bias", "by_distance", "causal", "window", "sinks", "softcap", "scale")
_NO_HALF = "random scores of 1e4 are multiples of 8 in half precision, which tells no weights apart"

_SETTLED = (
    "a settled softmax's gradient is a difference of equal numbers, times queries of 1e4: float32 leaves no digit"
)


def _tensors(rng: Rng, B: int, H: int, G: int, L: int, S: int, D: int, Dv: int) -> Arrays:
    shapes = {"q": (B, H, L, D), "k": (B, G, S, D), "v": (B, G, S, Dv)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def _sample(rng: Rng, *names: str, what: str = "", sizes: dict[str, int] = FEW, **changes: Any) -> Sample:
    """A sample with the options of these names drawn; a mask and a bias leave one row without a key, where they can."""
    sizes = {**sizes, **{name: value for name, value in changes.items() if name in sizes}}
    B, H, L, S = (sizes[name] for name in "BHLS")
    arrays = _tensors(rng, **sizes)
    options: dict[str, Any] = {}
    if "mask" in names:
        options["mask"] = rng.random((B, 1, L, S)) > 0.3
        options["mask"][-1:, :, L // 2 : L // 2 + 1] = False
    if "bias" in names:
        arrays["bias"] = rng.normal(size=(H, L, S))
        arrays["bias"][-1, :1] = -np.inf
    if "by_distance" in names and L + S > 0:
        arrays["by_distance"] = rng.normal(size=(H, S + L - 1))
    if "sinks" in names:
        arrays["sinks"] = rng.normal(size=H)
    drawn = {"causal": True, "window": int(rng.integers(1, 5)) if S < 100 else 31, "softcap": 1.7, "scale": 0.41}
    options |= {name: value for name, value in drawn.items() if name in names}
    shown = {name: name in names and drawn.get(name, True) for name in OPTIONS}
    facts = described(**sizes, **shown) + (f" ({what})" if what else "")
    return Sample(facts, arrays, options, joint=L > 50)


def _random(rng: Rng) -> Sample:
    """Any sizes, any options, masks and biases of any shape that broadcasts."""
    H, G = [(6, 3), (6, 6), (6, 1), (1, 1), (4, 2)][rng.integers(5)]
    L, S = sorted(int(n) for n in rng.choice([1, 2, 3, 5, 7, 11, 13, 17], 2))
    B, D, Dv = (int(rng.choice(sizes)) for sizes in ([1, 2, 3], [1, 2, 5, 8, 11, 16], [1, 3, 8, 13]))
    names = [name for name in OPTIONS if rng.random() < 0.4]
    if rng.random() < 0.3 and not {"causal", "window"} & set(names):
        L, S = S, L
    sample = _sample(rng, *names, B=B, H=H, G=G, L=L, S=S, D=D, Dv=Dv)
    shapes = [(S,), (L, 1), (1, 1, 1, S), (B, 1, 1, S), (B, H, L, S), (H, 1, 1), ()]
    if "mask" in names:
        sample.options["mask"] = np.asarray(rng.random(shapes[rng.integers(len(shapes))]) > 0.3)  # type: ignore[index]
    if "bias" in names:
        sample.arrays["bias"] = np.asarray(rng.normal(size=shapes[rng.integers(len(shapes))]))
    return replace(sample, what=f"{sample.what} (random)")


def _with(sample: Sample, options: Options | None = None, **arrays: np.ndarray) -> Sample:
    """The sample with these instead."""
    return replace(sample, arrays={**sample.arrays, **arrays}, options={**sample.options, **(options or {})})


def _blind(rng: Rng) -> Iterator[Sample]:
    """Rows, batches and calls that may attend nothing."""
    yield _sample(rng, "mask", "bias", what="rows blind by mask and by bias")
    yield _with(_sample(rng, what="nothing to attend"), {"mask": np.zeros((1, 1, 1, 7), bool)})
    yield _with(_sample(rng, what="a bias of -inf"), bias=np.full((1, 7), -np.inf))
    lengths = np.arange(7) < np.array([0, 4])[:, None]
    yield _with(_sample(rng, "sinks", what="an empty sequence of the batch"), {"mask": lengths[:, None, None]})
    edge = _sample(rng, "bias", "causal", what="the first row sees one key, whose bias is -inf", L=7)
    edge.arrays["bias"][:, 0, 0] = -np.inf
    yield edge


def _edges(rng: Rng) -> Iterator[Sample]:
    """Single positions, nothing at all, more queries than keys, views, ties."""
    yield _sample(rng, what="one position", L=1, S=1)
    yield _sample(rng, "causal", "sinks", what="one query of a cache", L=1)
    yield _sample(rng, "mask", what="one key", S=1)
    yield _sample(rng, "causal", what="one key hidden from one query", L=2)
    for window in (6, 7):
        yield _with(_sample(rng, what=f"window={window}: all but one key, or all"), {"window": window})
    yield _sample(rng, what="more queries than keys", L=11)
    yield _sample(rng, what="no queries", L=0)
    yield _sample(rng, "softcap", what="no keys", S=0)
    yield _sample(rng, "causal", what="no batch", B=0)
    yield replace(_sample(rng, "mask", "bias", what="views with gaps"), strided=True)
    yield replace(_sample(rng, what="views with gaps", G=6), strided=True)
    tied = _sample(rng, "causal", what="tied scores")
    yield _with(tied, q=np.ones_like(tied.arrays["q"]), k=np.ones_like(tied.arrays["k"]))
    zeros = _sample(rng, "window", what="scores of 0")
    yield _with(zeros, q=np.zeros_like(zeros.arrays["q"]))


def _extremes(rng: Rng) -> Iterator[Sample]:
    """Large scores, and what is not a number."""
    ahead = _sample(rng, what="one score of 1e4 in each row")
    ones = np.eye(11)[:7]
    queries = 100 * ones[rng.permutation(7)[:5]] + 0.1 * ahead.arrays["q"]
    yield _with(ahead, {"scale": 1.0}, q=queries, k=100 * ones + 0.1 * ahead.arrays["k"])
    wild = _sample(rng, "causal", what="random scores of 1e4")
    yield replace(_with(wild, q=wild.arrays["q"] * 1e4), skip_half=_NO_HALF, skip_vjp=_SETTLED)
    odd = _sample(rng, "mask", what="NaN in a query, a hidden key and a value, infinity in a value")
    q, k, v = (odd.arrays[name] for name in "qkv")
    q[0, 1, 2, 3], k[0, 0, 4, 1], v[1, 2, 5, 7], v[1, 1, 0, 2] = np.nan, np.nan, np.nan, np.inf
    mask = np.ones((2, 1, 1, 7), bool)
    mask[0, ..., 4] = False
    yield replace(_with(odd, {"mask": mask}), skip_vjp=NO_QUOTIENT)


def _large(rng: Rng) -> Iterator[Sample]:
    """What is computed in blocks of rows, in bands, or by the chains of cpu.py."""
    yield _sample(rng, sizes=MANY, G=6)
    yield _sample(rng, sizes=MANY)
    for names in (("causal",), ("window",), ("mask", "sinks"), ("softcap", "bias", "scale"), OPTIONS):
        yield _sample(rng, *names, sizes=MANY)
    yield _sample(rng, "causal", "window", sizes=MANY, L=67)
    for D in (64, 128):  # heads that Metal's kernels take, for many queries and for few
        yield _sample(rng, "causal", sizes=MANY, B=1, D=D, Dv=D)
        yield _sample(rng, "mask", sizes=MANY, L=1, D=D, Dv=D)
    long = {**MANY, "B": 1, "H": 2, "G": 2, "L": 1031, "S": 1033}
    yield _sample(rng, what="as long as Metal pads heads for", sizes=long)


def _samples(rng: Rng) -> Iterator[Sample]:
    yield _sample(rng)
    for name in OPTIONS:
        yield _sample(rng, name)
    yield _sample(rng, *OPTIONS)
    for other in ("window", "mask", "sinks"):
        yield _sample(rng, "causal", other)
    for G in (1, 6):
        yield _sample(rng, "mask", "bias", "causal", G=G)
    yield from _blind(rng)
    yield from _edges(rng)
    yield from _extremes(rng)
    yield from _large(rng)
    for _ in range(12):
        yield _random(rng)


def _twin(q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> np.ndarray:
    if not len(q):  # the twin's loop over the batch needs one
        return np.zeros((*q.shape[:3], v.shape[-1]), q.dtype)
    return twin.attention(q, k, v, **options)


def _weights_samples(rng: Rng) -> Iterator[Sample]:
    for index, sample in enumerate(_samples(rng)):
        arrays = {name: x for name, x in sample.arrays.items() if name != "v"}
        scores = math.prod(arrays["q"].shape[:3]) * arrays["k"].shape[2]
        if "value" not in sample.what and scores < 10**6:  # weights are not computed in blocks
            yield replace(sample, arrays=arrays, options={**sample.options, "average": index % 2 == 1})


def _twin_weights(q: np.ndarray, k: np.ndarray, *, average: bool, **options: Any) -> np.ndarray:
    weights = twin.attention_weights(q, k, **options)
    return weights.mean(axis=1) if average else weights


CASES = {
    "attention": Case(_samples, function(attention), function(_twin), half=4.0, half_vjp=8.0),
    "attention_weights": Case(
        _weights_samples, function(attention_weights), function(_twin_weights), half=4.0, half_vjp=8.0
    ),
}
