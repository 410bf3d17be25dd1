"""Lines: the arrays that keys and values are made of, (B, G, slots, ...) each, as one list."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx


def written(lines: Sequence[mx.array], new: Sequence[mx.array], slot: int) -> list[mx.array]:
    """The lines with `new` from a slot on: in place, where nothing else holds them."""
    fresh = [x[:] for x in lines]
    for x, some in zip(fresh, new, strict=True):
        x[:, :, slot : slot + some.shape[2]] = some
    return fresh


def joined(pieces: Sequence[Sequence[mx.array]]) -> list[mx.array]:
    """Pieces one after the other, each a list of as many arrays or of none."""
    found = list(zip(*(piece for piece in pieces if piece), strict=True))
    return [some[0] if len(some) == 1 else mx.concatenate(list(some), axis=2) for some in found]


def filled(lines: Sequence[mx.array], size: int) -> list[mx.array]:
    """The lines, with zeros behind them up to a size."""
    return joined([lines, zeros(lines, size - lines[0].shape[2])])


def zeros(lines: Sequence[mx.array], n: int) -> list[mx.array]:
    """Zeros for n positions, one array for each line; an empty list if n is 0."""
    return [mx.zeros((*x.shape[:2], n, x.shape[3]), x.dtype) for x in lines] if n else []
