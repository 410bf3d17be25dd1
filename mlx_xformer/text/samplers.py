"""Samplers: functions that choose the next tokens (B,) from logits (B, V) and a history (B, n).

The history holds all tokens of a row so far, prompt and generated, and -1 for padding. A sampler has no state: its
random numbers depend on the seed and the position n only, so that a seed gives the same text whether it is computed in
chunks, from a prompt cache or with a draft model. Any function of this form is a sampler.

Axes: B batch, V vocabulary, n tokens so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import mlx.core as mx

Sampler = Callable[[mx.array, mx.array], mx.array]
_TINY = 2.0**-126  # the smallest normal float32


def greedy(logits: mx.array, history: mx.array) -> mx.array:
    """Chooses the most likely token; of equally likely ones, the first.

    Args:
        logits: (B, V).
        history: (B, n), not used.

    Returns:
        The tokens, (B,).
    """
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
    """Makes a sampler that draws from the most likely tokens.

    It applies, in the order of Hugging Face, the repetition penalty, the temperature, top_k, top_p and min_p.

    Args:
        temperature: divides the logits; 0 chooses the most likely token (greedy).
        top_k: draws from the top_k most likely tokens, and those as likely as the last of them.
        top_p: draws from the fewest likely tokens whose probabilities add up to top_p or more.
        min_p: draws from the tokens at least min_p times as likely as the most likely one.
        repetition_penalty: makes tokens of the history less likely if above 1, see `penalize`.
        seed: of the random numbers, below 2**32.

    Returns:
        A function of logits (B, V) and history (B, n) that returns tokens (B,).

    Raises:
        ValueError: if an argument is out of range, or if top_k, top_p or min_p is given with temperature 0.
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
        # With the maximum at 0, dividing by a small temperature overflows to -inf only.
        logits = (logits - mx.max(logits, axis=-1, keepdims=True)) / max(temperature, _TINY)
        if top_k is not None:
            logits = keep_top_k(logits, top_k)
        if top_p is not None:
            logits = keep_top_p(logits, top_p)
        if min_p is not None:
            logits = keep_min_p(logits, min_p)
        return mx.random.categorical(logits, key=mx.array([seed, history.shape[1]], mx.uint32))

    return sample


def suppress_tokens(sampler: Sampler, tokens: Sequence[int], *, first: Sequence[int] = (), prompt: int = 0) -> Sampler:
    """Makes a sampler that never chooses certain tokens.

    Args:
        sampler: the sampler that chooses among the others.
        tokens: never chosen. Tokens outside the vocabulary are ignored.
        first: not chosen directly after the prompt either.
        prompt: the number of tokens of the prompt.

    Returns:
        A function of logits (B, V) and history (B, n) that returns tokens (B,).
    """
    always, at_first = (mx.array(sorted(set(some)), mx.int32) for some in (tokens, [*tokens, *first]))

    def sample(logits: mx.array, history: mx.array) -> mx.array:
        hidden = at_first if history.shape[1] == prompt else always
        if not hidden.size:
            return sampler(logits, history)
        rows, size = logits.shape
        # Tokens outside the vocabulary go to an extra column, as MLX does not check indices.
        index = mx.broadcast_to(mx.where((hidden < 0) | (hidden >= size), size, hidden), (rows, hidden.size))
        mask = mx.put_along_axis(mx.zeros((rows, size + 1), mx.bool_), index, mx.array(True), axis=-1)[:, :size]
        return sampler(mx.where(mask, -mx.inf, logits), history)

    return sample


def keep_top_k(logits: mx.array, k: int) -> mx.array:
    """Keeps the k largest logits (B, V) of each row, and those equal to the smallest of these; -inf for the others."""
    if k >= logits.shape[-1]:
        return logits
    least = mx.min(mx.topk(logits, k, axis=-1), axis=-1, keepdims=True)
    return mx.where(logits < least, -mx.inf, logits)


def keep_top_p(logits: mx.array, p: float) -> mx.array:
    """Keeps the fewest most likely tokens of each row whose probabilities add up to p or more; -inf for the others.

    Tokens as likely as the last of them are kept too. logits: (B, V). Source: Holtzman et al. 2020, arXiv 1904.09751.
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

    logits: (B, V). Source: Nguyen et al. 2025, arXiv 2407.01082.
    """
    return mx.where(logits < mx.max(logits, axis=-1, keepdims=True) + math.log(p), -mx.inf, logits)


def penalize(logits: mx.array, history: mx.array, penalty: float) -> mx.array:
    """Divides positive logits of tokens in the history by `penalty`, and multiplies negative ones by it.

    logits: (B, V). history: (B, n), -1 for padding. Source: Keskar et al. 2019, arXiv 1909.05858.
    """
    rows, size = logits.shape
    index = mx.where(history < 0, size, history)
    seen = mx.put_along_axis(mx.zeros((rows, size + 1), mx.bool_), index, mx.array(True), axis=-1)[:, :size]
    return mx.where(seen, mx.where(logits > 0, logits / penalty, logits * penalty), logits)
