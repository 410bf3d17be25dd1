"""Recordings: audio files of any format, read in blocks and resampled.

Audio is a float32 NumPy array (channels, samples) with full scale at -1 and 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal
from warnings import warn as warn_user

import numpy as np

from . import containers, pcm
from .pcm import BLOCK, clock
from .resampling import convert_channels, downmix_weights, rechunk, resample_blocks
from .source import Source

Downmix = Literal["standard", "front"]
_UNKNOWN = 2**62  # the samples that libsndfile gives for a FLAC file without a length, as one written to a pipe
_MAX_CHANNELS = 64  # an array with more has probably its axes swapped
Warn = Callable[[str], None]


def _ignore(message: str) -> None:
    pass


@dataclass(frozen=True)
class Recording:
    """Audio that is read in blocks, any number of times.

    Args:
        sample_rate: in Hz.
        channels: of the audio.
        samples: per channel as the header tells, or None if the length is known only after reading everything.
        decode: a function that reads from the start: it yields float32 arrays (channels, n), and calls its argument at
            the end with one line for each kind of damage that was read over. NaN and infinite samples raise ValueError.
        downmix: (2, channels), the weights with which more than two channels are mixed to stereo; None to take the
            first two.
    """

    sample_rate: int
    channels: int
    samples: int | None
    decode: Callable[[Warn], Iterator[np.ndarray]]
    downmix: np.ndarray | None = field(default=None, compare=False)

    @staticmethod
    def open(source: str | Path | Recording, *, stream: int = 0, downmix: Downmix = "standard") -> Recording:
        """Opens a file that libsndfile or FFmpeg's libraries can read: wav, flac, mp3, m4a, the sound of a video.

        Uncompressed files and FLAC are read by libsndfile, everything else, and what libsndfile does not read to the
        end, by FFmpeg's libraries.

        Args:
            source: the file; a Recording is returned as it is.
            stream: which sound stream of a video, the first being 0.
            downmix: how more than two channels become stereo: "standard" mixes them by ITU-R BS.775, "front" takes the
                first two.

        Raises:
            OSError: if the file does not exist, is a folder or cannot be read.
            ValueError: if it is not audio or has no samples, or if there is no such stream.
        """
        if isinstance(source, Recording):
            return source
        return _open(Source.of_file(Path(source)), stream, downmix)

    @staticmethod
    def spool(
        file: IO[bytes], *, name: str = "standard input", stream: int = 0, downmix: Downmix = "standard"
    ) -> Recording:
        """Copies a stream of bytes, as standard input, into an unnamed temporary file and opens that as open() does.

        Args:
            file: what to read.
            name: for messages.
            stream: see open().
            downmix: see open().

        Raises:
            OSError: if the temporary file cannot be written.
            ValueError: see open().
        """
        return _open(Source.of_stream(file, name), stream, downmix)

    @staticmethod
    def from_array(audio: np.ndarray, sample_rate: int) -> Recording:
        """Makes a recording of an array.

        Args:
            audio: (channels, samples), or (samples,) for mono, of floats with full scale at -1 and 1.
            sample_rate: in Hz.

        Raises:
            ValueError: if the array has no samples, another shape or another dtype.
        """
        samples = np.asarray(audio)
        if not np.issubdtype(samples.dtype, np.floating):
            raise ValueError(f"audio must be floats with full scale at 1, got {samples.dtype}")
        samples = samples[None] if samples.ndim == 1 else samples
        if samples.ndim != 2 or samples.size == 0 or samples.shape[0] > _MAX_CHANNELS:
            raise ValueError(
                f"audio must be (channels, samples) with at least one sample and at most {_MAX_CHANNELS} channels, "
                f"got {samples.shape}"
            )
        starts = range(0, samples.shape[1], BLOCK)

        def decode(warn: Warn) -> Iterator[np.ndarray]:
            return _check_blocks((samples[:, at : at + BLOCK].astype(np.float32) for at in starts), "audio")

        return Recording(sample_rate, samples.shape[0], samples.shape[1], decode)

    def blocks(self, warn: Warn = _ignore) -> Iterator[np.ndarray]:
        """Reads the recording from the start.

        Args:
            warn: called at the end with one line for each kind of damage that was read over.

        Yields:
            Blocks (channels, n), float32.
        """
        return self.decode(warn)

    def cut(self, start: float = 0, end: float | None = None) -> Recording:
        """Returns a part of the recording.

        Args:
            start: of the part, in seconds.
            end: of the part, in seconds; by default that of the recording, as for an end beyond it.

        Raises:
            ValueError: if the part is empty; where the recording's length is not known, when it is read.
        """
        rate = self.sample_rate
        first, last = round(start * rate), None if end is None else round(end * rate)
        if first < 0 or (last is not None and last <= first):
            raise ValueError(f"start must be at least 0 and before end, got {start:g} and {end} s")
        late = f"start must be before the end of the recording, got {start:g} s of {{:.1f}} s"
        if self.samples is not None and first >= self.samples:
            raise ValueError(late.format(self.samples / rate))

        def decode(warn: Warn) -> Iterator[np.ndarray]:
            at = 0
            with closing(self.decode(warn)) as blocks:  # type: ignore[type-var]
                for block in blocks:
                    part = block[:, max(first - at, 0) : None if last is None else max(last - at, 0)]
                    at += block.shape[1]
                    if part.shape[1]:
                        yield part
                    if last is not None and at >= last:
                        return
            if at <= first:
                raise ValueError(late.format(at / rate))

        known = [count for count in (self.samples, last) if count is not None]
        samples = None if self.samples is None else min(known) - first
        return Recording(rate, self.channels, samples, decode, self.downmix)

    def convert_blocks(self, channels: int, sample_rate: int) -> Iterator[np.ndarray]:
        """Reads the recording with another number of channels (see convert_channels) and another sample rate.

        Args:
            channels: of the blocks.
            sample_rate: of the blocks, in Hz.

        Yields:
            Blocks (channels, n); n is BLOCK, except in the last one.
        """
        blocks = (convert_channels(block, channels, self.downmix) for block in self.blocks())
        return rechunk(resample_blocks(blocks, channels, self.sample_rate, sample_rate), BLOCK)


def read(path: str | Path, *, strict: bool = False) -> tuple[np.ndarray, int]:
    """Reads an audio file of any format that libsndfile or FFmpeg's libraries know.

    What is damaged is read over, with a UserWarning that tells how much is lost and where.

    Args:
        path: the file.
        strict: refuses a damaged file instead.

    Returns:
        The audio, float32 (channels, samples) with full scale at -1 and 1, and its sample rate in Hz.

    Raises:
        OSError: if the file does not exist, is a folder or cannot be read.
        ValueError: if it is not audio, has no samples, or has NaN or infinite ones.
    """
    recording = Recording.open(path)
    warnings: list[str] = []
    audio = np.concatenate(list(recording.blocks(warnings.append)), axis=1)
    for message in warnings:
        if strict:
            raise ValueError(f"{path}: {message}")
        warn_user(f"{path}: {message}", stacklevel=2)
    return audio, recording.sample_rate


def _open(source: Source, stream: int, downmix: Downmix) -> Recording:
    found = pcm.inspect(source) if stream == 0 else None
    # FFmpeg trusts the size in the header.
    header = containers.describe(source) if found and found.start is None else None
    if found and header and found.container != "FLAC" and not header.codec.startswith("pcm_"):
        found = None  # as DTS in a WAV file
    longer = None
    if found and found.container == "FLAC":
        counted = containers.count_samples(source)
        if counted is not None and counted > found.samples:
            longer = f"its header counts {found.samples} samples of {counted}: read to the end of the file"
        found = None if longer or found.samples >= _UNKNOWN else found
    if found and not found.samples:
        try:
            return _open_stream(source, stream, downmix)
        except ValueError:
            raise ValueError(f"{source.name} holds no samples") from None
    if not found:
        return _open_stream(source, stream, downmix, longer)
    weights = _weigh(found.channels, header.layout if header else "", downmix)
    known, promised = found, header.promised if header else None

    def decode(warn: Warn) -> Iterator[np.ndarray]:
        return _check_blocks(_read_pcm(source, known, promised, warn), source.name)

    return Recording(found.sample_rate, found.channels, found.samples, decode, weights)


def _read_pcm(source: Source, found: pcm.PCM, promised: float | None, warn: Warn) -> Iterator[np.ndarray]:
    """What libsndfile reads, and from where it fails on, what FFmpeg reads."""
    done = 0
    for block in pcm.read_blocks(source, found):
        done += block.shape[1]
        yield block
    if found.warning:
        warn(found.warning)
    elif promised is not None and promised > found.samples / found.sample_rate + containers.LATE:
        ends = clock(found.samples / found.sample_rate)
        warn(f"the file ends at {ends}, where its header promises {clock(promised)}")
    if done == found.samples:
        return
    told: list[str] = []
    at = 0
    try:
        for block in containers.read_blocks(source, 0, told.append):
            rest = block[:, max(done - at, 0) :]
            at += block.shape[1]
            if rest.shape[1]:
                yield rest
    except ValueError:
        told.append(f"the file cannot be read beyond {clock(done / found.sample_rate)}")
    failed = (clock(sample / found.sample_rate) for sample in (done, done + BLOCK))
    for message in told or ["the sound is damaged between {} and {}".format(*failed)]:
        warn(message)


def _open_stream(source: Source, stream: int, downmix: Downmix, warning: str | None = None) -> Recording:
    found = containers.inspect(source, stream)

    def decode(warn: Warn) -> Iterator[np.ndarray]:
        if warning:
            warn(warning)
        return _check_blocks(rechunk(containers.read_blocks(source, stream, warn), BLOCK), source.name)

    weights = _weigh(found.channels, found.layout, downmix, *found.levels)
    return Recording(found.sample_rate, found.channels, None, decode, weights)


def _weigh(channels: int, layout: str, downmix: Downmix, *levels: float) -> np.ndarray | None:
    """How channels are mixed to stereo; a layout without a name is the usual one of its number of channels."""
    if channels < 3 or downmix == "front":
        return None
    return downmix_weights(f"{channels}c" if not layout or layout.endswith("channels") else layout, *levels)


def _check_blocks(blocks: Iterable[np.ndarray], name: object) -> Iterator[np.ndarray]:
    """Yields the blocks. Raises ValueError at one that is not finite, and at the end if there were no samples."""
    found = False
    for block in blocks:
        if not np.isfinite(block).all():
            what = "audio must be finite, got" if name == "audio" else f"{name} holds"
            raise ValueError(f"{what} NaN or infinite samples")
        found = found or block.shape[1] > 0
        yield block
    if not found:
        raise ValueError(f"{name} holds no samples")
