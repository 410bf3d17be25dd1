"""Recordings: audio files of any format, read in blocks and resampled.

Audio is a float32 NumPy array (channels, samples) with full scale at -1 and 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import soundfile

from .resampling import convert_channels, rechunk, resample_blocks

BLOCK = 2**16  # samples of a block
_UNKNOWN = 2**62  # the samples that libsndfile gives for a FLAC file without a length, as one written to a pipe
_MAX_CHANNELS = 64  # an array with more has probably its axes swapped
_CONTAINERS = {".m4a", ".aac", ".mp4", ".mov", ".mkv", ".webm", ".wma", ".m4b", ".mka", ".avi", ".ac3", ".ape", ".wv"}
SUFFIXES = _CONTAINERS | {f".{name.lower()}" for name in soundfile.available_formats()} | {".aif", ".oga", ".opus"}


@dataclass(frozen=True)
class Recording:
    """Audio that is read in blocks, any number of times.

    Args:
        sample_rate: in Hz.
        channels: of the audio.
        samples: per channel, or None if the length is known only after reading everything.
        blocks: a function that reads from the start: it yields float32 arrays (channels, n). NaN and infinite samples
            raise ValueError.
    """

    sample_rate: int
    channels: int
    samples: int | None
    blocks: Callable[[], Iterator[np.ndarray]]

    @staticmethod
    def open(source: str | Path | Recording) -> Recording:
        """Opens a file that libsndfile or FFmpeg's libraries can read: wav, flac, mp3, m4a, the sound of a video.

        Args:
            source: the file; a Recording is returned as it is.

        Raises:
            OSError: if the file does not exist, is a folder or cannot be read.
            ValueError: if it is not audio or has no samples.
        """
        if isinstance(source, Recording):
            return source
        path = Path(source)
        check_readable(path)
        try:
            info = soundfile.info(path)
        except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: a file without a header
            info, reason = None, str(error).removeprefix(f"Error opening {str(path)!r}: ")
        if info is None or info.frames >= _UNKNOWN:
            found = _open_container(path)
            if found is None:
                reason = reason if info is None else "its header has no length"
                raise ValueError(f"{path} cannot be read as audio: {reason}")
            return found
        if not info.frames:
            raise ValueError(f"{path} holds no samples")
        return Recording(info.samplerate, info.channels, info.frames, lambda: _check_blocks(_read_blocks(path), path))

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

        def blocks() -> Iterator[np.ndarray]:
            return _check_blocks((samples[:, at : at + BLOCK].astype(np.float32) for at in starts), "audio")

        return Recording(sample_rate, samples.shape[0], samples.shape[1], blocks)

    def convert_blocks(self, channels: int, sample_rate: int) -> Iterator[np.ndarray]:
        """Reads the recording with another number of channels (see convert_channels) and another sample rate.

        Args:
            channels: of the blocks.
            sample_rate: of the blocks, in Hz.

        Yields:
            Blocks (channels, n); n is BLOCK, except in the last one.
        """
        blocks = (convert_channels(block, channels) for block in self.blocks())
        return rechunk(resample_blocks(blocks, channels, self.sample_rate, sample_rate), BLOCK)


def read(path: str | Path) -> tuple[np.ndarray, int]:
    """Reads an audio file of any format that libsndfile or FFmpeg's libraries know.

    Args:
        path: the file.

    Returns:
        The audio, float32 (channels, samples) with full scale at -1 and 1, and its sample rate in Hz.

    Raises:
        OSError: if the file does not exist, is a folder or cannot be read.
        ValueError: if it is not audio, has no samples, or has NaN or infinite ones.
    """
    recording = Recording.open(path)
    return np.concatenate(list(recording.blocks()), axis=1), recording.sample_rate


def check_readable(path: Path) -> None:
    """Checks that a file exists, before any work is done.

    Raises:
        FileNotFoundError: if it does not.
        IsADirectoryError: if it is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, not an audio file")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")


def list_recordings(folder: Path) -> list[Path]:
    """Returns the files of a folder that are recordings by their extensions, sorted.

    Raises:
        ValueError: if there are none.
    """
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file() and p.name[0] != ".")
    if not found:
        raise ValueError(f"{folder} holds no recordings")
    return found


def _read_blocks(path: Path) -> Iterator[np.ndarray]:
    try:
        with soundfile.SoundFile(path) as file:  # its blocks() would add zeros to a truncated file
            while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
                yield np.ascontiguousarray(block.T)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path} cannot be read as audio: {error.error_string}") from None


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


def _open_container(path: Path) -> Recording | None:
    """The first audio stream of a container, read by FFmpeg's libraries; None if there is none."""
    first = next(_decode_frames(path), None)
    if first is None:
        return None
    channels = first.layout.nb_channels

    def blocks() -> Iterator[np.ndarray]:
        import av

        # Planar floats with one layout and one rate, even if the stream changes them midway.
        convert = av.AudioResampler("fltp", first.layout, first.sample_rate)
        frames = _decode_frames(path)
        for frame in frames:
            yield from (part.to_ndarray() for part in convert.resample(frame))
        yield from (part.to_ndarray() for part in convert.resample(None))

    return Recording(first.sample_rate, channels, None, lambda: _check_blocks(rechunk(blocks(), BLOCK), path))


def _decode_frames(path: Path) -> Iterator[Any]:
    """Yields the decoded frames of the first audio stream; nothing if the file is not a container with one."""
    import av

    # FFmpeg gets an open file and may use no protocol, so that a playlist cannot make it open other files.
    with path.open("rb") as file:
        try:
            container = av.open(_File(file), mode="r", options={"protocol_whitelist": "none"})
        except (av.error.FFmpegError, UnicodeDecodeError):
            return
        with container:
            if not container.streams.audio:
                return
            try:
                yield from container.decode(container.streams.audio[0])
            except av.error.FFmpegError as error:
                raise ValueError(f"{path} cannot be read as audio: {error.strerror or error}") from None


class _File:
    """A file for PyAV whose seek() returns -1 instead of raising: PyAV prints exceptions that it cannot pass on."""

    def __init__(self, file: IO[bytes]):
        self.read, self.tell, self._seek = file.read, file.tell, file.seek

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return self._seek(offset, whence)
        except (OSError, ValueError):
            return -1
