"""Rows of several caches in one, and caches restored row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import mlx.core as mx

from .kv import KIND, KVCache
from .slots import joined, zeros


def merge_caches(caches: Sequence[KVCache]) -> KVCache:
    """Merges the rows of several caches of a layer into one batch.

    Args:
        caches: Caches of one kind. One that is empty is one row, unless its padding is of more.

    Returns:
        One cache with all rows in order, whose last positions are aligned: shorter rows get padding.

    Raises:
        ValueError: There is no cache, or they differ in more than their lengths.
    """
    if not caches:
        raise ValueError("caches must be at least one to merge, got none")
    return merged([row for cache in caches for row in (cache.split() if cache.padding else [cache])])


def restore_cache(facts: dict[str, Any], arrays: Callable[[int | None], list[mx.array]]) -> KVCache:
    """The cache whose state() these facts and arrays are. KeyError or ValueError where no cache has such a state."""
    kind = {name: facts[name] for name in KIND}
    length, longest, (D, Dv) = facts["length"], facts["longest"], facts["widths"]
    padding = facts["padding"]
    cache = KVCache(**kind, padding=padding)
    if padding is None:
        return cache._restored(length, longest, (D, Dv), arrays(None)) if length else cache
    rows = []
    for row, begins in enumerate(padding):
        if begins < length:
            rows.append(KVCache(**kind)._restored(length - begins, longest - begins, (D, Dv), arrays(row)))
        else:
            rows.append(KVCache(**kind, padding=[begins - length]))
    cache = merged(rows, length, longest)
    cache.padding = tuple(padding)
    return cache


def merged(caches: list[KVCache], length: int | None = None, longest: int | None = None) -> KVCache:
    """One cache of all rows, as long as the longest unless `length` says more.

    The caches have no padding, but for rows that have not begun.
    """
    length = max(cache.length for cache in caches) if length is None else length
    padding = [length - cache.length + row for cache in caches for row in cache.padding or (0,) * cache._rows]
    out = caches[0]._like(padding)
    full = [cache for cache in caches if cache.length]
    for cache in caches:
        if cache._kind != out._kind:
            raise ValueError(f"caches must be of one kind, {out._kind}, got {cache._kind}")
        if cache.length and cache._form != full[0]._form:
            raise ValueError(f"caches must agree in heads, widths and dtype, {full[0]._form}, got {cache._form}")
    if not full:
        out.padding = tuple(padding)  # which tells how many rows there are
        out.length, out._longest = length, longest or length
        return out
    if longest is None:  # so long that it can be rewound as far as any of them
        longest = length + max(cache._longest - cache.length if cache._lost() > cache.keep else 0 for cache in full)
    out.length, out._longest, out._widths = length, longest, full[0]._widths
    kept = out.keep > 0 and out._lost() > out.keep + out._padded
    out._first = out._lost() if kept or not out.keep else 0
    like = [[x[:1] for x in full[0]._lines] if not cache.length else cache._lines for cache in caches]
    if kept:
        out._kept = _stacked(_range(*some, 0, out.keep) for some in zip(caches, like, strict=True))
    shifts = (length - cache.length for cache in caches)
    out._settle(
        _stacked(
            _range(cache, some, out._first - shift, cache.length)
            for cache, some, shift in zip(caches, like, shifts, strict=True)
        )
    )
    return out


def _stacked(found: Iterable[list[mx.array]]) -> list[mx.array]:
    """One batch below the other."""
    return [mx.concatenate(list(some), axis=0) for some in zip(*found, strict=True)]


def _range(cache: KVCache, like: Sequence[mx.array], start: int, stop: int) -> list[mx.array]:
    """Positions start .. stop - 1 of rows without padding, with zeros (as wide as `like`) for those not held."""
    cache._forget()
    held = [(0, cache._kept, 0), (cache._first, cache._lines, cache._slot)]
    pieces, at = [], start
    for first, parts, slot in held if cache._kept else held[1:]:
        last = min(stop, cache.keep if parts is cache._kept else cache.length)
        begin = max(first, at)
        if begin < last:
            pieces += [
                zeros(like, begin - at),
                [x[:, :, slot + begin - first : slot + last - first] for x in parts],
            ]
            at = last
    return joined([*pieces, zeros(like, stop - at)]) or [x[:, :, :0] for x in like]
