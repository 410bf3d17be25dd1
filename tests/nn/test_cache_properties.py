"""Caches of every kind, under any program of appends, trims, forks, saves, selections and merges, against an uncached
pass over everything so far with the equivalent mask.

MLX_XFORMER_EXAMPLES: how many examples in all, drawn anew (make test-nightly); without it a few hundred, always the
same. Most programs run with slots in multiples of 4 instead of 256, so that lines are renewed all the time.
"""

import itertools
import os
import random

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.harness import assert_within_budget

from mlx_xformer.nn.attention.core import attention
from mlx_xformer.nn.cache import (
    KVCache,
    Quantized,
    RewindError,
    cache_bytes,
    load_caches,
    merge_caches,
    quantized,
    save_caches,
    sizes,
)
from mlx_xformer.reference.nn import attention as twin_attention
from mlx_xformer.reference.nn import cache as twin
from mlx_xformer.reference.nn import linear

KINDS = list(
    itertools.product(("full", "sliding", "sliding with sinks"), (None, 8, 4), ("one", "ragged"), ("MHA", "GQA", "MQA"))
)
WANTED = int(os.environ.get("MLX_XFORMER_EXAMPLES", "0"))
EACH = -(-WANTED // len(KINDS)) if WANTED else 6
HEADS = {"MHA": (3, 3), "GQA": (6, 2), "MQA": (5, 1)}
D, DV = 10, 7


def rounded(x, bits):
    """x in float64 as a cache holds it: the codes are MLX's, what they mean is the twin's."""
    if bits is None:
        return x.astype(np.float64)
    stored = Quantized.of(mx.array(x), bits)
    scales, biases = (np.array(part, np.float64) for part in (stored.scales, stored.biases))
    return linear.dequantize(linear.unpack(np.array(stored.packed), bits), scales, biases)[..., : x.shape[-1]]


class Pair:
    """A cache, and the twin that holds the same."""

    def __init__(self, cache, expected, simple=True):
        self.cache, self.expected, self.simple = cache, expected, simple

    def check(self):
        """Facts that hold between any two steps."""
        cache, expected = self.cache, self.expected
        assert cache.length == expected.length
        offset = np.array(cache.offset).reshape(-1)
        assert (offset == expected.length - np.array(expected.padding)[: len(offset)]).all()
        assert cache.nbytes == sum(x.nbytes for x in cache.arrays)
        assert all(x.shape[2] % sizes.STEP == 0 for x in cache._lines)
        if self.simple and cache.length:
            keys = expected.keys
            kind = {name: getattr(cache, name) for name in ("window", "keep", "slack", "bits", "capacity")}
            told = cache_bytes(
                expected.longest, num_kv_heads=keys.shape[1], head_dim=D, value_dim=DV, batch=len(keys), **kind
            )
            assert cache.nbytes == told

    def append(self, rng, H, n, narrower):
        """n positions, and the attention of their queries against the twin's; or none, where there is no room."""
        B, G = len(self.expected.padding), self.expected.keys.shape[1]
        q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in ((B, H, n, D), (B, G, n, D), (B, G, n, DV)))
        limit, size = self.cache.capacity, self.cache.length + n
        if limit is not None and size > limit:
            before = [self.cache.length, *map(id, self.cache.arrays)]
            with pytest.raises(ValueError, match=f"its capacity is {limit} positions, got {size}"):
                self.cache.append(mx.array(k), mx.array(v), window=narrower)
            assert [self.cache.length, *map(id, self.cache.arrays)] == before
            return None
        view = self.cache.append(mx.array(k), mx.array(v), window=narrower)
        out = np.array(attention(mx.array(q), view.keys, view.values, **view.options))
        bits = self.cache.bits
        self.expected = self.expected.append(rounded(k, bits), rounded(v, bits))
        mask = self.expected.mask(n, narrower)
        arrays = [q.astype(np.float64), self.expected.keys, self.expected.values]
        truth, single = (
            twin_attention.attention(*(x.astype(dtype) for x in arrays), mask=mask)
            for dtype in (np.float64, np.float32)
        )
        assert_within_budget(out, truth, single)
        return view, np.array(view.keys.dequantized() if bits else view.keys)

    def trim(self, n):
        """Rewinds, where that is promised, and is refused where not."""
        if n <= self.expected.rewindable:
            self.cache.trim(n)
            self.expected = self.expected.trim(n)
        else:
            before = [self.cache.length, *map(id, self.cache.arrays)]
            with pytest.raises(RewindError, match=f"0 to {self.expected.rewindable} .* got {n}"):
                self.cache.trim(n)
            assert [self.cache.length, *map(id, self.cache.arrays)] == before

    def select(self, rows):
        return Pair(self.cache.select(rows), self.expected.select(rows), simple=False)

    def fork(self):
        return Pair(self.cache.fork(), self.expected, self.simple)


def merged(pairs):
    return Pair(merge_caches([p.cache for p in pairs]), twin.merge([p.expected for p in pairs]), simple=False)


def saved(pairs, folder):
    """All of them, from a file."""
    path = folder / "caches.safetensors"
    save_caches(path, [pair.cache for pair in pairs], {"key": "value"})
    caches, metadata = load_caches(path)
    assert metadata == {"key": "value"}
    return [Pair(cache, p.expected, p.simple) for cache, p in zip(caches, pairs, strict=True)]


OPERATIONS = ("append",) * 8 + ("trim",) * 4 + ("fork", "save", "select", "merge", "split", "reset", "hold", "empty")


