"""Separator and separate(): recordings and files of any length are separated into their stems.

Source: demucs 4.1.0 (demucs/api.py, demucs/separate.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Literal, TypeVar, cast

import mlx.core as mx
import numpy as np

from ..audio.recording import Recording
from ..audio.tags import Tags, read_tags
from ..models.htdemucs import Bag, HTDemucs, InferenceMode
from ..pretrained.loading import load
from .options import Options, OtherMethod
from .run import Progress, Run
from .segments import get_members
from .stems import Output, StemFiles
from .targets import list_targets

Audio = TypeVar("Audio", np.ndarray, mx.array)
Mode = InferenceMode | Literal["full", "time_only"]


@dataclass(frozen=True)
class Separated:
    """The result of separating a file.

    Args:
        files: the file of each stem.
        seconds: the length of the recording.
        took: the seconds that the separation took.
        sample_rate: of the files, in Hz.
        channels: of the files.
        samples: of the files, per channel.
        gains: the factor for each stem that keeps it from clipping.
        warnings: a line for each kind of damage of the recording that was read over.
        stem_file: the file of the mix and all stems, if one was asked for.
    """

    files: dict[str, Path]
    seconds: float
    took: float
    sample_rate: int
    channels: int
    samples: int
    gains: dict[str, float]
    warnings: tuple[str, ...] = ()
    stem_file: Path | None = None


class Separator:
    """A model, loaded once, that separates any number of recordings and files.

    Args:
        model: a name such as "htdemucs", a path (see `load`), or a model that is loaded already. A bag, such as
            "htdemucs_ft", is several models whose outputs are averaged, as demucs calls it.
        shifts: how many passes over the track, each shifted by a random part of half a second, are averaged; 0 for a
            single pass without a shift.
        overlap: the part of a segment that it shares with the next one, at least 0 and below 1.
        segment: the seconds of a segment, at most (and by default) the model's own.
        transition_power: the exponent of the cross-fade between segments, at least 1; 1 is a linear cross-fade.
        seed: of the random shifts.
        batch_size: how many segments run at once; by default as many as suit the device.
        stems: the names of the stems to return, by default all; only the models of a bag that these need are run.
        two_stems: the name of one stem, to be returned together with the rest. Excludes `stems`.
        other_method: how the rest of `two_stems` is made: "add" adds up the other stems, "minus" subtracts the stem
            from the mix, "none" leaves the rest out.
        mode: "full", or "time_only" for the waveform branch alone, see `InferenceMode`.

    Attributes:
        model: the model.
        stems: the names of the stems that it returns.

    Raises:
        ValueError: if an argument is out of range, or if the model is not one that separates.
        OSError: if the model cannot be read.
    """

    def __init__(
        self,
        model: str | Path | HTDemucs | Bag = "htdemucs",
        *,
        shifts: int = 1,
        overlap: float = 0.25,
        segment: float | None = None,
        transition_power: float = 1.0,
        seed: int = 0,
        batch_size: int | None = None,
        stems: Sequence[str] | None = None,
        two_stems: str | None = None,
        other_method: OtherMethod = "add",
        mode: Mode = InferenceMode.FULL,
    ) -> None:
        names = (stems, two_stems, other_method)
        self.options = Options(
            shifts, overlap, segment, transition_power, seed, batch_size, *names, mode=InferenceMode(mode)
        )
        found = model if isinstance(model, (HTDemucs, Bag)) else load(model)
        if not isinstance(found, (HTDemucs, Bag)):
            kind = type(found).__name__
            hint = " (mlx-xformer generate?)" if kind == "CausalLM" else ""
            raise ValueError(f"{model}: must be a model that separates, got a {kind}{hint}")
        self.model = found
        for member in get_members(self.model)[0]:
            self.options.check(member.config)
        self.stems = self.options.names(self.model.config.sources)

    def separate(
        self,
        audio: Audio,
        sample_rate: int,
        *,
        progress: Callable[[Progress], None] | None = None,
        cancel: Event | None = None,
    ) -> dict[str, Audio]:
        """Separates audio into its stems.

        The audio is brought to the model's sample rate and channels, to mean 0 and deviation 1, and the stems back to
        its level.

        Args:
            audio: (channels, samples), or mono (samples,), of floats with full scale at -1 and 1.
            sample_rate: of `audio`, in Hz.
            progress: called with a `Progress` after each batch of segments.
            cancel: an event that ends the separation after the current batch when it is set.

        Returns:
            For each stem, (channels, samples) at the model's sample rate: MLX arrays for an MLX array, NumPy arrays for
            a NumPy array.

        Raises:
            ValueError: if the audio has no samples, is not finite or has another shape.
            Cancelled: if `cancel` was set.
        """
        host = np.asarray(audio.astype(mx.float32)) if isinstance(audio, mx.array) else audio
        run = Run(self.model, self.options, Recording.from_array(host, sample_rate), progress, cancel)
        whole = mx.concatenate(list(run.blocks()), axis=-1)
        stems = list(whole) if isinstance(audio, mx.array) else list(np.array(whole))
        mx.eval(stems)  # so that another thread may read them
        return cast("dict[str, Audio]", dict(zip(self.stems, stems, strict=True)))

    def stream(
        self,
        file: str | Path | Recording,
        *,
        progress: Callable[[Progress], None] | None = None,
        cancel: Event | None = None,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Separates a recording and gives out each stretch of its stems when it is finished, for example to play it.

        The recording is first read from end to end, to measure its level. The first stretch follows after the first
        segments. The memory needed does not grow with its length.

        Args:
            file: a file, or a recording that was opened already.
            progress: called with a `Progress` after each batch of segments.
            cancel: an event that ends the separation after the current batch when it is set.

        Returns:
            An iterator over the stretches, in order: for each stem, float32 (channels, n) at the model's sample rate.
            Joined together they are the samples that `separate_file` writes with `Output(bits=32, clip="none")`.

        Raises:
            ValueError: if the file is not audio.
            OSError: if it cannot be read.
            Cancelled: while iterating, if `cancel` was set.
        """
        run = Run(self.model, self.options, Recording.open(file), progress, cancel)
        return (dict(zip(self.stems, np.array(block), strict=True)) for block in run.blocks())

    def separate_file(
        self,
        file: str | Path,
        folder: str | Path,
        output: Output | None = None,
        *,
        recording: Recording | None = None,
        strict: bool = False,
        below: str = "",
        tags: Tags | None = None,
        progress: Callable[[Progress], None] | None = None,
        cancel: Event | None = None,
    ) -> Separated:
        """Separates a file into files. The memory needed does not grow with its length.

        Args:
            file: the recording.
            folder: where the files go, in folders and under names that `output` chooses.
            output: the format and names of the files, and what keeps them from clipping.
            recording: read instead of the file, whose name still names the stems.
            strict: refuses a damaged recording, which is otherwise read over the damage, with a warning in the result.
            below: what {folder} means in the files' names: the recording's folder below the one that was searched.
            tags: what the stems' files tell about the recording; by default what the file does.
            progress: called with a `Progress` after each batch of segments.
            cancel: an event that ends the separation after the current batch when it is set.

        Returns:
            What was written. All files are put in place together at the end; after a failure or a cancellation nothing
            is left behind.

        Raises:
            ValueError: if the file is not audio, if the format cannot hold its stems, if a stem would overwrite it, or,
                with `strict`, if it is damaged.
            OSError: if a file cannot be read or written.
            Cancelled: if `cancel` was set.
        """
        file, output, start = Path(file), output or Output(), time.perf_counter()
        recording = recording or Recording.open(file)
        tags = tags or read_tags(file)
        targets = list_targets(output, Path(folder), file, self.stems, below, tags)
        run = Run(self.model, self.options, recording, progress, cancel)
        if strict and run.warnings:
            raise ValueError(f"{file}: {run.warnings[0]}")
        config = self.model.config
        channels = config.audio_channels
        rate = output.encoding.choose_rate(recording.sample_rate if output.rate == "keep" else config.samplerate)
        samples = run.count_samples(rate)
        bundle = (targets.stem_file, lambda: run.mix_blocks(rate)) if targets.stem_file else None
        with StemFiles(targets.stems, rate, channels, samples, output, tags=tags, stem_file=bundle) as files:
            for block in run.resampled_blocks(rate):
                files.write(dict(zip(targets.stems, block, strict=True)))
            gains = files.commit()
        seconds = run.recorded / recording.sample_rate
        took = time.perf_counter() - start
        return Separated(targets.stems, seconds, took, rate, channels, samples, gains, run.warnings, targets.stem_file)


