"""The tracks of a separation, read side by side in sections, and their levels, envelopes and spectrograms.

Axes: K tracks (mix, stems, residual), C channels, N samples, W columns, F bands.
"""

from __future__ import annotations

import base64
import functools
import math
from collections.abc import Iterator, Mapping
from itertools import chain, repeat

import numpy as np

from ...audio.recording import BLOCK, Recording
from ...audio.resampling import rechunk

SECTION = 10  # seconds of a section
MARGIN = 0.1  # seconds of the neighbouring sections on both sides, where compressed audio is not exact
COLUMNS = 1200  # of the envelope
FRAMES, BANDS, WINDOW = 512, 112, 4096  # columns and rows of the spectrogram; samples of a frame
BATCH = 32  # frames that are transformed together: few enough for the processor's cache
LOWEST, HIGHEST, FLOOR, CEILING = 40.0, 20000.0, -88.0, -20.0  # Hz, Hz; dB, a full-scale sine being 0


class Tracks:
    """The mix, the stems and the residual (the mix minus the sum of the stems) of one track.

    All have the stems' sample rate, channels and length.

    Args:
        mix: the recording that was separated.
        stems: the recording of each stem.

    Raises:
        ValueError: if there are no stems, or if they differ in sample rate, channels or length.
    """

    def __init__(self, mix: Recording, stems: Mapping[str, Recording]):
        if not stems:
            raise ValueError("stems must name at least one track, got none")
        shapes = {name: (stem.sample_rate, stem.channels, _count_samples(stem)) for name, stem in stems.items()}
        want = next(iter(shapes.values()))
        for name, got in shapes.items():
            if got != want:
                raise ValueError(f"stems must agree in rate, channels and samples: {name} has {got}, others {want}")
        self.rate, self.channels, self.samples = want
        if not self.samples:
            raise ValueError("stems must hold samples, got none")
        self.seconds = self.samples / self.rate
        self.sections = -(-self.samples // (SECTION * self.rate))
        self.margin = round(MARGIN * self.rate)  # samples
        self.names = ["mix", *stems, "residual"]
        self._recordings = [mix, *stems.values()]

    def _read_all(self) -> Iterator[np.ndarray]:
        """Yields (K, C, n) for each section; n is SECTION seconds, and less in the last one."""
        for parts in zip(*(self._read_sections(r) for r in self._recordings), strict=True):
            audio = np.stack([*parts, parts[0]])
            audio[-1] -= np.sum(audio[1:-1], axis=0)
            yield audio

    def read_with_margins(self) -> Iterator[np.ndarray]:
        """Yields (K, C, n) for each section, with `margin` samples of its neighbours, or silence, on both sides.

        n is SECTION seconds and both margins, and less in the last one.
        """
        silence = np.zeros((len(self.names), self.channels, self.margin), np.float32)
        before, here = silence, None
        for after in self._read_all():
            if here is not None:
                head = np.concatenate([after, silence], axis=2)[..., : self.margin]
                yield np.concatenate([before, here, head], axis=2)
                before = here[..., -self.margin :]
            here = after
        yield np.concatenate([before, here, silence], axis=2)

    def _read_sections(self, recording: Recording) -> Iterator[np.ndarray]:
        """Yields (C, n) for each section. A shorter recording is padded with silence, a longer one is truncated."""
        silence = np.zeros((self.channels, BLOCK), np.float32)
        endless = chain(recording.convert_blocks(self.channels, self.rate), repeat(silence))
        left = self.samples
        for block in rechunk(endless, SECTION * self.rate):
            yield block[:, :left]
            left -= SECTION * self.rate
            if left <= 0:
                return


def _count_samples(recording: Recording) -> int:
    """The samples per channel, for which a recording that does not tell is read."""
    if recording.samples is not None:
        return recording.samples
    return sum(block.shape[1] for block in recording.blocks())


class Measure:
    """The levels, envelope and spectrogram of one track, accumulated section by section.

    Args:
        rate: the sample rate in Hz.
        channels: of the track.
        samples: of the whole track.

    Attributes:
        peak: the largest absolute sample.
        energy: the sum of squares over all channels and samples.
        low: (W,), the smallest sample of each column of the envelope.
        high: (W,), the largest sample of each column.
        square: (W,), the sum of squares of each column, averaged over channels.
    """

    def __init__(self, rate: int, channels: int, samples: int):
        self.channels, self.samples, self.done = channels, samples, 0
        self.peak, self.energy = 0.0, 0.0
        self.columns = min(COLUMNS, samples)
        self.edges = -(-np.arange(self.columns + 1) * samples // self.columns)  # column w holds [edges[w], edges[w+1])
        self.low, self.high = np.full(self.columns, np.inf), np.full(self.columns, -np.inf)
        self.square = np.zeros(self.columns)
        self.frames = max(1, min(FRAMES, samples // 256))
        self.hop = max(256, min(samples // self.frames, WINDOW))  # at least one frame a column
        self.power, self.counts = np.zeros((self.frames, BANDS)), np.zeros((self.frames, 1))
        window = np.hanning(WINDOW + 1)[:-1]
        self.window = (window * (2 / window.sum() / math.sqrt(channels))).astype(np.float32)  # a full-scale sine has 1
        self.bins, self.weights, self.starts = _bands(rate)
        self.held = np.zeros((channels, WINDOW // 2), np.float32)  # from half a window before the next frame's centre
        self.next = 0  # where the next frame is centred

    @property
    def peak_db(self) -> float:
        """The peak in dBFS; -inf for silence."""
        return 20 * math.log10(self.peak) if self.peak else -math.inf

    @property
    def rms_db(self) -> float:
        """The RMS level in dBFS: 0 for a full-scale square wave, -3 for a sine, -inf for silence."""
        return 10 * math.log10(self.energy / (self.channels * self.samples)) if self.energy else -math.inf

    def add(self, audio: np.ndarray) -> None:
        """Adds the next (C, n) samples. ValueError if some are not finite."""
        low, high = audio.min(axis=0), audio.max(axis=0)
        peak = float(max(high.max(), -low.min()))
        if not math.isfinite(peak):
            raise ValueError("audio must be finite, got NaN or infinite samples")
        self.peak = max(self.peak, peak)
        square = np.einsum("cn,cn->n", audio, audio)
        first, last = np.searchsorted(self.edges, (self.done, self.done + audio.shape[1] - 1), side="right") - 1
        starts = np.maximum(self.edges[first : last + 1] - self.done, 0)
        at = slice(first, last + 1)
        self.low[at] = np.minimum(self.low[at], np.minimum.reduceat(low, starts))
        self.high[at] = np.maximum(self.high[at], np.maximum.reduceat(high, starts))
        squares = np.add.reduceat(square, starts, dtype=np.float64)
        self.square[at] += squares / self.channels
        self.energy += float(squares.sum())
        self.done += audio.shape[1]
        self._spectrum(audio)

    def _spectrum(self, audio: np.ndarray) -> None:
        """Adds the power of all complete frames to the columns in which they are centred."""
        end = WINDOW // 2 if self.done == self.samples else 0
        held = np.concatenate([self.held, audio, np.zeros((self.channels, end), np.float32)], axis=1)
        frames = max(0, (held.shape[1] - WINDOW) // self.hop + 1)
        if not frames:
            self.held = held
            return
        windows = np.lib.stride_tricks.sliding_window_view(held, WINDOW, axis=1)[:, :: self.hop]
        for first in range(0, frames, BATCH):
            spectrum = np.fft.rfft(windows[:, first : first + BATCH] * self.window)
            power = np.square(spectrum.real)
            power += np.square(spectrum.imag)
            levels = np.add.reduceat(power.sum(axis=0)[:, self.bins] * self.weights, self.starts, axis=1)
            centres = self.next + self.hop * np.arange(first, first + len(levels))
            column = np.minimum(centres * self.frames // self.samples, self.frames - 1)
            new = np.flatnonzero(np.diff(column, prepend=-1))  # the first frame of each column
            self.power[column[new]] += np.add.reduceat(levels, new, axis=0)
            self.counts[column[new], 0] += np.diff(new, append=len(column))
        self.next += self.hop * frames
        self.held = held[:, self.hop * frames :].copy()

    def pictures(self, scale: float) -> dict[str, str]:
        """Returns the envelope and the spectrogram in base64.

        Args:
            scale: the sample value that becomes 127 in the envelope.

        Returns:
            "envelope": (3, W) int8, the low, high and RMS values. "spectrum": (F, frames) uint8, the lowest band last.
        """
        rms = np.sqrt(self.square / np.diff(self.edges))
        envelope = np.clip(np.round(np.stack([self.low, self.high, rms]) * (127 / scale)), -127, 127).astype(np.int8)
        level = 10 * np.log10(np.maximum(self.power / np.maximum(self.counts, 1), 1e-12))
        image = np.clip((level - FLOOR) / (CEILING - FLOOR) * 255, 0, 255).astype(np.uint8).T[::-1]
        return {
            "envelope": base64.b64encode(envelope.tobytes()).decode(),
            "spectrum": base64.b64encode(np.ascontiguousarray(image).tobytes()).decode(),
        }


@functools.lru_cache
def _bands(rate: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights for the mean power in F bands of equal width in log frequency, with the spectrum linear between its bins.

    Returns the bins of all bands, their weights, and the index of each band's first bin."""
    edges = np.geomspace(LOWEST, min(HIGHEST, rate / 2), BANDS + 1) * WINDOW / rate
    t = np.clip(edges - np.arange(WINDOW // 2 + 1)[:, None], -1, 1)
    integral = np.where(t < 0, (1 + t) ** 2 / 2, 1 - (1 - t) ** 2 / 2)  # of each bin's triangle, up to each edge
    weights = (np.diff(integral, axis=1) / np.diff(edges)).T  # (F, bins)
    bands, bins = np.nonzero(weights)
    return bins, weights[bands, bins].astype(np.float32), np.searchsorted(bands, np.arange(BANDS))
