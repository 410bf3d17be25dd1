"""A recording as a model reads it: in order, at the model's sample rate, with mean 0 and deviation 1.

Axes: C channels.
"""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import numpy as np


class Track:
    """A recording at a model's sample rate that is read once and in order.

    Args:
        blocks: arrays (C, n) that make up the recording.
        channels: C.
        samples: of the whole recording.
        mean: of the recording; subtracted when samples are normalized.
        deviation: of the recording; normalized samples are divided by it.
    """

    def __init__(
        self, blocks: Iterable[np.ndarray], channels: int, samples: int, mean: float = 0, deviation: float = 1
    ) -> None:
        self.samples = samples
        self._blocks, self._start = iter(blocks), 0
        self._held = np.zeros((channels, 0), np.float32)
        self._mean, self._deviation = mx.array(mean, mx.float32), mx.array(deviation, mx.float32)

    def read(self, start: int, end: int) -> np.ndarray:
        """Returns the samples from `start` to `end` as recorded, (C, end - start).

        Raises:
            ValueError: if `start` was discarded, or if the recording ends before `end`.
        """
        if start < self._start:
            raise ValueError(f"start must be at least {self._start}, as earlier samples were discarded, got {start}")
        held, count = [self._held], self._start + self._held.shape[1]
        while count < end:
            block = next(self._blocks, None)
            if block is None:
                raise ValueError(f"audio must keep its {self.samples} samples while it is read, got {count}")
            held.append(block)
            count += block.shape[1]
        self._held = np.concatenate(held, axis=1) if len(held) > 1 else self._held
        return self._held[:, start - self._start : end - self._start]

    def read_normalized(self, start: int, end: int) -> mx.array:
        """Returns the normalized samples from `start` to `end`, (C, end - start); beyond the track they are 0."""
        first, last = (min(max(at, 0), self.samples) for at in (start, end))
        if first == last:
            return mx.zeros((self._held.shape[0], end - start))
        audio = (mx.array(self.read(first, last)) - self._mean) / self._deviation
        return mx.pad(audio, [(0, 0), (first - start, end - last)])

    def denormalize(self, stems: mx.array) -> mx.array:
        """Returns stems of the normalized track at the track's own level."""
        return stems * self._deviation + self._mean

    def discard(self, before: int) -> None:
        """Frees the samples before `before`, which cannot be read again."""
        if before > self._start:
            self._held = self._held[:, before - self._start :]
            self._start = before
