"""What models of a source and a target share: positions that caches tell, and generation given a memory.

Axes: B batch, L positions of the target, S positions of the memory, E embed_dim, V vocab_size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
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


class _Memory:
    """What the decoder of one generation attends to: rows of a memory, and its keys and values, one a layer."""

    def __init__(self, array: mx.array, mask: mx.array | None, caches: tuple[CrossCache, ...]):
        self.array, self.mask, self.caches = array, mask, caches
        self._rows: tuple[int, ...] = ()
        self._selected: _Memory | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Memory:
        return _Memory(self.array, self.mask, copy.deepcopy(self.caches, memo))

    def select(self, rows: tuple[int, ...]) -> _Memory:
        """These rows, with what has been projected of them: the same object while the rows are the same, since each
        layer's cache asks for them."""
        if self._selected is None or rows != self._rows:
            index = mx.array(rows)
            array = mx.take(self.array, index, axis=0)
            mask = None if self.mask is None else mx.take(self.mask, index, axis=0)
            caches = tuple(cache.select(rows, array) for cache in self.caches)
            self._rows, self._selected = rows, _Memory(array, mask, caches)
        return self._selected


class _BoundCache(KVCache):
    """A cache of self-attention that knows the rows of the memory that its own rows go with."""

    memory: _Memory

    @staticmethod
    def of(cache: KVCache, memory: _Memory) -> _BoundCache:
        """What the cache holds."""
        made = _BoundCache.__new__(_BoundCache)
        vars(made).update(vars(cache))
        made.memory = memory
        return made

    def select(self, rows: Sequence[int] | mx.array) -> _BoundCache:
        chosen = cast("list[int]", rows.tolist()) if isinstance(rows, mx.array) else list(rows)
        return _BoundCache.of(super().select(chosen), self.memory.select(tuple(chosen)))


class Conditioned(CacheMaker, nn.Module):
    """A decoder and the memory that it attends to, as generate() and batch_generate() take a model: they feed it the
    new tokens only, and the memory is projected once a generation. A batch has a prompt for every row of the memory.
    Several threads may generate with one of it."""

    def __init__(self, model: TokenDecoder, memory: mx.array, memory_mask: mx.array | None = None):
        super().__init__()
        if memory.ndim != 3:
            raise ValueError(f"memory must be (batch, length, channels), got shape {memory.shape}")
        expand_key_mask("memory_mask", memory_mask, memory.shape)
        mx.eval(memory, memory_mask)  # so that another thread may read it
        self.model, self.config = model, model.config
        self._memory, self._mask = memory, memory_mask

    def caches_for(self, options: CacheOptions) -> list[KVCache]:
        """See make_caches(): as the model's. They hold what is projected of the memory, and know which of its rows
        theirs go with, also once some of them are selected."""
        caches = self.model.caches_for(options)
        memory = _Memory(self._memory, self._mask, tuple(CrossCache() for _ in caches))
        return [_BoundCache.of(cache, memory) for cache in caches]

    def __call__(
        self, tokens: mx.array, *, caches: Sequence[KVCache] | None = None, last: int | None = None, check: bool = True
    ) -> mx.array:
        """tokens (B, L) -> logits (B, L, V), or (B, last, V) of the last positions only. check: as of the model's
        decode()."""
        bound = caches[0].memory if caches and isinstance(caches[0], _BoundCache) else None
        memory = _Memory(self._memory, self._mask, ()) if bound is None else bound
        if len(tokens) != len(memory.array):
            raise ValueError(f"tokens must be {len(memory.array)} rows, as many as the memory has, got {len(tokens)}")
        given: dict[str, Any] = {"caches": caches, "cross_caches": memory.caches or None, "last": last, "check": check}
        masked = {} if memory.mask is None else {"memory_mask": memory.mask}
        return self.model.decode(tokens, memory.array, **masked, **given)

    @property
    def memory(self) -> mx.array:
        """(B, S, E), of all rows."""
        return self._memory
