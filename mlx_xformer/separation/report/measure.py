"""Tracks of a separation side by side, read in stretches, and what can be measured of them: levels and pictures.

Axes: K tracks (mix, stems, residual), C channels, N samples, W columns, F bands.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping
from itertools import chain, repeat

import numpy as np

from ...audio.recording import BLOCK, Recording
from ...audio.resampling import rechunk

STRETCH = 10  # seconds that are read at a time
MARGIN = 0.1  # seconds of its neighbours that a window holds, so that a codec's edges are never heard
COLUMNS, BANDS, WINDOW = 1200, 112, 4096
LOWEST, HIGHEST, FLOOR, CEILING = 40.0, 20000.0, -88.0, -20.0  # Hz, Hz; dB, a full-scale sine being 0


class Tracks:
    """The mix, the stems and their residual, at the stems' rate, channels and length."""

    def __init__(self, mix: Recording, stems: Mapping[str, Recording]):
        if not stems:
            raise ValueError("stems must name at least one track, got none")
        first = next(iter(stems.values()))
        for name, stem in stems.items():
            got, want = (
                (stem.sample_rate, stem.channels, stem.samples),
                (first.sample_rate, first.channels, first.samples),
            )
            if got != want:
                raise ValueError(f"stems must agree in rate, channels and samples: {name} has {got}, others {want}")
        if not first.samples:
            raise ValueError("stems must hold samples, got none")
        self.rate, self.channels, self.samples = first.sample_rate, first.channels, first.samples
        self.seconds = self.samples / self.rate
        self.names = ["mix", *stems, "residual"]
        self._recordings = [mix, *stems.values()]

    def stretches(self) -> Iterator[np.ndarray]:
        """(K, C, n) in turn, n being STRETCH seconds or, at the end, less."""
        for parts in zip(*(self._stretches(r) for r in self._recordings), strict=True):
            mix, *stems = parts
            audio = np.stack([mix, *stems, mix - np.sum(stems, axis=0)])
            if not np.isfinite(audio).all():
                raise ValueError(f"{', '.join(self.names[:-1])} must be finite, got NaN or infinite samples")
            yield audio

    def windows(self) -> Iterator[np.ndarray]:
        """The stretches, each with MARGIN seconds of its neighbours (or silence) at both ends."""
        margin = round(MARGIN * self.rate)
        silence = np.zeros((len(self.names), self.channels, margin), np.float32)
        before, here = silence, None
        for after in self.stretches():
            if here is not None:
                head = np.concatenate([after, silence], axis=2)[..., :margin]
                yield np.concatenate([before, here, head], axis=2)
                before = here[..., -margin:]
            here = after
        yield np.concatenate([before, here, silence], axis=2)

    def _stretches(self, recording: Recording) -> Iterator[np.ndarray]:
        """(C, n) in turn; a recording that ends early goes on in silence, one that is longer is cut."""
        silence = np.zeros((self.channels, BLOCK), np.float32)
        endless = chain(recording.convert_blocks(self.channels, self.rate), repeat(silence))
        left = self.samples
        for block in rechunk(endless, STRETCH * self.rate):
            yield block[:, :left]
            left -= STRETCH * self.rate
            if left <= 0:
                return


