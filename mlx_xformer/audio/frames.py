"""The frames of a sound stream, as FFmpeg's libraries decode its packets.

Damaged packets are passed over and counted.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .pcm import clock
from .resampling import downmix_weights

Converter = Callable[[Any], list[np.ndarray]]

_TRIMMED = {"mov", "mp4"}  # containers whose last packet tells how much of it is sound
_GAP = 0.05  # seconds between packets that are no rounding of their times
_LATE_START = 60  # seconds


@dataclass
class Loss:
    """What was lost while a stream was decoded."""

    kinds: dict[str, list[float]] = field(default_factory=dict)  # how many, where the first is, seconds in all
    messages: list[str] = field(default_factory=list)

    def add(self, kind: str, at: float, seconds: float) -> None:
        """Adds something lost: what kind of thing, where in seconds, and how many seconds of sound."""
        found = self.kinds.setdefault(kind, [0, at, 0])
        found[0] += 1
        found[2] += seconds

    @property
    def seconds(self) -> float:
        """All seconds of sound that are lost."""
        return sum(found[2] for found in self.kinds.values())

    def describe(self) -> list[str]:
        """Returns one line for each kind."""
        lines = []
        for kind, (count, at, seconds) in self.kinds.items():
            what = f"1 {kind} at" if count == 1 else f"{count:.0f} {kind}s, the first at"
            lines.append(f"{what} {clock(at)}: about {seconds:.2f} s of sound are lost")
        return [*lines, *self.messages]


def decode_packets(container: Any, stream: Any, loss: Loss) -> Generator[Any, None, None]:
    """Yields the frames of a stream; what cannot be decoded is added to `loss`."""
    import av

    trims = bool(_TRIMMED & set(container.format.name.split(",")))
    held: list[Any] = []  # the frames of the packet before
    # Ogg counts samples from 0, so that a lost first page is seen; a recorded broadcast begins later.
    done, before, due = 0.0, None, 0 if container.format.name == "ogg" else None
    for packet in _demux(container, stream, loss):
        try:
            frames = stream.codec_context.decode(packet)
        except (av.error.FFmpegError, ValueError):
            frames = []
            if packet is not None and packet.size:
                loss.add("damaged packet", done, float((packet.duration or 0) * packet.time_base))
        if packet is None or not packet.size:  # the end
            yield from _trim(held, before) if trims and before is not None else held
            yield from frames
            return
        yield from held
        if packet.pts is not None and packet.duration:
            gap = 0 if due is None else float((packet.pts - due) * packet.time_base)
            if gap > _GAP and (due or gap < _LATE_START):
                loss.add("gap", done, gap)
            due = packet.pts + packet.duration
        done += sum(frame.samples / frame.sample_rate for frame in frames)
        held, before = frames, packet


def _demux(container: Any, stream: Any, loss: Loss) -> Iterator[Any]:
    """Yields the packets of a stream, and last an empty one or None."""
    import av

    ended = False
    try:
        for packet in container.demux(stream):
            ended = not packet.size
            yield packet
    except av.error.FFmpegError as error:
        loss.messages.append(f"the file cannot be read to its end: {error.strerror or error}")
    if not ended:
        yield None


def _trim(frames: list[Any], packet: Any) -> Iterator[Any]:
    """The frames of the last packet, without the encoder's padding."""
    if not packet.duration:
        yield from frames
        return
    for frame in frames:
        left = round(packet.duration * packet.time_base * frame.sample_rate)
        if len(frames) == 1 and 0 < left < frame.samples:
            yield _Cut(frame, left)
        else:
            yield frame


class _Cut:
    """The first samples of a frame."""

    def __init__(self, frame: Any, samples: int) -> None:
        self.samples, self.sample_rate, self.layout, self.format = (
            samples,
            frame.sample_rate,
            frame.layout,
            frame.format,
        )
        self.side_data = frame.side_data
        self._frame = frame

    def to_ndarray(self) -> np.ndarray:
        audio: np.ndarray = self._frame.to_ndarray()
        return audio[:, : self.samples * (1 if self.format.is_planar else self.layout.nb_channels)]


def to_array(frame: Any) -> np.ndarray:
    """A frame as (C, n) float32, full scale at -1 and 1."""
    audio = frame.to_ndarray()
    if not frame.format.is_planar:
        audio = audio.reshape(-1, frame.layout.nb_channels).T
    if audio.dtype == np.uint8:
        return (audio.astype(np.float32) - 128) / 128
    if np.issubdtype(audio.dtype, np.integer):
        return audio.astype(np.float32) * np.float32(2.0 ** (1 - 8 * audio.dtype.itemsize))
    return np.ascontiguousarray(audio, np.float32)


def make_converter(frame: Any, sample_rate: int, layout: str) -> Converter:
    """Returns a function that converts frames like `frame` to another rate and layout.

    Given None, it returns what it still holds. It raises ValueError where a frame cannot be converted.
    """
    import av

    if frame.sample_rate == sample_rate and layout == "stereo" and frame.layout.nb_channels > 2:
        weights = downmix_weights(frame.layout.name, *find_levels(frame))
        return lambda frame: [] if frame is None else [weights @ to_array(frame)]
    resampler = av.AudioResampler("fltp", layout, sample_rate)

    def convert(frame: Any) -> list[np.ndarray]:
        if frame is not None:
            frame.pts = None
        try:
            return [to_array(part) for part in resampler.resample(frame)]
        except av.error.FFmpegError as error:
            raise ValueError(str(error)) from None

    return convert


def find_levels(frame: Any) -> tuple[float, ...]:
    """The weights of the centre and of the surround channels that AC-3 and its kin have for a stereo mix."""
    for data in frame.side_data:
        # A number, then for two kinds of mixes the weight of the centre, and those of the surround channels.
        if str(data.type) == "Type.DOWNMIX_INFO":
            centre, _, surround = struct.unpack("=ddd", bytes(data)[8:32])
            return centre, surround
    return ()
