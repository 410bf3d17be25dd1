"""Samplers: plain functions of logits (B, V) and history (B, n) to tokens (B,).

history holds the tokens that each row has read and written so far, -1 where it is padded. A sampler keeps no state: its
random numbers come from the seed and the position n, so that a seed gives one text however it is computed: in chunks,
from a prompt cache, with a draft model. Any function of this form will do, such as `greedy`.

Axes: B batch, V vocabulary, n tokens so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import mlx.core as mx

Sampler = Callable[[mx.array, mx.array], mx.array]
_TINY = 2.0**-126


def greedy(logits: mx.array, history: mx.array) -> mx.array:
    """The most likely token; of several, the first."""
    return mx.argmax(logits, axis=-1)


def make_sampler(
    temperature: float = 0.0,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int = 0,
) -> Sampler:
    """A sampler that takes its steps in the order of Hugging Face's: the penalty, the temperature, top_k, top_p, min_p.

    temperature 0 is greedy, and then the three filters and the seed are of no use: ValueError for a filter. top_k: as
    many tokens, and those equal to the last of them. top_p: the fewest whose probability is top_p or more. min_p:
    those at least min_p times as probable as the first. repetition_penalty: see penalize. seed: 32 bits.
    """
    filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    for name in ("top_p", "min_p"):
        value = filters[name]
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, got {value}")
    if repetition_penalty is not None and not 0 < repetition_penalty < math.inf:
        raise ValueError(f"repetition_penalty must be above 0 and finite, got {repetition_penalty}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be at least 0 and below 2**32, got {seed}")
    if temperature == 0:
        for name, value in filters.items():
            if value is not None:
                raise ValueError(f"{name} must come with a temperature above 0, got {value} and temperature 0 (greedy)")
        if repetition_penalty is None:
            return greedy

    def sample(logits: mx.array, history: mx.array) -> mx.array:
        if repetition_penalty is not None:
            logits = penalize(logits, history, repetition_penalty)
        if temperature == 0:
            return mx.argmax(logits, axis=-1)
        logits = logits.astype(mx.float32)
        # From 0 down they can overflow to -inf only, and the likeliest stays; _TINY is the least normal float32.
        logits = (logits - mx.max(logits, axis=-1, keepdims=True)) / max(temperature, _TINY)
        if top_k is not None:
            logits = keep_top_k(logits, top_k)
        if top_p is not None:
            logits = keep_top_p(logits, top_p)
        if min_p is not None:
            logits = keep_min_p(logits, min_p)
        return mx.random.categorical(logits, key=mx.array([seed, history.shape[1]], mx.uint32))

    return sample


def suppressing(sampler: Sampler, tokens: Sequence[int], *, first: Sequence[int] = (), prompt: int = 0) -> Sampler:
    """`sampler` without these tokens and, for the token that follows a prompt of so many, without those of `first`."""
    at_all, at_first = (mx.array(sorted(set(some)), mx.int32) for some in (tokens, [*tokens, *first]))

    def sample(logits: mx.array, history: mx.array) -> mx.array:
        away = at_first if history.shape[1] == prompt else at_all
        if not away.size:
            return sampler(logits, history)
        rows, size = logits.shape
        # Numbers of other vocabularies go to a column of their own: MLX writes beyond the end without a word.
        index = mx.broadcast_to(mx.where((away < 0) | (away >= size), size, away), (rows, away.size))
        hidden = mx.put_along_axis(mx.zeros((rows, size + 1), mx.bool_), index, mx.array(True), axis=-1)[:, :size]
        return sampler(mx.where(hidden, -mx.inf, logits), history)

    return sample


def keep_top_k(logits: mx.array, k: int) -> mx.array:
    """-inf for all but the k largest of each row, and those equal to the smallest of them."""
    if k >= logits.shape[-1]:
        return logits
    least = mx.min(mx.topk(logits, k, axis=-1), axis=-1, keepdims=True)
    return mx.where(logits < least, -mx.inf, logits)


def keep_top_p(logits: mx.array, p: float) -> mx.array:
    """Keeps the fewest most likely tokens of each row whose probabilities add up to p or more; -inf for the others.

    Tokens as likely as the last of them are kept too (Holtzman et al. 2020, arXiv 1904.09751).
    """
    if p == 1:
        return logits
    ordered = -mx.sort(-logits, axis=-1)
    probabilities = mx.softmax(ordered, axis=-1, precise=True)
    before = mx.cumsum(probabilities, axis=-1) - probabilities  # of all that come before
    kept = (before < p) | (mx.arange(logits.shape[-1]) == 0)
    least = mx.min(mx.where(kept, ordered, mx.inf), axis=-1, keepdims=True)
    return mx.where(logits < least, -mx.inf, logits)


def keep_min_p(logits: mx.array, p: float) -> mx.array:
    """Keeps tokens at least p times as likely as the most likely one of their row; -inf for the others.

    Source: Nguyen et al. 2025, arXiv 2407.01082.
    """
    return mx.where(logits < mx.max(logits, axis=-1, keepdims=True) + math.log(p), -mx.inf, logits)


def penalize(logits: mx.array, history: mx.array, penalty: float) -> mx.array:
    """Divides the logits of tokens in the history by `penalty` where positive, and multiplies them where negative.

    history: (B, n), -1 for padding. Source: Keskar et al. 2019, arXiv 1909.05858.
    """
    rows, size = logits.shape
    index = mx.where(history < 0, size, history)
    seen = mx.put_along_axis(mx.zeros((rows, size + 1), mx.bool_), index, mx.array(True), axis=-1)[:, :size]
    return mx.where(seen, mx.where(logits > 0, logits / penalty, logits * penalty), logits)
