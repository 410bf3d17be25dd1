"""Recordings: read in blocks from any file, resampled on the way.

Audio is float32 NumPy, (channels, samples), full scale at -1 and 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import soundfile
import soxr

BLOCK = 2**16  # samples that are handled at a time
_UNKNOWN = 2**62  # frames: libsndfile's word for a FLAC file that was written to a pipe
_FASTEST = 10_000_000  # Hz
_MOST_CHANNELS = 64  # more are samples in the wrong axis
_CONTAINERS = {".m4a", ".aac", ".mp4", ".mov", ".mkv", ".webm", ".wma", ".m4b", ".mka", ".avi", ".ac3", ".ape", ".wv"}
SUFFIXES = _CONTAINERS | {f".{name.lower()}" for name in soundfile.available_formats()} | {".aif", ".oga", ".opus"}


@dataclass(frozen=True)
class Recording:
    """Audio read in blocks, as often as asked: every blocks() yields float32 (channels, n) from the start.

    samples is None where only reading to the end tells. Blocks are checked: NaN and Inf raise ValueError.
    """

    sample_rate: int
    channels: int
    samples: int | None
    blocks: Callable[[], Iterator[np.ndarray]]

    @staticmethod
    def of(source: str | Path | Recording) -> Recording:
        """A file that libsndfile reads, or FFmpeg's libraries: m4a, aac, the sound of a video.

        FileNotFoundError, IsADirectoryError; ValueError if it is not audio or is empty.
        """
        if isinstance(source, Recording):
            return source
        path = Path(source)
        check_readable(path)
        try:
            info = soundfile.info(path)
        except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: headerless formats that only a name tells
            info, reason = None, str(error).removeprefix(f"Error opening {str(path)!r}: ")
        if info is None or info.frames >= _UNKNOWN:
            found = _in_container(path)
            if found is None:
                reason = reason if info is None else "its header does not tell its length"
                raise ValueError(f"{path} cannot be read as audio: {reason}")
            return found
        if not info.frames:
            raise ValueError(f"{path} holds no samples")
        return Recording(info.samplerate, info.channels, info.frames, lambda: _checked(_blocks(path), path))

    @staticmethod
    def of_array(audio: np.ndarray, sample_rate: int) -> Recording:
        """(channels, samples) of floats, or (samples,) for mono. ValueError names what is wrong with it."""
        samples = np.asarray(audio)
        if not np.issubdtype(samples.dtype, np.floating):
            raise ValueError(f"audio must be floats with full scale at 1, got {samples.dtype}")
        samples = samples[None] if samples.ndim == 1 else samples
        if samples.ndim != 2 or samples.size == 0 or samples.shape[0] > _MOST_CHANNELS:
            raise ValueError(
                f"audio must be (channels, samples) with at least one sample and at most {_MOST_CHANNELS} channels, "
                f"got {samples.shape}"
            )
        starts = range(0, samples.shape[1], BLOCK)
        parts = lambda: (samples[:, start : start + BLOCK].astype(np.float32) for start in starts)  # noqa: E731
        return Recording(sample_rate, samples.shape[0], samples.shape[1], lambda: _checked(parts(), "audio"))

    def converted(self, channels: int, sample_rate: int) -> Iterator[np.ndarray]:
        """The blocks in other channels (see convert_channels) and at another rate, BLOCK samples each but the last."""
        blocks = (convert_channels(block, channels) for block in self.blocks())
        return rechunked(resampled(blocks, channels, self.sample_rate, sample_rate), BLOCK)


def read(path: str | Path) -> tuple[np.ndarray, int]:
    """The samples (channels, samples) and the sample rate of a file. Errors as Recording.of; NaN and Inf too."""
    recording = Recording.of(path)
    return np.concatenate(list(recording.blocks()), axis=1), recording.sample_rate


def check_readable(path: Path) -> None:
    """FileNotFoundError or IsADirectoryError, before any work is done."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, not an audio file")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")


def recordings_in(folder: Path) -> list[Path]:
    """The files of a folder that are recordings by their names, in order. ValueError if there are none."""
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file() and p.name[0] != ".")
    if not found:
        raise ValueError(f"{folder} holds no recordings")
    return found


def _blocks(path: Path) -> Iterator[np.ndarray]:
    try:
        with soundfile.SoundFile(path) as file:  # its blocks() would fill up what a cut-off file lacks
            while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
                yield np.ascontiguousarray(block.T)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path} cannot be read as audio: {error.error_string}") from None


