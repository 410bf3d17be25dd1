"""What models of a source and a target share: positions that caches tell, and generation given a memory.

Axes: B batch, L positions of the target, S positions of the memory, E embed_dim, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import mlx.core as mx
import mlx.nn as nn

from ..nn.cache import CacheMaker, CacheOptions, CrossCache, KVCache
from ..nn.checks import expand_key_mask
from ..nn.positions import sinusoidal


def add_positions(x: mx.array, max_len: int, what: str, cache: KVCache | None = None) -> mx.array:
    """x (B, L, E) with sinusoidal positions added, which go on where the cache ends, row by row where it has padding.
    ValueError if `what` is longer than max_len."""
    B, L, E = x.shape
    before, padding = (0, None) if cache is None else (cache.length, cache.padding)
    rows = (0,) if padding is None else padding
    if len(rows) not in (1, B):
        raise ValueError(f"{what} must have the {len(rows)} rows that the padding of caches names, got {B}")
    if before - min(rows) + L > max_len:
        raise ValueError(f"{what} must be at most max_len, {max_len} positions, got {before - min(rows) + L}")
    tables = [sinusoidal(L, E, offset=before - row) for row in rows]
    table = tables[0] if len(tables) == 1 else mx.stack(tables)
    return x + table.astype(x.dtype)


class TokenDecoder(Protocol):
    """A model of tokens, given a memory."""

    config: Any

    @property
    def decode(self) -> Callable[..., mx.array]:
        """A function of a target (B, L), a memory (B, S, E), caches and cross_caches, one of each a layer, last, check
        and, where there is one, memory_mask (B, S): logits (B, L or last, V)."""

    def caches_for(self, options: CacheOptions) -> list[KVCache]:
        """A cache of self-attention for each layer of the decoder."""


@dataclass(frozen=True)
class _Memory:
    """What a decoder attends to. rows: which of the whole memory; caches: of its keys and values, one a layer."""

    array: mx.array
    mask: mx.array | None
    rows: tuple[int, ...]
    caches: tuple[CrossCache, ...] = ()

    def select(self, rows: tuple[int, ...]) -> _Memory:
        """These rows of the whole, with what has been projected of them."""
        index = mx.array(rows)
        array = mx.take(self.array, index, axis=0)
        mask = None if self.mask is None else mx.take(self.mask, index, axis=0)
        return _Memory(array, mask, rows, tuple(cache.select(rows, array) for cache in self.caches))


class _Rows(KVCache):
    """A cache whose rows go with these of a memory."""

    memory_rows: tuple[int, ...]

    @staticmethod
    def of(cache: KVCache, rows: tuple[int, ...]) -> _Rows:
        """What the cache holds."""
        made = _Rows.__new__(_Rows)
        vars(made).update(vars(cache))
        made.memory_rows = rows
        return made

    def select(self, rows: Sequence[int] | mx.array) -> _Rows:
        chosen = cast("list[int]", rows.tolist()) if isinstance(rows, mx.array) else list(rows)
        return _Rows.of(super().select(chosen), tuple(self.memory_rows[row] for row in chosen))


class Conditioned(CacheMaker, nn.Module):
    """A decoder and the memory that it attends to, as generate() and batch_generate() take a model: they feed it the
    new tokens only, and the memory is projected once. A batch has a prompt for every row of the memory."""

    def __init__(self, model: TokenDecoder, memory: mx.array, memory_mask: mx.array | None = None):
        super().__init__()
        if memory.ndim != 3:
            raise ValueError(f"memory must be (batch, length, channels), got shape {memory.shape}")
        expand_key_mask("memory_mask", memory_mask, memory.shape)
        self.model, self.config = model, model.config
        self._whole = self._current = _Memory(memory, memory_mask, tuple(range(len(memory))))

    def caches_for(self, options: CacheOptions) -> list[KVCache]:
        """See make_caches(): as the model's. They know which rows of the memory theirs go with, also once some of them
        are selected."""
        return [_Rows.of(cache, self._whole.rows) for cache in self.model.caches_for(options)]

    def __call__(
        self, tokens: mx.array, *, caches: Sequence[KVCache] | None = None, last: int | None = None, check: bool = True
    ) -> mx.array:
        """tokens (B, L) -> logits (B, L, V), or (B, last, V) of the last positions only. check: as of the model's
        decode()."""
        memory = self._memory_of(caches)
        if len(tokens) != len(memory.rows):
            raise ValueError(f"tokens must be {len(memory.rows)} rows, as many as the memory has, got {len(tokens)}")
        cross_caches = None if caches is None else memory.caches
        given: dict[str, Any] = {"caches": caches, "cross_caches": cross_caches, "last": last, "check": check}
        masked = {} if memory.mask is None else {"memory_mask": memory.mask}
        return self.model.decode(tokens, memory.array, **masked, **given)

    @property
    def memory(self) -> mx.array:
        """(B, S, E), of all rows."""
        return self._whole.array

    def _memory_of(self, caches: Sequence[KVCache] | None) -> _Memory:
        """The rows of the memory that go with those of the caches."""
        if caches and len(self._whole.caches) != len(caches):
            whole = self._whole
            made = tuple(CrossCache() for _ in caches)
            self._whole = self._current = _Memory(whole.array, whole.mask, whole.rows, made)
        rows = caches[0].memory_rows if caches and isinstance(caches[0], _Rows) else self._whole.rows
        if rows == self._whole.rows:
            return self._whole
        if rows != self._current.rows:
            self._current = self._whole.select(rows)
        return self._current
