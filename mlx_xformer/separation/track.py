"""A recording on its way through a model: read once, in order, with its level taken off.

Axes: C channels.
"""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import numpy as np


class Track:
    """A recording at a model's rate, read once and in order: what is forgotten cannot be read again.

    blocks: (C, n) arrays of NumPy that make up `samples`. center, scale: the level that is taken off.
    """

    def __init__(self, blocks: Iterable[np.ndarray], channels: int, samples: int, center: float = 0, scale: float = 1):
        self.samples = samples
        self._blocks, self._start = iter(blocks), 0
        self._held = np.zeros((channels, 0), np.float32)
        self._center, self._scale = mx.array(center, mx.float32), mx.array(scale, mx.float32)

    def raw(self, start: int, end: int) -> np.ndarray:
        """(C, end - start) as recorded."""
        if start < self._start:
            raise ValueError(f"start must be at least {self._start}, what is not yet forgotten, got {start}")
        held, count = [self._held], self._start + self._held.shape[1]
        while count < end:
            block = next(self._blocks, None)
            if block is None:
                raise ValueError(f"audio must keep its {self.samples} samples while it is read, got {count}")
            held.append(block)
            count += block.shape[1]
        self._held = np.concatenate(held, axis=1) if len(held) > 1 else self._held
        return self._held[:, start - self._start : end - self._start]

    def levelled(self, start: int, end: int) -> mx.array:
        """(C, end - start) with the level taken off, and zeros where the track is not."""
        first, last = (min(max(at, 0), self.samples) for at in (start, end))
        if first == last:
            return mx.zeros((self._held.shape[0], end - start))
        level = (mx.array(self.raw(first, last)) - self._center) / self._scale
        return mx.pad(level, [(0, 0), (first - start, end - last)])

    def restored(self, stems: mx.array) -> mx.array:
        """Stems of the levelled track, with its level."""
        return stems * self._scale + self._center

    def forget(self, before: int) -> None:
        """Lets go of the samples before that one."""
        if before > self._start:
            self._held = self._held[:, before - self._start :]
            self._start = before
