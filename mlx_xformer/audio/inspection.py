"""What a file's header and end tell, without reading all of it."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import soundfile

from .source import FileForC


@dataclass(frozen=True)
class Measured:
    """The size of the audio in a file.

    Args:
        sample_rate: in Hz.
        channels: of the audio.
        samples: per channel.
    """

    sample_rate: int
    channels: int
    samples: int


def measure_file(path: Path) -> Measured | None:
    """Returns the size of the audio in a file; None if there is no such file, or if it is not complete.

    Args:
        path: a file that `write` or a separation has written.
    """
    try:
        with path.open("rb") as file:
            if _is_cut(file):
                return None
            if path.suffix in (".m4a", ".mp4"):
                return _measure_container(file)
            with soundfile.SoundFile(FileForC(file)) as found:
                found.seek(found.frames - 1)
                if not len(found.read(1)):
                    return None
                return Measured(found.samplerate, found.channels, found.frames)
    except (OSError, soundfile.LibsndfileError, TypeError):  # TypeError: a file without a header
        return None


def _measure_container(file: BinaryIO) -> Measured | None:
    """The same for MP4, by the header of its first sound stream."""
    import av

    try:
        with av.open(FileForC(file), mode="r", options={"protocol_whitelist": "none"}) as container:
            stream = container.streams.audio[0]
            if stream.duration is None or stream.time_base is None:
                return None
            return Measured(stream.rate, stream.channels, round(stream.duration * stream.time_base * stream.rate))
    except (av.error.FFmpegError, IndexError):
        return None


def _is_cut(file: BinaryIO) -> bool:
    """Whether a file is empty, or WAV, RF64 or MP4 and shorter than its header says, which readers may accept."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(28)
    file.seek(0)
    if head[:4] == b"RIFF":
        return size < struct.unpack("<I", head[4:8].ljust(4, b"\xff"))[0] + 8
    if head[:4] == b"RF64":
        return size < struct.unpack("<Q", head[20:28].ljust(8, b"\xff"))[0] + 8
    if head[4:8] == b"ftyp":
        return _find_end_of_boxes(file) != size
    return size == 0


def _find_end_of_boxes(file: BinaryIO) -> int:
    """Where the last of an MP4 file's boxes ends by its size; leaves the file at its first byte."""
    at = 0
    while len(head := file.read(16)) >= 8:
        size = struct.unpack(">I", head[:4])[0]
        if size == 1 and len(head) == 16:
            size = struct.unpack(">Q", head[8:])[0]
        if size < 8:  # no size that a file of ours has
            break
        at = file.seek(at + size)
    file.seek(0)
    return at
