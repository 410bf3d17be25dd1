"""Text generation, from one prompt or from several of any lengths.

What is generated is a function of model, prompt, sampler and kind of cache: a window or packed caches change the text.
Chunks of the prompt, what a cache holds of it already and draft models change the time that it takes, and no more than
how sums are rounded; so do batches, but a sampler that draws gives a row of a batch other tokens than its prompt alone.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .decoding import Progress, Settings, Steps, one_by_one, together, with_draft
from .samplers import Sampler, greedy
from .tokenizer import TextStream, Tokenizer

if TYPE_CHECKING:
    from ..models.causal_lm.model import CausalLM
    from ..nn.cache import KVCache


@dataclass(frozen=True)
class Token:
    """A generated token.

    text: by how much the text has grown for certain: a character may take several tokens, and what may begin a stop
    string waits. logprob: where asked for. finish: on the last, "eos", "stop" or "length".
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
    """The tokens that follow `prompt`, `max_tokens` at most, or as many as caches of a fixed capacity have room for.

    tokenizer: for texts, stop strings and, unless given, eos. stop: strings that end the text, which ends before them.
    caches: from model.make_caches, empty or holding the first tokens of the prompt already. Whenever a token is yielded
    they hold the first caches[0].length tokens of the prompt and what was yielded. prefill: how many tokens of the
    prompt at a time. draft: a smaller model of the same vocabulary, which guesses `ahead` tokens that the model then
    checks at once; the tokens stay the same. Caches with a window need a slack of `ahead` for that, draft_caches of a
    fixed capacity room for all that comes. progress(done, total): told after each chunk how many tokens have been read
    of those that the caches lacked; after the first token it is told anew of the draft model's reading. ValueError,
    before anything is computed, for what cannot be.
    """
    _check_sizes(max_tokens=max_tokens, prefill=prefill, ahead=ahead)
    _check_prompt(model, prompt)
    slack = 0 if draft is None else ahead
    caches = _checked("caches", model, caches, slack)
    limit = min(max_tokens, _room(caches, prompt))
    reader = _Reader(prompt, tokenizer, eos, stop, limit)
    settings = Settings(sampler, limit, prefill, ahead, logprobs, progress)
    if draft is None:
        return _read(one_by_one(model, caches, prompt, settings), reader)
    draft_caches = _checked("draft_caches", draft, draft_caches, slack)
    _check_draft(model, draft, [*caches, *draft_caches], ahead)
    _check_draft_room(draft_caches, len(prompt), limit)
    return _read(with_draft(model, caches, draft, draft_caches, prompt, settings), reader)


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
    """What follows each of several prompts of any lengths: the tokens that generate yields for it, computed together.

    A row that has ended is dropped. A sampler that draws gives a row of a batch other tokens than a prompt alone.
    window, keep, bits, capacity: of the caches, see make_caches(). Padding takes room as well: every row gets
    as many tokens as a capacity leaves the longest prompt, a shorter one fewer than generate would give it.
    """
    _check_sizes(max_tokens=max_tokens, prefill=prefill)
    for prompt in prompts:
        _check_prompt(model, prompt)
    if not prompts:
        return []
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    caches = model.make_caches(window=window, keep=keep, bits=bits, capacity=capacity, padding=padding)
    limit = min(max_tokens, _room(caches, range(longest)))
    readers = [_Reader(prompt, tokenizer, eos, stop, limit) for prompt in prompts]
    out: list[list[int]] = [[] for _ in prompts]

    def ended(row: int, token: int) -> bool:
        out[row].append(token)
        return readers[row].read(token)[1] is not None

    together(model, caches, prompts, Settings(sampler, limit, prefill), ended)
    return out


class _Reader:
    """Says after every token what text is certain, and whether it was the last."""

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
        self._stop, self._left, self._held = tuple(stop), limit, ""

    def read(self, token: int) -> tuple[str, str | None]:
        """(text, finish) of the next token, see Token."""
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
            certain -= max((_begun(text, string) for string in self._stop), default=0)
        self._held = text[certain:]
        return text[:certain], finish


def _begun(text: str, string: str) -> int:
    """How many characters at the end of a text may be the beginning of a string."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def _check_prompt(model: CausalLM, prompt: Sequence[int]) -> None:
    """ValueError for no tokens, or one outside the vocabulary: MLX reads beyond a table without an error."""
    if not len(prompt):
        raise ValueError("prompt must hold at least one token, got none")
    size = model.config.vocab_size
    wrong = [token for token in (min(prompt), max(prompt)) if not 0 <= token < size]
    if wrong:
        raise ValueError(f"prompt must hold tokens from 0 to {size - 1}, got {wrong[0]}")


def _checked(name: str, model: CausalLM, caches: list[KVCache] | None, slack: int) -> list[KVCache]:
    """These caches, or new ones, if they can take one prompt."""
    fresh = model.make_caches(slack=slack)
    if caches is None:
        return fresh
    if len(caches) != len(fresh):
        raise ValueError(f"{name} must be one a layer, {len(fresh)}, got {len(caches)}")
    lengths = [cache.length for cache in caches]
    if min(lengths) < max(lengths):
        raise ValueError(f"{name} must all hold as many tokens, got {min(lengths)} to {max(lengths)}")
    for cache in caches:
        if any(cache.padding or ()):
            raise ValueError(f"{name} must be of one row without padding, got padding {list(cache.padding or ())}")
        rows = max([len(cache.padding or (0,)), *(array.shape[0] for array in cache.arrays)])
        if rows > 1:
            raise ValueError(f"{name} must be of one row, got {rows}")
    return caches


def _check_draft(model: CausalLM, draft: CausalLM, caches: Sequence[KVCache], ahead: int) -> None:
    sizes = model.config.vocab_size, draft.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(f"draft must have the vocabulary of the model, {sizes[0]} tokens, got {sizes[1]}")
    slack = min((cache.slack for cache in caches if cache.window is not None), default=ahead)
    if slack < ahead:
        raise ValueError(f"caches must have a slack of {ahead}, as many tokens as a draft model guesses, got {slack}")


def _check_draft_room(caches: Sequence[KVCache], size: int, limit: int) -> None:
    """Whether the caches of a draft model can take a prompt of `size` tokens and what it guesses of `limit` more."""
    held = caches[0].length
    if held > size:
        raise ValueError(f"draft_caches must hold no more than the prompt, {size} tokens, got {held}")
    needed = size + limit - 2 if limit > 2 else 0  # the last two tokens are not guessed from
    capacity = min((cache.capacity for cache in caches if cache.capacity is not None), default=needed)
    if capacity < needed:
        raise ValueError(f"draft_caches must have a capacity of at least {needed}, got {capacity}")


def _room(caches: Sequence[KVCache], prompt: Sequence[int]) -> int:
    """How many tokens can follow a prompt."""
    held, size = caches[0].length, len(prompt)
    if held >= size:
        raise ValueError(f"prompt must be longer than what the caches hold, {held} tokens, got {size}")
    capacities = [cache.capacity for cache in caches if cache.capacity is not None]
    if capacities and size > min(capacities):
        raise ValueError(f"prompt must be at most as long as the caches' capacity, {min(capacities)}, got {size}")
    return min(capacities) - size + 1 if capacities else 2**62