def separate(
    model: HTDemucs | Bag,
    audio: Audio,
    sample_rate: int,
    *,
    shifts: int = 1,
    overlap: float = 0.25,
    segment: float | None = None,
    transition_power: float = 1.0,
    seed: int = 0,
    batch_size: int | None = None,
    stems: Sequence[str] | None = None,
    two_stems: str | None = None,
    other_method: OtherMethod = "add",
    mode: Mode = InferenceMode.FULL,
    progress: Callable[[Progress], None] | None = None,
    cancel: Event | None = None,
) -> dict[str, Audio]:
    """Separates audio into its stems with a model that is loaded already.

    Args:
        model: a model, or a bag of several.
        audio: (channels, samples), or mono (samples,), of floats with full scale at -1 and 1.
        sample_rate: of `audio`, in Hz.
        shifts: see `Separator`, as for all arguments up to `mode`.
        overlap: the part of a segment that it shares with the next one.
        segment: the seconds of a segment.
        transition_power: the exponent of the cross-fade between segments.
        seed: of the random shifts.
        batch_size: how many segments run at once.
        stems: the names of the stems to return.
        two_stems: the name of one stem, to be returned together with the rest.
        other_method: how the rest of `two_stems` is made.
        mode: "full" or "time_only".
        progress: called with a `Progress` after each batch of segments.
        cancel: an event that ends the separation after the current batch when it is set.

    Returns:
        For each stem, (channels, samples) at the model's sample rate: MLX arrays for an MLX array, NumPy arrays for a
        NumPy array.

    Raises:
        ValueError: if an argument is out of range, or if the audio has no samples or is not finite.
        Cancelled: if `cancel` was set.
    """
    separator = Separator(
        model,
        shifts=shifts,
        overlap=overlap,
        segment=segment,
        transition_power=transition_power,
        seed=seed,
        batch_size=batch_size,
        stems=stems,
        two_stems=two_stems,
        other_method=other_method,
        mode=mode,
    )
    return separator.separate(audio, sample_rate, progress=progress, cancel=cancel)
