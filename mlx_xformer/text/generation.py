"""Text generation, from one prompt or from several of any lengths.

The generated text depends on the model, the prompt, the sampler and the kind of cache (its window and its bits).
How the prompt is divided into chunks, what a prompt cache already holds of it, and draft models change the time, but
not the text, except for the rounding of sums. The same holds for batches with a deterministic sampler; a sampler that
draws random numbers gives a row of a batch other tokens than the same prompt alone.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .decoding import Progress, Settings, Steps, generate_batch, generate_one, generate_with_draft
from .samplers import Sampler, greedy
from .tokenizer import TextStream, Tokenizer

if TYPE_CHECKING:
    from ..models.causal_lm.model import CausalLM
    from ..nn.cache import KVCache


@dataclass(frozen=True)
class Token:
    """A generated token.

    Args:
        id: the token.
        text: the text to append after this token. It is empty while a character is incomplete, and text that may be
            the beginning of a stop string is held back.
        logprob: the natural logarithm of the token's probability, if requested.
        finish: why the text ends, on the last token: "eos", "stop" or "length"; None on all others.
    """

    id: int
    text: str = ""
    logprob: float | None = None
    finish: str | None = None


def generate(
    model: CausalLM,
    prompt: Sequence[int],
    *,
    max_tokens: int = 256,
    sampler: Sampler = greedy,
    tokenizer: Tokenizer | None = None,
    eos: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    caches: list[KVCache] | None = None,
    prefill: int = 512,
    draft: CausalLM | None = None,
    draft_caches: list[KVCache] | None = None,
    ahead: int = 4,
    logprobs: bool = False,
    progress: Progress | None = None,
) -> Generator[Token, None, None]:
    """Generates the tokens that follow a prompt.

    Args:
        model: a language model, or an encoder-decoder that is bound to its source (see `conditioned`).
        prompt: the tokens of the prompt, at least one.
        max_tokens: the most tokens to generate. Caches with a capacity may limit them further.
        sampler: a function of the logits (B, V) and the tokens so far (B, n) that returns the next tokens (B,).
        tokenizer: needed for the text of tokens and for `stop`. It also provides the default of `eos`.
        eos: tokens that end the text.
        stop: strings that end the text; they are not part of it.
        caches: from `model.make_caches`, empty or holding the first tokens of the prompt. Whenever a token is yielded,
            they hold the first `caches[0].length` tokens of the prompt and of what was yielded. By default new ones.
        prefill: how many tokens of the prompt are read at a time.
        draft: a smaller model with the same vocabulary, for speculative decoding: it proposes `ahead` tokens, which the
            model checks in one step. The generated tokens stay the same.
        draft_caches: the caches of `draft`. With a window, they and `caches` need a slack of `ahead`.
        ahead: how many tokens `draft` proposes at a time.
        logprobs: whether to return the logarithm of each token's probability.
        progress: called as progress(done, total) after each chunk of the prompt, with the number of tokens that were
            read and that had to be read. With `draft`, it is called again while the draft model reads the prompt.

    Yields:
        A `Token` for each generated token.

    Raises:
        ValueError: before anything is computed, if an argument is out of range or does not fit another one.
    """
    _check_sizes(max_tokens=max_tokens, prefill=prefill, ahead=ahead)
    _check_prompt(model, prompt)
    slack = 0 if draft is None else ahead
    caches = _check_caches("caches", model, caches, slack)
    limit = min(max_tokens, _count_room(caches, prompt))
    reader = _Reader(prompt, tokenizer, eos, stop, limit)
    settings = Settings(sampler, limit, prefill, ahead, logprobs, progress)
    if draft is None:
        return _read(generate_one(model, caches, prompt, settings), reader)
    draft_caches = _check_caches("draft_caches", draft, draft_caches, slack)
    _check_draft(model, draft, [*caches, *draft_caches], ahead)
    _check_draft_room(draft_caches, len(prompt), limit)
    return _read(generate_with_draft(model, caches, draft, draft_caches, prompt, settings), reader)


def _read(steps: Steps, reader: _Reader) -> Generator[Token, None, None]:
    with closing(steps):
        for token, logprob in steps:
            text, finish = reader.read(token)
            yield Token(token, text, logprob, finish)
            if finish:
                return


def batch_generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int = 256,
    sampler: Sampler = greedy,
    tokenizer: Tokenizer | None = None,
    eos: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    prefill: int = 512,
    window: int | None = None,
    keep: int = 0,
    bits: int | None = None,
    capacity: int | None = None,
) -> list[list[int]]:
    """Generates the tokens that follow each of several prompts of any lengths, all rows computed together.

    A row that has ended is removed from the batch. A sampler that draws random numbers gives a row other tokens than
    `generate` gives the prompt alone.

    Args:
        model: a language model, or an encoder-decoder that is bound to its sources (see `conditioned`).
        prompts: the tokens of each prompt.
        max_tokens: the most tokens to generate for a prompt.
        sampler: a function of the logits (B, V) and the tokens so far (B, n) that returns the next tokens (B,).
        tokenizer: needed for `stop`. It also provides the default of `eos`.
        eos: tokens that end a text.
        stop: strings that end a text.
        prefill: how many tokens of the prompts are read at a time.
        window: how many of the last positions the caches hold; by default all.
        keep: how many of the first positions they hold besides a window.
        bits: 8 or 4 for quantized caches; by default they hold the model's dtype.
        capacity: the most positions that a cache can hold. Shorter prompts are padded, which takes positions too: every
            row gets as many tokens as the capacity leaves to the longest prompt.

    Returns:
        The generated tokens of each prompt.

    Raises:
        ValueError: if an argument is out of range.
    """
    _check_sizes(max_tokens=max_tokens, prefill=prefill)
    for prompt in prompts:
        _check_prompt(model, prompt)
    if not prompts:
        return []
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    caches = model.make_caches(window=window, keep=keep, bits=bits, capacity=capacity, padding=padding)
    limit = min(max_tokens, _count_room(caches, range(longest)))
    readers = [_Reader(prompt, tokenizer, eos, stop, limit) for prompt in prompts]
    out: list[list[int]] = [[] for _ in prompts]

    def ended(row: int, token: int) -> bool:
        out[row].append(token)
        return readers[row].read(token)[1] is not None

    generate_batch(model, caches, prompts, Settings(sampler, limit, prefill), ended)
    return out


class _Reader:
    """Turns the tokens of one text into text, and decides when it ends."""

    def __init__(
        self,
        prompt: Sequence[int],
        tokenizer: Tokenizer | None,
        eos: Sequence[int] | None,
        stop: Sequence[str],
        limit: int,
    ):
        if isinstance(stop, str) or not all(stop):
            raise ValueError(f"stop must be a sequence of strings that are not empty, got {stop!r}")
        if stop and tokenizer is None:
            raise ValueError(f"stop must come with a tokenizer, got {stop!r} alone")
        self._stream = None if tokenizer is None else TextStream(tokenizer, prompt)
        self._ends = frozenset(eos if eos is not None else tokenizer.eos if tokenizer is not None else ())
        self._stop, self._left = tuple(stop), limit
        self._held = ""  # text that may be the beginning of a stop string

    def read(self, token: int) -> tuple[str, str | None]:
        """Returns (text, finish) of the next token, see Token."""
        self._left -= 1
        finish = "eos" if token in self._ends else None if self._left else "length"
        if self._stream is None:
            return "", finish
        text = self._held + ("" if finish == "eos" else self._stream.add(token))
        if finish:
            text += self._stream.end()
        found = [at for string in self._stop if (at := text.find(string)) >= 0]
        if found:
            return text[: min(found)], "stop"
        certain = len(text)
        if not finish:
            certain -= max((_count_begun(text, string) for string in self._stop), default=0)
        self._held = text[certain:]
        return text[:certain], finish


def _count_begun(text: str, string: str) -> int:
    """How many characters at the end of a text are the beginning of a string."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def _check_prompt(model: CausalLM, prompt: Sequence[int]) -> None:
    """Checks that a prompt is in the vocabulary: MLX does not check indices."""
    if not len(prompt):
        raise ValueError("prompt must hold at least one token, got none")
    size = model.config.vocab_size
    wrong = [token for token in (min(prompt), max(prompt)) if not 0 <= token < size]
    if wrong:
        raise ValueError(f"prompt must hold tokens from 0 to {size - 1}, got {wrong[0]}")


