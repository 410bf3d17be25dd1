"""Samplers against their formulas in NumPy, and by how often they draw what."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_xformer.text.samplers import (
    greedy,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    make_sampler,
    penalize,
    suppress_tokens,
)

ROWS, SIZE = 5, 37
NONE = mx.zeros((ROWS, 0), mx.int32)


@pytest.fixture(params=[0, 1])
def logits(request):
    return np.random.default_rng(request.param).normal(size=(ROWS, SIZE)).astype(np.float32) * 3


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kept(filtered, logits):
    """Which tokens a filter leaves; what it leaves is as it was."""
    filtered = np.array(filtered)
    left = np.isfinite(filtered)
    assert (filtered[left] == logits[left]).all() and (filtered[~left] == -np.inf).all() and left.any(-1).all()
    return left


def test_greedy(logits):
    assert greedy(mx.array(logits), NONE).tolist() == logits.argmax(-1).tolist()
    assert greedy(mx.array([[1.0, 3, 3]]), NONE).tolist() == [1]
    assert make_sampler() is greedy and make_sampler(0, seed=5) is greedy


@pytest.mark.parametrize("k", [1, 2, 11, SIZE, SIZE + 5])
def test_top_k(logits, k):
    rank = np.argsort(np.argsort(-logits, axis=-1), axis=-1)
    assert (kept(keep_top_k(mx.array(logits), k), logits) == (rank < k)).all()


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.7, 0.95, 1.0])
def test_top_p(logits, p):
    left = kept(keep_top_p(mx.array(logits), p), logits)
    for row, mask in zip(softmax(logits.astype(np.float64)), left, strict=True):
        order = np.argsort(-row)
        count = min(SIZE, 1 + int((np.cumsum(row[order]) < p).sum()))
        assert set(np.flatnonzero(mask)) == set(order[:count])


@pytest.mark.parametrize("p", [1e-3, 0.1, 0.5, 1.0])
def test_min_p(logits, p):
    probabilities = softmax(logits.astype(np.float64))
    wanted = probabilities >= p * probabilities.max(-1, keepdims=True)
    assert (kept(keep_min_p(mx.array(logits), p), logits) == wanted).all()


def test_equal_logits_stay_together():
    x = np.array([[2.0, 1, 1, 1, 0]], np.float32)
    assert kept(keep_top_k(mx.array(x), 2), x)[0].tolist() == [True, True, True, True, False]
    assert kept(keep_top_p(mx.array(x), 0.6), x)[0].tolist() == [True, True, True, True, False]


def test_filters_follow_one_another(logits):
    """top_p counts what top_k has left."""
    x = keep_top_k(mx.array(logits), 7)
    left = np.isfinite(np.array(keep_top_p(x, 0.9)))
    for row, mask in zip(logits.astype(np.float64), left, strict=True):
        order = np.argsort(-row)[:7]
        count = min(7, 1 + int((np.cumsum(softmax(row[order])) < 0.9).sum()))
        assert set(np.flatnonzero(mask)) == set(order[:count])


def test_penalty(logits):
    history = np.array([[1, 2, 2, -1], [-1, -1, -1, -1], [0, SIZE - 1, 5, 5], [3, 3, 3, 3], [-1, 7, 8, 9]])
    expected = logits.astype(np.float64)
    for row, seen in zip(expected, history, strict=True):
        for token in set(seen.tolist()) - {-1}:
            row[token] = row[token] / 1.7 if row[token] > 0 else row[token] * 1.7
    before = mx.array(logits)
    after = penalize(before, mx.array(history), 1.7)
    assert np.allclose(np.array(after), expected, rtol=1e-6, atol=0) and (np.array(before) == logits).all()
    assert (penalize(before, NONE, 1.7) == before).all()
    chosen = make_sampler(repetition_penalty=1.7)(before, mx.array(history))
    assert chosen.tolist() == expected.argmax(-1).tolist()


def drawn(sampler, logits, count=4000):
    """How often each token is drawn, over positions."""
    x = mx.array(logits)
    draws = mx.stack([sampler(x, mx.zeros((len(logits), n), mx.int32)) for n in range(count)])
    return np.stack([np.bincount(column, minlength=logits.shape[1]) for column in np.array(draws).T]) / count


@pytest.mark.parametrize(
    ("options", "formula"),
    [
        ({"temperature": 1.0}, lambda x: softmax(x)),
        ({"temperature": 0.6}, lambda x: softmax(x / 0.6)),
        ({"temperature": 2.0, "top_k": 3}, lambda x: cut(x / 2, lambda r, p: r < 3)),
        ({"temperature": 1.5, "top_p": 0.8}, lambda x: cut(x / 1.5, lambda r, p: np.cumsum(p) - p < 0.8)),
        ({"temperature": 1.5, "min_p": 0.2}, lambda x: cut(x / 1.5, lambda r, p: p >= 0.2 * p[0])),
    ],
)
def test_frequencies(options, formula):
    """Within 4.5 standard deviations of the formula, token by token."""
    logits = np.random.default_rng(2).normal(size=(3, 11)).astype(np.float32) * 1.5
    found, expected = drawn(make_sampler(seed=1, **options), logits), formula(logits.astype(np.float64))
    assert (np.abs(found - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / 4000) + 1e-12).all()


def cut(logits, keep):
    """Probabilities after a filter that sees each row's ranks and probabilities from the likeliest down."""
    out = np.zeros_like(logits)
    for row, target in zip(logits, out, strict=True):
        order = np.argsort(-row)
        p = softmax(row[order])
        left = order[keep(np.arange(len(row)), p)]
        target[left] = softmax(row[left])
    return out


