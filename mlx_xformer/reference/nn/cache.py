"""A cache as a plain concatenation, with the mask that it stands for; keys and values in 8 or 4 bits.

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


def quantized(x: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes like x (..., D), and the scale and bias of each group of channels (..., D / group): x is nearly code *
    scale + bias, codes being 0 .. 2^bits - 1. The end of a group's range that is farther from 0 is met exactly."""
    grouped = x.reshape(*x.shape[:-1], -1, group)
    low, high = grouped.min(axis=-1), grouped.max(axis=-1)
    top = 2**bits - 1
    step = np.maximum((high - low) / top, 1e-7)
    farther = np.where(np.abs(low) > np.abs(high), low, high)
    step = np.where(np.abs(low) > np.abs(high), step, -step)
    count = np.round(farther / step)
    scale = np.where(count == 0, step, farther / np.where(count == 0, 1, count))
    bias = np.where(count == 0, 0, farther)
    codes = np.clip(np.round((grouped - bias[..., None]) / scale[..., None]), 0, top)
    return codes.reshape(x.shape).astype(np.uint32), scale, bias


def dequantized(codes: np.ndarray, scales: np.ndarray, biases: np.ndarray) -> np.ndarray:
    """The inverse, nearly: (..., D)."""
    group = codes.shape[-1] // scales.shape[-1]
    return codes.astype(scales.dtype) * np.repeat(scales, group, axis=-1) + np.repeat(biases, group, axis=-1)


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (..., D) in words of 32 bits (..., D bits / 32), the first in the lowest."""
    per_word = 32 // bits
    words = codes.reshape(*codes.shape[:-1], -1, per_word).astype(np.uint64)
    shifts = np.arange(per_word, dtype=np.uint64) * np.uint64(bits)
    return (words << shifts).sum(axis=-1).astype(np.uint32)


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """The inverse."""
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    codes = (words[..., None] >> shifts) & np.uint32(2**bits - 1)
    return codes.reshape(*words.shape[:-1], -1)
