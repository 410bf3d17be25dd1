"""The separation of one recording: it is read once to measure it, and once more to make the stems.

Axes: S stems, C channels, n samples of a block.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from ..audio.recording import Recording
from ..audio.resampling import resample_blocks
from .segments import stream_stems
from .track import Track

if TYPE_CHECKING:
    from ..models.htdemucs import Bag, HTDemucs
    from .options import Options

_MAX_SAMPLE = 1e12  # the squares of larger samples would overflow when float32 adds them up


@dataclass(frozen=True)
class Progress:
    """How far the separation of one track has come.

    Args:
        done: segments that are finished.
        total: all segments, over all models and shifts.
        elapsed: seconds since the start.
    """

    done: int
    total: int
    elapsed: float

    @property
    def remaining(self) -> float:
        """Estimated seconds until the end, at the pace so far."""
        return self.elapsed * (self.total - self.done) / self.done


class Cancelled(Exception):
    """Raised when a separation was cancelled. No files are left of it."""


class Run:
    """The separation of one recording.

    Args:
        model: a model, or a bag of several.
        options: how it is applied.
        recording: what to separate.
        progress: called with a `Progress` after each batch of segments.
        cancel: an event that ends the separation after the current batch when it is set.

    Attributes:
        recorded: the recording's samples per channel.
        samples: the same at the model's sample rate.
        warnings: a line for each kind of damage of the recording that was read over.
    """

    def __init__(
        self,
        model: HTDemucs | Bag,
        options: Options,
        recording: Recording,
        progress: Callable[[Progress], None] | None,
        cancel: Event | None,
    ) -> None:
        self._model, self._options, self._recording = model, options, recording
        self._progress, self._cancel, self._start = progress, cancel, time.perf_counter()
        config = model.config
        warnings: list[str] = []
        self.recorded, self.samples, self._mean, self._deviation = _measure(
            recording, config.audio_channels, config.samplerate, warnings.append
        )
        self.warnings = tuple(warnings)
        if not self.samples:
            raise ValueError(f"audio must last at least one sample at {config.samplerate} Hz, got less")

    def blocks(self, *, rest: bool = True) -> Iterator[mx.array]:
        """Yields (S, C, n) at the model's sample rate, in order, for the stems that the options name.

        Args:
            rest: whether the rest of `two_stems` is among them.
        """
        config, options = self._model.config, self._options
        recorded = self._recording.convert_blocks(config.audio_channels, config.samplerate)
        track = Track(recorded, config.audio_channels, self.samples, self._mean, self._deviation)
        done = 0
        for block in stream_stems(self._model, track, options, self._report):
            stems = track.denormalize(block)
            start, done = done, done + block.shape[-1]
            if options.two_stems is not None:
                stems = self._two_stems(stems, track.read(start, done) if rest else None)
            yield stems

    def _two_stems(self, stems: mx.array, mix: np.ndarray | None) -> mx.array:
        """(S, C, n) of the wanted sources, and the mix (C, n) or None -> the chosen one, and with a mix the rest."""
        sources, options = self._model.config.sources, self._options
        chosen = [sources[i] for i in options.wanted(sources)].index(str(options.two_stems))
        parts = [stems[chosen : chosen + 1]]
        if mix is None or options.other_method == "none":
            return parts[0]
        if options.subtracts(sources):
            parts.append(mx.array(mix) - parts[0])
        else:
            others = [stem for i, stem in enumerate(stems) if i != chosen]
            parts.append(sum(others[1:], others[0])[None])
        return mx.concatenate(parts)

    def count_samples(self, sample_rate: int) -> int:
        """Returns how many samples per channel the stems have at a sample rate."""
        rate = self._recording.sample_rate
        known = {rate: self.recorded, self._model.config.samplerate: self.samples}
        return known.get(sample_rate, round(self.recorded * sample_rate / rate))

    def resampled_blocks(self, sample_rate: int) -> Iterator[np.ndarray]:
        """Yields (S, C, n) at any sample rate, in order.

        Where that is not the model's, a mix minus a stem is taken from the recording itself: the two add up to it, and
        keep the frequencies that the model's sample rate does not hold.
        """
        config, options = self._model.config, self._options
        if sample_rate == config.samplerate:
            yield from (np.array(block) for block in self.blocks())
            return
        channels, subtracts = config.audio_channels, options.subtracts(config.sources)
        count = 1 if subtracts else len(options.names(config.sources))
        blocks = (np.array(block) for block in self.blocks(rest=not subtracts))
        samples = self.count_samples(sample_rate)
        stems = resample_stems(blocks, (count, channels), config.samplerate, sample_rate, samples)
        if not subtracts:
            yield from stems
            return
        mix, done = Track(self.mix_blocks(sample_rate), channels, samples), 0
        for block in stems:
            start, done = done, done + block.shape[-1]
            yield np.concatenate([block, mix.read(start, done) - block])
            mix.discard(done)

    def mix_blocks(self, sample_rate: int) -> Iterator[np.ndarray]:
        """Yields the recording, (C, n), at a sample rate and in the model's channels; it is as long as the stems."""
        channels = self._model.config.audio_channels
        blocks = (block[None] for block in self._recording.convert_blocks(channels, sample_rate))
        samples = self.count_samples(sample_rate)
        return (block[0] for block in resample_stems(blocks, (1, channels), sample_rate, sample_rate, samples))

    def _report(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(Progress(done, total, time.perf_counter() - self._start))
        if self._cancel is not None and self._cancel.is_set():
            raise Cancelled(f"cancelled after {done} of {total} segments")


def _measure(
    recording: Recording, channels: int, sample_rate: int, warn: Callable[[str], None]
) -> tuple[int, int, float, float]:
    """Reads a recording once, to measure it; calls `warn` for what is damaged.

    Returns its samples as recorded and at `sample_rate`, the mean of the mono mix at that rate, and its unbiased
    standard deviation plus 1e-8, accumulated in float64, block by block (Chan, Golub and LeVeque 1979).
    """
    recorded = samples = 0
    mean = squares = 0.0

    def count_blocks(_: object) -> Iterator[np.ndarray]:
        nonlocal recorded
        for block in recording.blocks(warn):
            recorded += block.shape[1]
            yield block

    for block in dataclasses.replace(recording, decode=count_blocks).convert_blocks(channels, sample_rate):
        if np.abs(block).max() > _MAX_SAMPLE:
            raise ValueError(f"audio must have full scale at 1, got samples of {np.abs(block).max():g}")
        mono = block.mean(axis=0, dtype=np.float64)
        n, center = mono.size, mono.mean()
        gap = center - mean
        samples += n
        mean += gap * n / samples
        squares += np.square(mono - center).sum() + gap**2 * n * (samples - n) / samples
    return recorded, samples, mean, math.sqrt(squares / max(samples - 1, 1)) + 1e-8


def resample_stems(
    blocks: Iterable[np.ndarray], shape: tuple[int, int], from_rate: int, to_rate: int, samples: int
) -> Iterator[np.ndarray]:
    """Resamples blocks (S, C, n) and makes them `samples` long in all, since resampling rounds the length."""
    rows = shape[0] * shape[1]
    flat = (block.reshape(rows, -1) for block in blocks)  # (S * C, n)
    left = samples
    for block in resample_blocks(flat, rows, from_rate, to_rate):
        cut = block[:, :left]
        left -= cut.shape[1]
        yield cut.reshape(*shape, -1)
    yield np.zeros((*shape, left), np.float32)