def _checked(blocks: Iterable[np.ndarray], name: object) -> Iterator[np.ndarray]:
    """The blocks, as long as they are finite; at least one sample."""
    some = False
    for block in blocks:
        if not np.isfinite(block).all():
            what = "audio must be finite, got" if name == "audio" else f"{name} holds"
            raise ValueError(f"{what} NaN or infinite samples")
        some = some or block.shape[1] > 0
        yield block
    if not some:
        raise ValueError(f"{name} holds no samples")


def _in_container(path: Path) -> Recording | None:
    """The first sound stream of a container, by FFmpeg's libraries; None if they find none."""
    first = next(_frames(path), None)
    if first is None:
        return None
    channels = first.layout.nb_channels

    def blocks() -> Iterator[np.ndarray]:
        import av

        # Planes of floats in one layout and at one rate, also where a stream changes them on its way.
        convert = av.AudioResampler("fltp", first.layout, first.sample_rate)
        frames = _frames(path)
        for frame in frames:
            yield from (part.to_ndarray() for part in convert.resample(frame))
        yield from (part.to_ndarray() for part in convert.resample(None))

    return Recording(first.sample_rate, channels, None, lambda: _checked(rechunked(blocks(), BLOCK), path))


def _frames(path: Path) -> Iterator[Any]:
    """The decoded frames of the first sound stream; none if the file is not a container with one."""
    import av

    # From an open file, with no protocol allowed, a playlist cannot make FFmpeg open anything else.
    with path.open("rb") as file:
        try:
            container = av.open(_Quiet(file), mode="r", options={"protocol_whitelist": "none"})
        except (av.error.FFmpegError, UnicodeDecodeError):
            return
        with container:
            if not container.streams.audio:
                return
            try:
                yield from container.decode(container.streams.audio[0])
            except av.error.FFmpegError as error:
                raise ValueError(f"{path} cannot be read as audio: {error.strerror or error}") from None


class _Quiet:
    """A file for FFmpeg's libraries whose errors are their numbers: PyAV prints exceptions that it cannot pass on."""

    def __init__(self, file: IO[bytes]):
        self.read, self.tell, self._seek = file.read, file.tell, file.seek

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return self._seek(offset, whence)
        except (OSError, ValueError):
            return -1


def resample(audio: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """(channels, samples) at another sample rate, by libsoxr at very high quality."""
    _check_rates(from_rate, to_rate)
    if from_rate == to_rate:
        return audio
    return np.ascontiguousarray(soxr.resample(audio.T, from_rate, to_rate, quality="VHQ").T)


def _check_rates(from_rate: int, to_rate: int) -> None:
    for name, rate in (("from_rate", from_rate), ("to_rate", to_rate)):
        if not isinstance(rate, (int, np.integer)) or not 1 <= rate <= _FASTEST:
            raise ValueError(f"{name} must be a whole number of Hz from 1 to {_FASTEST}, got {rate!r}")


def resampled(blocks: Iterable[np.ndarray], channels: int, from_rate: int, to_rate: int) -> Iterator[np.ndarray]:
    """resample() for blocks (channels, n): the same samples bit for bit, in blocks (channels, m); m may be 0."""
    _check_rates(from_rate, to_rate)
    if from_rate == to_rate:
        yield from blocks
        return
    stream = soxr.ResampleStream(from_rate, to_rate, channels, dtype="float32", quality="VHQ")
    for block in blocks:
        yield np.ascontiguousarray(stream.resample_chunk(np.ascontiguousarray(block.T)).T)
    yield np.ascontiguousarray(stream.resample_chunk(np.zeros((0, channels), np.float32), last=True).T)


def rechunked(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same samples in blocks of `size`; the last may be shorter."""
    held: list[np.ndarray] = []
    count = 0
    for block in blocks:
        held.append(block)
        count += block.shape[1]
        if count < size:
            continue
        whole = np.concatenate(held, axis=1)
        for start in range(0, count - size + 1, size):
            yield whole[:, start : start + size]
        held = [whole[:, count - count % size :]]
        count %= size
    if count:
        yield np.concatenate(held, axis=1)


def convert_channels(audio: np.ndarray, channels: int) -> np.ndarray:
    """(c, samples) -> (channels, samples): mono is repeated, one channel is the mean, else the first are taken."""
    given = audio.shape[0]
    if given == channels:
        return audio
    if channels == 1:
        return audio.mean(axis=0, keepdims=True)
    if given == 1:
        return np.repeat(audio, channels, axis=0)
    if given < channels:
        raise ValueError(f"audio must be mono or have at least {channels} channels, got {given}")
    return audio[:channels]
