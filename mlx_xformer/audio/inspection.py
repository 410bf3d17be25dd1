"""What a file's header and end tell, without reading all of it."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import soundfile


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
        if not path.is_file() or _is_cut(path):
            return None
        with path.open("rb") as file, soundfile.SoundFile(file) as found:
            found.seek(found.frames - 1)
            if not len(found.read(1)):
                return None
            return Measured(found.samplerate, found.channels, found.frames)
    except (OSError, soundfile.LibsndfileError, TypeError):  # TypeError: a file without a header
        return None


def _is_cut(path: Path) -> bool:
    """Whether a file is empty, or a WAV or RF64 file that is shorter than its header says (libsndfile takes it)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(28)
    if head[:4] == b"RIFF":
        return size < struct.unpack("<I", head[4:8].ljust(4, b"\xff"))[0] + 8
    if head[:4] == b"RF64":
        return size < struct.unpack("<Q", head[20:28].ljust(8, b"\xff"))[0] + 8
    return size == 0
