"""Compressed audio, and the sound of videos, decoded by FFmpeg's libraries packet by packet.

Damaged packets are passed over and counted. All of a stream comes in the rate and layout of its first frame, as the
ffmpeg program gives it, also where they change on the way.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from .frames import Converter, Loss, decode_packets, find_levels, make_converter, to_array
from .pcm import clock
from .source import FileForC, Source

_TIMED = {"mov", "mp4", "matroska", "asf", "flac", "wv", "ape", "tta", "aiff", "caf", "w64", "au"}  # tell their length
LATE = 0.25  # seconds that may miss from a promised length


@dataclass(frozen=True)
class Stream:
    """The sound stream of a file.

    Args:
        codec: FFmpeg's name of the codec.
        sample_rate: of the first frame, in Hz.
        channels: of the first frame.
        layout: FFmpeg's name of the first frame's channels, as "5.1(side)".
        levels: the weights of the centre and of the surround channels in a stereo mix, where the file has its own.
    """

    codec: str
    sample_rate: int
    channels: int
    layout: str
    levels: tuple[float, ...] = ()


def inspect(source: Source, stream: int = 0) -> Stream:
    """Opens a file and decodes its first frame.

    Args:
        source: the file.
        stream: which of its sound streams, the first being 0.

    Raises:
        ValueError: if FFmpeg cannot read the file, or if it has no such stream or no sound in it.
    """
    with _open(source, stream) as (container, chosen):
        frames = decode_packets(container, chosen, Loss())
        first = next(frames, None)
        frames.close()
        if first is None:
            raise ValueError(f"{source.name} holds no sound that can be decoded")
        layout = first.layout
        return Stream(chosen.codec_context.name, first.sample_rate, layout.nb_channels, layout.name, find_levels(first))


@dataclass(frozen=True)
class Header:
    """What the header of a file tells of its first sound stream.

    Args:
        codec: FFmpeg's name of the codec.
        layout: FFmpeg's name of the channels, as "5.1(side)".
        promised: its seconds, or None.
    """

    codec: str
    layout: str
    promised: float | None


def describe(source: Source) -> Header | None:
    """Looks at a file's header without decoding; returns None if FFmpeg cannot read it."""
    try:
        with _open(source, 0) as (container, chosen):
            codec = chosen.codec_context
            return Header(codec.name, codec.layout.name, _promised(source, container, chosen))
    except ValueError:
        return None


def count_samples(source: Source) -> int | None:
    """The samples of a file's first sound stream by the durations of its packets; None if FFmpeg cannot read it."""
    import av

    try:
        with _open(source, 0) as (container, chosen):
            packets = (packet for packet in container.demux(chosen) if packet.size)
            ticks = sum(packet.duration or 0 for packet in packets)
            return round(ticks * chosen.time_base * chosen.codec_context.sample_rate)
    except (ValueError, av.error.FFmpegError):
        return None


def read_blocks(source: Source, stream: int, warn: Callable[[str], None]) -> Iterator[np.ndarray]:
    """Decodes a stream.

    Args:
        source: the file.
        stream: which of its sound streams, the first being 0.
        warn: called at the end with a line for each kind of damage.

    Yields:
        (C, n) float32 in the rate and channels of the first frame.
    """
    loss, done, first, last = Loss(), 0, None, None
    convert: Converter | None = None  # from the rate and layout that frames have now
    for frame in _decode_parts(source, stream, loss):
        now = (frame.sample_rate, frame.layout.name)
        first, last = first or now, last or now
        if now != last:
            yield from convert(None) if convert else []
            convert = None if now == first else make_converter(frame, *first)
            last = now
        try:
            blocks = convert(frame) if convert else [to_array(frame)]
        except ValueError:
            loss.add("frame that cannot be converted", done / first[0], frame.samples / frame.sample_rate)
            continue
        done += sum(block.shape[1] for block in blocks)
        yield from blocks
    yield from convert(None) if convert else []
    for message in loss.describe():
        warn(message)


