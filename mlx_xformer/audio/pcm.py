"""Uncompressed files and FLAC, read by libsndfile: WAV, RF64, W64, AIFF, CAF.

What libsndfile does not read to the end is left to FFmpeg's libraries (see containers.py).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import soundfile

from .source import FileForC, Source

BLOCK = 2**16  # samples of a block
# Not AU: its header often has a size that is wrong, and FFmpeg reads to the end of the file.
_FORMATS = {"WAV", "WAVEX", "RF64", "W64", "AIFF", "CAF", "FLAC"}
_BYTES = {  # of one sample
    **dict.fromkeys(("PCM_S8", "PCM_U8", "ULAW", "ALAW"), 1),
    **{"PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8},
}
_UNKNOWN_SIZE = (0, 2**32 - 1)  # what recorders write before they know the size of the samples


@dataclass(frozen=True)
class PCM:
    """What libsndfile tells of a file.

    Args:
        container: libsndfile's name of the format, as "WAV".
        sample_rate: in Hz.
        channels: of the audio.
        samples: per channel.
        start: the first byte of the samples where libsndfile is not to look at the header.
        layout: libsndfile's names of the samples' type and order of bytes, with `start`.
        warning: what the header has wrong, or None.
    """

    container: str
    sample_rate: int
    channels: int
    samples: int
    start: int | None = None
    layout: tuple[str, str] = ("", "")
    warning: str | None = None


def inspect(source: Source) -> PCM | None:
    """Looks at a file; returns None if libsndfile is not to read it."""
    try:
        with source.open() as file, soundfile.SoundFile(FileForC(file)) as found:
            subtype = found.subtype
            pcm = PCM(found.format, found.samplerate, found.channels, found.frames)
    except (soundfile.LibsndfileError, TypeError):
        return None
    if pcm.container not in _FORMATS or (pcm.container != "FLAC" and subtype not in _BYTES):
        return None
    return _repair_wave(source, pcm, subtype) if pcm.container in ("WAV", "WAVEX") else pcm


def read_blocks(source: Source, pcm: PCM) -> Iterator[np.ndarray]:
    """Yields the samples, (C, n) float32, up to where libsndfile fails."""
    left = pcm.samples
    options: dict[str, Any] = {}
    if pcm.start is not None:
        subtype, endian = pcm.layout
        rate, channels = pcm.sample_rate, pcm.channels
        options = {"format": "RAW", "subtype": subtype, "endian": endian, "samplerate": rate, "channels": channels}
    with source.open(pcm.start or 0) as raw, soundfile.SoundFile(FileForC(raw), **options) as file:
        while left:  # its blocks() would add zeros to a truncated file
            try:
                block = file.read(min(BLOCK, left), dtype="float32", always_2d=True)
            except (soundfile.LibsndfileError, AssertionError):  # soundfile asserts that reading goes as it expects
                return
            if not len(block):
                return
            left -= len(block)
            yield np.ascontiguousarray(block.T)


def _repair_wave(source: Source, pcm: PCM, subtype: str) -> PCM:
    """Reads a WAV file by the size that it has where its header has another.

    A recorder that stopped early leaves 0 or 2**32 - 1; a file of 4 GiB and more has lost the upper bits.
    """
    chunk = _find_samples(source)
    if chunk is None:
        return pcm
    start, told, endian = chunk
    there, frame = source.size - start, pcm.channels * _BYTES[subtype]
    if told in _UNKNOWN_SIZE:
        size, what = there, "its header has no length: read to the end of the file"
    elif there >= 2**32:
        size, what = there - (there - told) % 2**32, "its header counts 4 GiB too few: read to the end of the file"
    elif told > there + 1:
        seconds = (clock(count // frame / pcm.sample_rate) for count in (there, told))
        return replace(pcm, warning="the file ends at {}, where its header promises {}".format(*seconds))
    else:
        return pcm
    if size == told or size < frame:
        return pcm
    return replace(pcm, samples=size // frame, start=start, layout=(subtype, endian), warning=what)


def _find_samples(source: Source) -> tuple[int, int, str] | None:
    """The first byte of a WAV file's samples, their size as the header has it, and the order of bytes."""
    with source.open() as file:
        head = file.read(12)
        if head[:4] not in (b"RIFF", b"RIFX") or head[8:12] != b"WAVE":
            return None
        endian = "<" if head[:4] == b"RIFF" else ">"
        at = 12
        while len(header := file.read(8)) == 8:
            size = struct.unpack(f"{endian}I", header[4:])[0]
            if header[:4] == b"data":
                return at + 8, size, "LITTLE" if endian == "<" else "BIG"
            at += 8 + size + size % 2
            file.seek(at)
    return None


def clock(seconds: float) -> str:
    """Formats a time as 0:04.2 or 1:02:03.4."""
    minutes, rest = divmod(round(seconds, 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02}:{rest:04.1f}" if hours else f"{minutes}:{rest:04.1f}"
