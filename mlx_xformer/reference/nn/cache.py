"""A cache as a plain concatenation, with the mask that it stands for.

Axes: B batch, G key/value heads, n new positions, T positions so far, D and Dv head widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


def visible(first: int, n: int, padding: Sequence[int], *, window: int | None = None, keep: int = 0) -> np.ndarray:
    """Which of the positions up to first + n - 1 the n queries from `first` on may see, (B, 1, n, T): of a row that
    begins behind its padding those up to the query's own, the last `window` of them and the `keep` first."""
    begin = np.asarray(padding)[:, None, None, None]
    query = first + np.arange(n)[:, None] - begin  # (B, 1, n, 1), as positions in the row
    key = np.arange(first + n)[None, :] - begin  # (B, 1, 1, T)
    near = True if window is None else query - key < window
    return (key >= 0) & (key <= query) & (near | (key < keep))


@dataclass(frozen=True)
class KVCache:
    """Everything appended: keys (B, G, T, D), values (B, G, T, Dv), and the padding of each row. longest is the largest
    T there has been. Nothing is ever dropped; `rewindable` tells what a windowed cache promises."""

    keys: np.ndarray
    values: np.ndarray
    padding: tuple[int, ...]
    longest: int = 0
    window: int | None = None
    keep: int = 0
    slack: int = 0

    @property
    def length(self) -> int:
        """T, the number of positions."""
        return self.keys.shape[2]

    @property
    def lost(self) -> bool:
        """Whether there are positions, behind the kept ones, that no query sees even after a rewind by the slack."""
        return self.window is not None and self.longest - (self.window - 1) - self.slack > self.keep

    @property
    def rewindable(self) -> int:
        """By how many positions the cache promises to be rewound."""
        return self.slack - (self.longest - self.length) if self.lost else self.length

    def append(self, k: np.ndarray, v: np.ndarray) -> KVCache:
        """The cache with k (B, G, n, D) and v (B, G, n, Dv) appended."""
        keys, values = np.concatenate([self.keys, k], axis=2), np.concatenate([self.values, v], axis=2)
        return replace(self, keys=keys, values=values, longest=max(self.longest, keys.shape[2]))

    def mask(self, n: int, window: int | None = None) -> np.ndarray:
        """What the last n positions see, (B, 1, n, T). window: a narrower one."""
        windows = [some for some in (self.window, window) if some is not None]
        narrowest = min(windows) if windows else None
        return visible(self.length - n, n, self.padding, window=narrowest, keep=self.keep)

    def trim(self, n: int) -> KVCache:
        """The cache without its last n positions."""
        stop = self.length - n
        return replace(self, keys=self.keys[:, :, :stop], values=self.values[:, :, :stop])

    def select(self, rows: Sequence[int]) -> KVCache:
        """These rows, without the padding that they share."""
        common = min(self.length, *(self.padding[row] for row in rows))
        keys, values = (np.stack([x[row, :, common:] for row in rows]) for x in (self.keys, self.values))
        padding = tuple(self.padding[row] - common for row in rows)
        return replace(self, keys=keys, values=values, padding=padding, longest=self.longest - common)

    def split(self) -> list[KVCache]:
        """A cache for each row."""
        return [self.select([row]) for row in range(len(self.padding))]


def merge(caches: Sequence[KVCache]) -> KVCache:
    """All rows, each behind as much padding as the longest is longer. It can be rewound as far as any of them."""
    rows = [row for cache in caches for row in cache.split()]
    length = max(row.length for row in rows)
    late = max(row.longest - row.length if row.lost else 0 for row in rows)
    keys, values = ([], [])
    for row in rows:
        more = [(0, 0), (0, 0), (length - row.length, 0), (0, 0)]
        keys.append(np.pad(row.keys, more))
        values.append(np.pad(row.values, more))
    return replace(
        rows[0],
        keys=np.concatenate(keys),
        values=np.concatenate(values),
        padding=tuple(length - row.length + row.padding[0] for row in rows),
        longest=length + late,
    )