def _decode_parts(source: Source, stream: int, loss: Loss) -> Iterator[Any]:
    """Yields the frames of all parts of a file, and adds to `loss` where the file ends too early."""
    seconds, promised = 0.0, None
    for part in _find_parts(source):
        try:
            with _open(source, stream, *part) as (container, chosen):
                for frame in decode_packets(container, chosen, loss):
                    seconds += frame.samples / frame.sample_rate
                    yield frame
                promised = _promised(source, container, chosen)
        except ValueError:
            if not seconds:
                raise
            loss.messages.append(f"a part of the file, after {clock(seconds)}, cannot be read")
    if promised is not None and seconds + loss.seconds < promised - LATE:
        loss.messages.append(f"the file ends at {clock(seconds)}, where its header promises {clock(promised)}")


def _find_parts(source: Source) -> list[tuple[int, int]]:
    """The first and last byte of each part of a chained Ogg file; of other files, there is one part.

    FFmpeg's libraries do not read a later part whose rate or channels are not those of the first.
    """
    with source.open() as file:
        if file.read(4) != b"OggS":
            return [(0, source.size)]
        file.seek(0)
        starts, before, at, held = [], False, 0, b""
        while block := file.read(2**20):
            held += block
            for page in re.finditer(rb"OggS\0(.)", held, re.DOTALL):
                begins = bool(page[1][0] & 2)  # the first page of a stream; those of one part stand together
                if begins and not before:
                    starts.append(at + page.start())
                before = begins
            at += len(held) - 5
            held = held[-5:]
    return list(zip(starts, [*starts[1:], source.size], strict=True)) or [(0, source.size)]


@contextmanager
def _open(source: Source, stream: int, start: int = 0, end: int | None = None) -> Iterator[tuple[Any, Any]]:
    """The container of a file, or of a part of it, and one of its sound streams."""
    import av

    # FFmpeg gets an open file and may use no protocol, so that a playlist cannot make it open other files.
    with source.open(start, end) as file:
        try:
            container = av.open(FileForC(file), mode="r", options={"protocol_whitelist": "none"})
        except (av.error.FFmpegError, UnicodeDecodeError):
            raise ValueError(
                f"{source.name} cannot be read as audio: it is damaged, incomplete or of an unknown kind"
            ) from None
        with container:
            count = len(container.streams.audio)
            if not count:
                raise ValueError(f"no audio stream in {source.name}")
            if not 0 <= stream < count:
                raise ValueError(f"stream must be below {count}, the audio streams of {source.name}, got {stream}")
            chosen = container.streams.audio[stream]
            if chosen.codec_context is None:
                raise ValueError(f"{source.name} cannot be read as audio: its codec is unknown to FFmpeg")
            yield container, chosen


def _promised(source: Source, container: Any, stream: Any) -> float | None:
    """The seconds that a file's header promises; None where it tells none or only an estimate."""
    if stream.codec_context.name in ("mp3", "mp3float") and container.format.name == "mp3":
        return _promised_mp3(source, stream.codec_context.sample_rate)
    if not _TIMED & set(container.format.name.split(",")):
        return None
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is not None and len(container.streams) == 1:
        return float(container.duration / 1e6)
    return None


def _promised_mp3(source: Source, sample_rate: int) -> float | None:
    """The seconds by the count of frames in an MP3 file's Xing or Info tag, which stands in its first frame."""
    with source.open() as file:
        head = file.read(10)
        tag = sum((byte & 127) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=False))
        start = 10 + tag if head[:3] == b"ID3" else 0
        file.seek(start)
        frame = file.read(256)
    at = max(frame.find(b"Xing"), frame.find(b"Info"))
    if at < 0 or len(frame) < at + 12 or not frame[at + 7] & 1:
        return None
    return struct.unpack(">I", frame[at + 8 : at + 12])[0] * (1152 if sample_rate >= 32000 else 576) / sample_rate