class Measure:
    """Levels and pictures of one track, gathered stretch by stretch.

    peak: largest |x|. energy: sum of x^2 over all channels. low, high, square: (W,), the envelope.
    """

    def __init__(self, rate: int, channels: int, samples: int):
        self.channels, self.samples, self.done = channels, samples, 0
        self.peak, self.energy = 0.0, 0.0
        self.columns = min(COLUMNS, samples)
        self.edges = -(-np.arange(self.columns + 1) * samples // self.columns)  # column w holds [edges[w], edges[w+1])
        self.low, self.high = np.full(self.columns, np.inf), np.full(self.columns, -np.inf)
        self.square = np.zeros(self.columns)
        self.frames = max(1, min(COLUMNS, samples // 256))
        self.hop = max(256, min(samples // (2 * self.frames), WINDOW))
        self.power, self.counts = np.zeros((self.frames, BANDS)), np.zeros((self.frames, 1))
        self.window = np.hanning(WINDOW + 1)[:-1].astype(np.float32)
        self.bins, self.weights, self.starts = _bands(rate)
        self.held = np.zeros((channels, WINDOW // 2), np.float32)  # begins half a window before the next frame's centre
        self.next = 0  # where the next frame is centred

    @property
    def peak_db(self) -> float:
        """dBFS; -inf for silence."""
        return 20 * math.log10(self.peak) if self.peak else -math.inf

    @property
    def rms_db(self) -> float:
        """dBFS over all channels and samples: a full-scale square wave is 0, a sine -3; -inf for silence."""
        return 10 * math.log10(self.energy / (self.channels * self.samples)) if self.energy else -math.inf

    def add(self, audio: np.ndarray) -> None:
        """The next (C, n) samples."""
        self.peak = max(self.peak, float(np.abs(audio).max()))
        square = np.square(audio, dtype=np.float64).mean(axis=0)
        self.energy += float(square.sum()) * self.channels
        first, last = np.searchsorted(self.edges, (self.done, self.done + audio.shape[1] - 1), side="right") - 1
        starts = np.maximum(self.edges[first : last + 1] - self.done, 0)
        at = slice(first, last + 1)
        self.low[at] = np.minimum(self.low[at], np.minimum.reduceat(audio.min(axis=0), starts))
        self.high[at] = np.maximum(self.high[at], np.maximum.reduceat(audio.max(axis=0), starts))
        self.square[at] += np.add.reduceat(square, starts)
        self.done += audio.shape[1]
        self._spectrum(audio)

    def _spectrum(self, audio: np.ndarray) -> None:
        """Power of the frames that are complete, into the columns that they are centred in."""
        end = WINDOW // 2 if self.done == self.samples else 0
        held = np.concatenate([self.held, audio, np.zeros((self.channels, end), np.float32)], axis=1)
        frames = max(0, (held.shape[1] - WINDOW) // self.hop + 1)
        for first in range(0, frames, 64):
            starts = self.hop * np.arange(first, min(first + 64, frames))
            cut = held[:, starts[:, None] + np.arange(WINDOW)] * self.window
            spectrum = np.fft.rfft(cut) / (self.window.sum() / 2)
            power = (spectrum.real**2 + spectrum.imag**2).mean(axis=0)[:, self.bins] * self.weights
            column = np.minimum((self.next + starts) * self.frames // self.samples, self.frames - 1)
            np.add.at(self.power, column, np.add.reduceat(power, self.starts, axis=1))
            np.add.at(self.counts, column, 1)
        self.next += self.hop * frames
        self.held = held[:, self.hop * frames :].copy()

    def pictures(self, scale: float) -> dict[str, str]:
        """Envelope (3, W) as int8 in units of scale / 127, and spectrogram (F, frames), lowest band last, as uint8."""
        rms = np.sqrt(self.square / np.diff(self.edges))
        envelope = np.clip(np.round(np.stack([self.low, self.high, rms]) * (127 / scale)), -127, 127).astype(np.int8)
        level = 10 * np.log10(np.maximum(self.power / np.maximum(self.counts, 1), 1e-12))
        image = np.clip((level - FLOOR) / (CEILING - FLOOR) * 255, 0, 255).astype(np.uint8).T[::-1]
        return {
            "envelope": base64.b64encode(envelope.tobytes()).decode(),
            "spectrum": base64.b64encode(np.ascontiguousarray(image).tobytes()).decode(),
        }


def _bands(rate: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean power over each of F bands, even in log frequency, of a spectrum that is linear between its bins.

    As bins, their weights, and where in these the bins of each band start: most bands see few bins.
    """
    edges = np.geomspace(LOWEST, min(HIGHEST, rate / 2), BANDS + 1) * WINDOW / rate
    t = np.clip(edges - np.arange(WINDOW // 2 + 1)[:, None], -1, 1)
    integral = np.where(t < 0, (1 + t) ** 2 / 2, 1 - (1 - t) ** 2 / 2)  # of each bin's triangle, up to each edge
    weights = (np.diff(integral, axis=1) / np.diff(edges)).T  # (F, bins)
    bands, bins = np.nonzero(weights)
    return bins, weights[bands, bins].astype(np.float32), np.searchsorted(bands, np.arange(BANDS))