@st.composite
def programs(draw, ragged):
    step = draw(st.sampled_from([4, 4, 4, 256]))
    options = {"window": draw(st.integers(1, 13)), "keep": draw(st.integers(1, 4)), "slack": draw(st.integers(0, 6))}
    options["padding"] = draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)) if ragged else None
    options["capacity"] = draw(st.none() | (st.integers(20, 90) if step == 4 else st.integers(200, 900)))
    names = st.sampled_from(OPERATIONS)
    some = st.integers(1, 9) | st.integers(1, 30) if step == 4 else st.sampled_from([1, 2, 5, 60, 130, 250, 300])
    steps = draw(st.lists(st.tuples(names, some, st.integers(0, 2**16)), min_size=3, max_size=14))
    return step, options, steps, draw(st.integers(0, 2**20))


def derived(name, pairs, at, draw, folder, fresh):
    """What comes of pairs[at], or of it and all others."""
    pair = pairs[at]
    batch = len(pair.expected.padding)
    if name == "fork":
        return [pair.fork()]
    if name == "save" and (pair.cache.length or pair.cache.padding):
        return saved([pair], folder)
    if name == "empty":
        return [fresh()]
    if name == "select" and pair.cache.length:
        return [pair.select([(draw + i * draw) % batch for i in range(1 + draw % 3)])]
    if name == "split" and pair.cache.length:
        rows = zip(pair.cache.split(), pair.expected.split(), strict=True)
        return [merged([Pair(*row) for row in rows])]
    if name == "merge" and sum(len(p.expected.padding) for p in pairs) < 7:
        return [merged(pairs[at:] + pairs[:at])]
    return []


def run(kind, program, folder):
    """A program, step by step."""
    (length, bits, batch, heads), (_, options, steps, seed) = kind, program
    (H, G), rng = HEADS[heads], np.random.default_rng(seed)
    options = {**options, "bits": bits}
    if length == "full":
        options |= {"window": None, "keep": 0}
    elif length == "sliding":
        options |= {"keep": 0}
    rows = options["padding"] or [0]

    def fresh(padding):
        empty = [np.zeros((len(padding), G, 0, width)) for width in (D, DV)]
        limits = {name: options[name] for name in ("window", "keep", "slack")}
        return Pair(
            KVCache(**{**options, "padding": padding if batch == "ragged" else None}),
            twin.KVCache(*empty, tuple(padding), **limits),
            simple=batch == "one",
        )

    pairs, held = [fresh(rows)], []
    for name, n, which in steps:
        at = which % len(pairs)
        pair = pairs[at]
        if name == "append":
            narrower = None if which % 5 else which % 11 + 1
            pair.append(rng, H, n, narrower)
        elif name == "trim":
            pair.trim(min(n, pair.cache.length + 1))
        elif name == "hold":  # a view outlives what becomes of its cache
            held += [view] if (view := pair.append(rng, H, n, None)) else []
        elif name == "reset":
            pair.cache.reset()
            # an empty cache is one row, but where padding tells of more
            pair.expected = fresh(pair.expected.padding if pair.cache.padding else [0]).expected
        else:  # the caches that the new one comes from go on as well
            made = derived(name, pairs, at, int(rng.integers(0, 99)), folder, lambda: fresh(rows))
            if len(pairs) < 4 and len(made) == 1:
                pairs += made
            else:
                pairs[at : at + len(made)] = made
        for pair in pairs:
            pair.check()
            assert pair.cache.capacity == options["capacity"]
    for view, keys in held:
        assert (np.array(view.keys.dequantized() if bits else view.keys) == keys).all()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: ", ".join(map(str, kind)))
def test_any_program(kind, tmp_path, monkeypatch):
    @settings(
        max_examples=EACH,
        deadline=None,
        derandomize=not WANTED,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(programs(kind[2] == "ragged"))
    def drawn(program):
        monkeypatch.setattr(sizes, "STEP", program[0])
        sizes.slots.cache_clear()
        try:
            run(kind, program, tmp_path)
        finally:
            sizes.slots.cache_clear()

    drawn()


def random_program(draw, ragged):
    """A program as programs() draws them, from random.Random."""
    step = draw.choice([4, 4, 4, 4, 256])
    options = {"window": draw.randint(1, 13), "keep": draw.randint(1, 4), "slack": draw.randint(0, 6)}
    options["capacity"] = draw.choice([None, None, draw.randint(20, 90) if step == 4 else draw.randint(200, 900)])
    options["padding"] = [draw.randint(0, 9) for _ in range(draw.randint(1, 3))] if ragged else None

    def some():
        return draw.choice([draw.randint(1, 9), draw.randint(1, 30)] if step == 4 else [1, 2, 60, 250])

    steps = [(draw.choice(OPERATIONS), some(), draw.randrange(2**16)) for _ in range(draw.randint(6, 14))]
    return step, options, steps, draw.randrange(2**20)


@pytest.mark.slow
def test_programs_of_one_seed(tmp_path, monkeypatch):
    """Twelve programs for each kind; packed keys and values are computed with in the smallest blocks."""
    draw = random.Random(0)
    monkeypatch.setattr(quantized, "_FLOATS", 1)
    try:
        for turn, (index, kind) in itertools.product(range(12), enumerate(KINDS)):
            program = random_program(draw, kind[2] == "ragged")
            monkeypatch.setattr(sizes, "STEP", program[0])
            sizes.slots.cache_clear()
            folder = tmp_path / f"{turn}.{index}"
            folder.mkdir()
            run(kind, program, folder)
    finally:
        sizes.slots.cache_clear()
