"""Separator and separate(): recordings and files of any length into their stems.

Source: demucs 4.1.0 (demucs/api.py, demucs/separate.py). Axes: S stems, C channels, n samples of a stretch.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, TypeVar, cast

import mlx.core as mx
import numpy as np

from ..audio.recording import Recording, resampled
from ..models.htdemucs import Bag, HTDemucs
from ..pretrained.loading import load
from .segments import Options, members, stretches
from .stems import Output, StemFiles
from .track import Track


@dataclass(frozen=True)
class Progress:
    """How far one track is: segments done of all, and seconds passed."""

    done: int
    total: int
    elapsed: float

    @property
    def remaining(self) -> float:
        """Seconds left, if the rest takes as long as what is done."""
        return self.elapsed * (self.total - self.done) / self.done


_LOUDEST = 1e12  # whatever was meant, float32 could not square and sum it
Watch = Callable[[Progress], None]
Audio = TypeVar("Audio", np.ndarray, mx.array)


class Cancelled(Exception):
    """A separation was called off; nothing of it is left."""


@dataclass(frozen=True)
class Separated:
    """The result of separating a file.

    Attributes:
        files: The stems' files.
        seconds: The length of the audio.
        took: The time that the separation took, in seconds.
        sample_rate: Of the files, in Hz.
        channels: Of the files.
        samples: Of each file.
        gains: The factor of each stem that keeps it from clipping.
    """

    files: dict[str, Path]
    seconds: float
    took: float
    sample_rate: int
    channels: int
    samples: int
    gains: dict[str, float]


class Separator:
    """A model, loaded once, and how it is applied; separates as many recordings and files as asked.

    model: what `load` takes, or a model. The options are those of `separate`. stems: what comes out.
    """

    def __init__(self, model: str | Path | HTDemucs | Bag = "htdemucs", **options: Any):
        self.options = Options(**options)
        found = model if isinstance(model, (HTDemucs, Bag)) else load(model)
        if not isinstance(found, (HTDemucs, Bag)):
            kind = type(found).__name__
            hint = " (mlx-xformer generate?)" if kind == "CausalLM" else ""
            raise ValueError(f"{model}: must be a model that separates, got a {kind}{hint}")
        self.model = found
        for member in members(self.model)[0]:
            self.options.check(member.config)
        self.stems = self.options.names(self.model.config.sources)

    def separate(
        self, audio: Audio, sample_rate: int, *, progress: Watch | None = None, cancel: Event | None = None
    ) -> dict[str, Audio]:
        """Audio (channels, samples), or mono (samples,), into {stem: (channels, samples)} at the model's rate.

        MLX arrays make MLX arrays, NumPy arrays NumPy arrays. Setting `cancel` raises Cancelled soon after.
        """
        host = np.asarray(audio.astype(mx.float32)) if isinstance(audio, mx.array) else audio
        separation = _Separation(self, Recording.of_array(host, sample_rate), progress, cancel)
        whole = mx.concatenate(list(separation.stretches()), axis=-1)
        mx.eval(whole)  # so that another thread may read it
        stems = whole if isinstance(audio, mx.array) else np.array(whole)
        return cast("dict[str, Audio]", dict(zip(self.stems, stems, strict=True)))

    def separate_file(
        self,
        file: str | Path,
        folder: str | Path,
        output: Output | None = None,
        *,
        progress: Watch | None = None,
        cancel: Event | None = None,
    ) -> Separated:
        """Separates a file into files below `folder`; memory does not grow with its length.

        All stems are put in place at the end, at once; on failure, or if cancelled, nothing is left behind.
        """
        file, output, start = Path(file), output or Output(), time.perf_counter()
        recording = Recording.of(file)
        separation = _Separation(self, recording, progress, cancel)
        paths = {stem: output.path(Path(folder), file, stem) for stem in self.stems}
        config = self.model.config
        rate, channels = config.samplerate, config.audio_channels
        keep = output.rate == "keep" and rate != recording.sample_rate
        rate, samples = (recording.sample_rate, separation.recorded) if keep else (rate, separation.samples)
        with StemFiles(paths, rate, channels, samples, output) as files:
            blocks = (np.array(stretch) for stretch in separation.stretches())
            for stretch in _at_rate(blocks, (len(paths), channels), config.samplerate, rate, samples):
                files.write(dict(zip(paths, stretch, strict=True)))
            gains = files.commit()
        seconds = separation.recorded / recording.sample_rate
        return Separated(paths, seconds, time.perf_counter() - start, rate, channels, samples, gains)


def separate(
    model: HTDemucs | Bag,
    audio: Audio,
    sample_rate: int,
    *,
    progress: Watch | None = None,
    cancel: Event | None = None,
    **options: Any,
) -> dict[str, Audio]:
    """Separates audio (C, N), or mono (N,), into {stem: (channels, samples)} at the model's sample rate.

    shifts (1): passes over the track, each moved by a random part of half a second, averaged; 0 for one unmoved pass.
    overlap (0.25): part of a segment shared with the next, in [0, 1). segment: seconds, at most the model's own.
    transition_power (1): sharpness of the cross-fade between segments, 1 for a linear one. seed (0): of the random
    draws. batch_size: segments run at once, by default what suits the device. stems: the wanted ones; a bag runs only
    the members that they need. two_stems: one stem and, by other_method, the sum of all others ("add"), the mix minus
    it ("minus"), or nothing ("none"). mode: see InferenceMode. progress and cancel: see Separator.separate.
    The track is brought to mean 0 and deviation 1, and back. ValueError names the argument that is out of range, and
    refuses NaN and infinite samples.
    """
    return Separator(model, **options).separate(audio, sample_rate, progress=progress, cancel=cancel)


class _Separation:
    """One recording on its way through a separator: a first pass to measure it, a second that makes the stems.

    recorded: its samples; samples: those at the model's rate.
    """

    def __init__(self, separator: Separator, recording: Recording, progress: Watch | None, cancel: Event | None):
        self._separator, self._recording = separator, recording
        self._progress, self._cancel, self._start = progress, cancel, time.perf_counter()
        config = separator.model.config
        self.recorded, self.samples, self._center, self._scale = _survey(
            recording, config.audio_channels, config.samplerate
        )
        if not self.samples:
            raise ValueError(f"audio must last at least one sample at {config.samplerate} Hz, got less")

    def stretches(self) -> Iterator[mx.array]:
        """(S, C, n) in turn, at the model's rate, for the separator's stems."""
        config, options = self._separator.model.config, self._separator.options
        blocks = self._recording.converted(config.audio_channels, config.samplerate)
        track = Track(blocks, config.audio_channels, self.samples, self._center, self._scale)
        done = 0
        for stretch in stretches(self._separator.model, track, options, self._step):
            n = stretch.shape[-1]
            stems = track.restored(stretch)
            if options.two_stems is not None:
                chosen = [config.sources[i] for i in options.wanted(config.sources)].index(options.two_stems)
                parts = [stems[chosen : chosen + 1]]
                if options.other_method == "add":
                    others = [stem for i, stem in enumerate(stems) if i != chosen]
                    parts.append(sum(others[1:], others[0])[None])
                elif options.other_method == "minus":
                    parts.append(mx.array(track.raw(done, done + n)) - stems[chosen : chosen + 1])
                stems = mx.concatenate(parts)
            done += n
            yield stems

    def _step(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(Progress(done, total, time.perf_counter() - self._start))
        if self._cancel is not None and self._cancel.is_set():
            raise Cancelled(f"cancelled after {done} of {total} segments")


def _survey(recording: Recording, channels: int, sample_rate: int) -> tuple[int, int, float, float]:
    """Reads a recording once, to measure it, in float64 and block by block (Chan, Golub and LeVeque 1979).

    Returns:
        Its samples as recorded and as converted; the mean of the converted mono mix and its unbiased deviation plus
        1e-8.
    """
    recorded = samples = 0
    mean = squares = 0.0

    def counted() -> Iterator[np.ndarray]:
        nonlocal recorded
        for block in recording.blocks():
            recorded += block.shape[1]
            yield block

    for block in dataclasses.replace(recording, blocks=counted).converted(channels, sample_rate):
        if np.abs(block).max() > _LOUDEST:
            raise ValueError(f"audio must have full scale at 1, got samples of {np.abs(block).max():g}")
        mono = block.mean(axis=0, dtype=np.float64)
        n, center = mono.size, mono.mean()
        gap = center - mean
        samples += n
        mean += gap * n / samples
        squares += np.square(mono - center).sum() + gap**2 * n * (samples - n) / samples
    return recorded, samples, mean, math.sqrt(squares / max(samples - 1, 1)) + 1e-8


def _at_rate(
    stretches: Iterable[np.ndarray], shape: tuple[int, int], from_rate: int, to_rate: int, samples: int
) -> Iterator[np.ndarray]:
    """Stretches (S, C, n) at another rate, `samples` in all: resampling rounds a length up or down."""
    rows = shape[0] * shape[1]
    flat = (stretch.reshape(rows, -1) for stretch in stretches)
    left = samples
    for block in resampled(flat, rows, from_rate, to_rate):
        cut = block[:, :left]
        left -= cut.shape[1]
        yield cut.reshape(*shape, -1)
    yield np.zeros((*shape, left), np.float32)