def _check_caches(name: str, model: CausalLM, caches: list[KVCache] | None, slack: int) -> list[KVCache]:
    """Checks that caches can hold one prompt; returns them, or new ones for None."""
    fresh = model.make_caches(slack=slack)
    if caches is None:
        return fresh
    if len(caches) != len(fresh):
        raise ValueError(f"{name} must have one cache for each of {len(fresh)} layers, got {len(caches)}")
    lengths = [cache.length for cache in caches]
    if min(lengths) < max(lengths):
        raise ValueError(f"{name} must all hold the same number of tokens, got {min(lengths)} to {max(lengths)}")
    for cache in caches:
        if any(cache.padding or ()):
            raise ValueError(f"{name} must have one row without padding, got padding {list(cache.padding or ())}")
        rows = max([len(cache.padding or (0,)), *(array.shape[0] for array in cache.arrays)])
        if rows > 1:
            raise ValueError(f"{name} must have one row, got {rows}")
    return caches


def _check_draft(model: CausalLM, draft: CausalLM, caches: Sequence[KVCache], ahead: int) -> None:
    sizes = model.config.vocab_size, draft.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(f"draft must have the vocabulary of the model, {sizes[0]} tokens, got {sizes[1]}")
    slack = min((cache.slack for cache in caches if cache.window is not None), default=ahead)
    if slack < ahead:
        raise ValueError(
            f"caches must have a slack of {ahead}, the number of tokens that a draft model proposes, got {slack}"
        )


def _check_draft_room(caches: Sequence[KVCache], size: int, limit: int) -> None:
    """Checks that the caches of a draft model can hold a prompt of `size` tokens and what it reads of `limit` more."""
    held = caches[0].length
    if held > size:
        raise ValueError(f"draft_caches must hold no more than the prompt, {size} tokens, got {held}")
    needed = size + limit - 2 if limit > 2 else 0  # the draft model does not read the last two tokens
    capacity = min((cache.capacity for cache in caches if cache.capacity is not None), default=needed)
    if capacity < needed:
        raise ValueError(f"draft_caches must have a capacity of at least {needed}, got {capacity}")


def _count_room(caches: Sequence[KVCache], prompt: Sequence[int]) -> int:
    """How many tokens caches with a capacity leave after a prompt."""
    held, size = caches[0].length, len(prompt)
    if held >= size:
        raise ValueError(f"prompt must be longer than what the caches hold, {held} tokens, got {size}")
    capacities = [cache.capacity for cache in caches if cache.capacity is not None]
    if capacities and size > min(capacities):
        raise ValueError(f"prompt must be at most as long as the caches' capacity, {min(capacities)}, got {size}")
    return min(capacities) - size + 1 if capacities else 2**62
