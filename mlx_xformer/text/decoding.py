"""The loops of generation: the prompt in chunks, then tokens one by one, in a batch or with a draft model.

Axes: B rows of a batch, V vocabulary, n tokens so far, m tokens sampled at once.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from .samplers import Sampler

if TYPE_CHECKING:
    from ..models.causal_lm.model import CausalLM
    from ..nn.cache import KVCache

Steps = Generator["tuple[int, float | None]", None, None]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Settings:
    """How tokens are generated.

    Attributes:
        sampler: chooses the next token from the logits.
        limit: the number of tokens to generate.
        chunk: tokens of the prompt that are read at once.
        ahead: tokens that a draft model guesses at once.
        logprobs: whether to compute the log-probability of each token.
        progress: see read_prompt().
    """

    sampler: Sampler
    limit: int
    chunk: int
    ahead: int = 0
    logprobs: bool = False
    progress: Progress | None = None


def generate_one(model: CausalLM, caches: list[KVCache], prompt: Sequence[int], settings: Settings) -> Steps:
    """Yields (token, logprob) one by one. The next step is queued before a token is read."""
    history = mx.array(list(prompt), mx.int32)[None]

    def drawn(logits: mx.array, history: mx.array) -> list[mx.array]:
        token, history = next_tokens(logits, history, settings.sampler)
        found = [token, history, *([_logprobs(logits, token)] if settings.logprobs else [])]
        mx.async_eval(found, arrays(caches))
        return found

    logits = read_prompt(model, history[:, caches[0].length :], caches, settings.chunk, settings.progress)
    following = drawn(logits, history)
    for count in range(1, settings.limit + 1):
        token, history, *score = following
        if count < settings.limit:
            following = drawn(model(token[:, None], caches=caches, last=1, check=False)[:, -1], history)
        yield _number(token), _number(score[0]) if score else None


def generate_batch(
    model: CausalLM,
    caches: list[KVCache],
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    ended: Callable[[int, int], bool],
) -> None:
    """Generates for several prompts at once, in caches whose padding aligns their ends. ended(row, token) is called
    with every token of each, and says whether it was the last."""
    longest = max(map(len, prompts))
    history = mx.array([[-1] * (longest - len(prompt)) + list(prompt) for prompt in prompts], mx.int32)
    rows = list(range(len(prompts)))  # those that have not ended
    logits = read_prompt(model, mx.maximum(history, 0), caches, settings.chunk)
    following, history = next_tokens(logits, history, settings.sampler)
    mx.async_eval(following, history, arrays(caches))
    for count in range(1, settings.limit + 1):
        tokens = following
        if count < settings.limit:
            logits = model(tokens[:, None], caches=caches, last=1, check=False)[:, -1]
            following, history = next_tokens(logits, history, settings.sampler)
            mx.async_eval(following, history, arrays(caches))
        read = cast("list[int]", tokens.tolist())
        going = [i for i, (row, token) in enumerate(zip(rows, read, strict=True)) if not ended(row, token)]
        if not going:
            return
        if len(going) < len(rows):
            caches = [cache.select(going) for cache in caches]
            rows, index = [rows[i] for i in going], mx.array(going)
            following, history = following[index], history[index]


def generate_with_draft(
    model: CausalLM,
    caches: list[KVCache],
    draft: CausalLM,
    draft_caches: list[KVCache],
    prompt: Sequence[int],
    settings: Settings,
) -> Steps:
    """(token, logprob) in turn, by speculative decoding (Leviathan et al. 2023, arXiv 2211.17192).

    A sampler gives one token for a position and a history, and a guess is right if it is that token: what is drawn is
    what generate_one() samples. Wrong guesses are trimmed from the caches.
    """
    known = list(prompt)
    end = len(prompt) + settings.limit
    history = mx.array(known, mx.int32)[None]
    logits = read_prompt(model, history[:, caches[0].length :], caches, settings.chunk, settings.progress)
    tokens, scores = _drawn(logits[:, None], history, settings)
    while True:
        known.append(tokens[0])
        yield tokens[0], scores[0]
        if len(known) == end:
            return
        guesses = min(settings.ahead, end - len(known) - 1)
        history = _guessed(draft, draft_caches, known, guesses, settings)
        logits = model(history[:, len(known) - 1 :], caches=caches, last=guesses + 1, check=False)
        tokens, scores = _drawn(logits, history, settings)
        guessed = cast("list[int]", history[0, len(known) :].tolist())
        right = next((i for i in range(guesses) if guessed[i] != tokens[i]), guesses)
        before, seen = len(known), 0
        try:
            while seen < right:
                known.append(tokens[seen])
                seen += 1
                yield known[-1], scores[seen - 1]
        finally:  # the caches hold what was yielded, also where the caller has had enough
            for cache in (*caches, *draft_caches):
                cache.trim(max(0, cache.length - before - seen))
        tokens, scores = tokens[right:], scores[right:]


def _guessed(draft: CausalLM, caches: list[KVCache], known: list[int], guesses: int, settings: Settings) -> mx.array:
    """What is known, and as many tokens more as the draft model guesses: (1, n + guesses)."""
    history = mx.array(known, mx.int32)[None]
    for _ in range(guesses):
        new = history[:, caches[0].length :]
        progress = settings.progress if new.shape[1] > 2 else None  # after the prompt it lags by two at most
        logits = read_prompt(draft, new, caches, settings.chunk, progress)
        _, history = next_tokens(logits, history, settings.sampler)
    return history


def _drawn(logits: mx.array, history: mx.array, settings: Settings) -> tuple[list[int], Sequence[float | None]]:
    """The tokens, and their logprobs, that follow each of the last m of n tokens: logits (1, m, V), history (1, n)."""
    (_, m, _), n = logits.shape, history.shape[1]
    rows = [logits[:, i] for i in range(m)]
    tokens = [settings.sampler(row, history[:, : n - m + 1 + i]) for i, row in enumerate(rows)]
    scores = [_logprobs(row, token) for row, token in zip(rows, tokens, strict=True)] if settings.logprobs else []
    mx.eval(history, tokens, scores)
    return [_number(token) for token in tokens], [_number(score) for score in scores] or [None] * m


def read_prompt(
    model: CausalLM, tokens: mx.array, caches: list[KVCache], chunk: int, progress: Progress | None = None
) -> mx.array:
    """Appends (B, n) tokens to the caches, `chunk` at a time; the logits after the last, (B, V). progress(done, n) is
    told after each chunk, when the caches hold it."""
    size = tokens.shape[1]
    last = (size - 1) // chunk * chunk
    for start in range(0, last, chunk):
        model(tokens[:, start : start + chunk], caches=caches, last=1, check=False)
        mx.eval(arrays(caches))  # and no logits
        if progress is not None:
            progress(start + chunk, size)
    logits = model(tokens[:, last:], caches=caches, last=1, check=False)[:, -1]
    if progress is not None:
        mx.eval(logits, arrays(caches))
        progress(size, size)
    return logits


def next_tokens(logits: mx.array, history: mx.array, sampler: Sampler) -> tuple[mx.array, mx.array]:
    """The next token of each row, (B,), and the history with it, (B, n + 1)."""
    tokens = sampler(logits, history).astype(mx.int32)
    return tokens, mx.concatenate([history, tokens[:, None]], axis=1)


def arrays(caches: Sequence[KVCache]) -> list[mx.array]:
    """All that caches hold."""
    return [array for cache in caches for array in cache.arrays]


def _number(x: mx.array) -> Any:
    return x.item()


def _logprobs(logits: mx.array, tokens: mx.array) -> mx.array:
    """Natural logarithms of the model's own probabilities, before any temperature: (B,)."""
    logits = logits.astype(mx.float32)
    picked = mx.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return picked - mx.logsumexp(logits, axis=-1)