def test_a_draw_depends_on_seed_and_position_only(logits):
    x, history = mx.array(logits) / 8, mx.zeros((ROWS, 5), mx.int32)
    one, same, other = make_sampler(1.0, seed=3), make_sampler(1.0, seed=3), make_sampler(1.0, seed=4)
    mx.random.seed(1)
    first = one(x, history).tolist()
    mx.random.seed(2)
    assert first == one(x, history).tolist() == same(x, history + 1).tolist()
    later = [one(x, mx.zeros((ROWS, n), mx.int32)).tolist() for n in range(6, 16)]
    assert first not in later and len({tuple(draw) for draw in later}) == 10
    assert other(x, history).tolist() != first
    assert len(set(first)) > 1


def test_half_precision_logits_are_drawn_from_in_float32():
    """bfloat16 would round these quotients by up to 0.03, which turns about one draw in fifty."""
    sampler = make_sampler(0.7)
    x = np.random.default_rng(3).uniform(-8, -5, (40, 1009)).astype(np.float32)
    x[:, 0] = 0
    half = mx.array(x).astype(mx.bfloat16)
    for n in range(20):
        history = mx.zeros((40, n), mx.int32)
        assert sampler(half, history).tolist() == sampler(half.astype(mx.float32), history).tolist()


@pytest.mark.parametrize("temperature", [1e-30, 1e-40, 1e-320])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_a_temperature_near_0_is_nearly_greedy(logits, temperature, options):
    """Also where logits / temperature is more than float32 holds."""
    sampler = make_sampler(temperature, **options)
    for x in (logits, logits + 100, logits - 100):
        assert sampler(mx.array(x), NONE).tolist() == x.argmax(-1).tolist()
    equal = np.array([[1, 3, 3, 0]], np.float32)
    assert (drawn(sampler, equal, 50)[0] > 0).tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature must be at least 0 and finite, got -1"),
        ({"temperature": float("nan")}, "temperature must be at least 0 and finite, got nan"),
        ({"temperature": 1, "top_k": 0}, "top_k must be at least 1, got 0"),
        ({"temperature": 1, "top_p": 0}, "top_p must be above 0 and at most 1, got 0"),
        ({"temperature": 1, "top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"temperature": 1, "min_p": float("nan")}, "min_p must be above 0 and at most 1, got nan"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0 and finite, got 0"),
        ({"seed": 2**32}, r"seed must be at least 0 and below 2\*\*32"),
        ({"top_p": 0.9}, "top_p must come with a temperature above 0, got 0.9 and temperature 0"),
    ],
    ids=str,
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(**options)


def test_unknown_options():
    with pytest.raises(TypeError, match="topp"):
        make_sampler(1.0, topp=0.9)


@pytest.mark.parametrize("prompt", [2, 3, 4])
def test_suppress_tokens(logits, prompt):
    """Tokens that are never drawn, and some that do not come first; numbers of other vocabularies hide nothing."""
    never, first = [3, 36, SIZE, 99, -1, -SIZE], [0, 7, 3]
    history = mx.zeros((ROWS, 3), mx.int32)
    seen = []
    sampler = suppress_tokens(lambda x, _: seen.append(x) or greedy(x, _), never, first=first, prompt=prompt)
    hidden = {3, 36} | ({0, 7} if prompt == 3 else set())
    drawn = sampler(mx.array(logits), history).tolist()
    gone = ~kept(seen[0], logits)
    assert gone.all(0).nonzero()[0].tolist() == gone.any(0).nonzero()[0].tolist() == sorted(hidden)
    left = np.where(np.isin(np.arange(SIZE), list(hidden)), -np.inf, logits)
    assert drawn == left.argmax(-1).tolist()


def test_suppress_no_tokens(logits):
    sampler = suppress_tokens(greedy, [], first=[5], prompt=0)
    assert sampler(mx.array(logits), mx.zeros((ROWS, 1), mx.int32)).tolist() == logits.argmax(-1).tolist()
    assert 5 not in sampler(mx.array(logits) * 0 + mx.array([i == 5 for i in range(SIZE)]), NONE).tolist()
