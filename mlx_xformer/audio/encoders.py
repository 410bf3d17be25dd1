"""Containers written by FFmpeg's libraries: several tracks, tags, a cover.

Axes: C channels, n samples of a block.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from .quantization import Bits, quantize
from .tags import Cover, Tags

_LAYOUTS = ("mono", "stereo", "3.0", "quad", "5.0", "5.1", "6.1", "7.1")  # of 1 to 8 channels, as FLAC orders them
_BITEXACT, _CODEC_BITEXACT = 1 << 10, 1 << 23  # AVFMT_FLAG_ and AV_CODEC_FLAG_BITEXACT: no versions, dates or chance
_ATTACHED_PICTURE = 1 << 10  # AV_DISPOSITION_ATTACHED_PIC
_DEFAULT = 1  # AV_DISPOSITION_DEFAULT
_PIXELS = {"jpeg": ("mjpeg", "yuvj420p"), "png": ("png", "rgb24")}


@dataclass(frozen=True)
class Codec:
    """An encoder of FFmpeg's libraries.

    Args:
        name: FFmpeg's name for it.
        sample_format: FFmpeg's name of what it takes, such as "s16" or, for one plane per channel, "fltp".
        bits: per sample; None for floats.
        bitrate: in kbit/s; None for lossless codecs.
        options: FFmpeg's names and values.
    """

    name: str
    sample_format: str
    bits: Bits | None = None
    bitrate: int | None = None
    options: Mapping[str, str] = field(default_factory=dict)


class ContainerEncoder:
    """Encodes tracks of equal sample rate, channels and length into one container.

    Args:
        file: a file object that can seek.
        container: FFmpeg's name of the container's format, or "m4a".
        codec: of all tracks.
        sample_rate: in Hz.
        channels: of each track, at most 8.
        tags: of the container.
        names: of the tracks; by default there is one without a name.

    Raises:
        ValueError: if FFmpeg's libraries lack the codec.
        av.error.FFmpegError: if they refuse or fail; so do the methods.
    """

    def __init__(
        self,
        file: Any,
        container: str,
        codec: Codec,
        sample_rate: int,
        channels: int,
        *,
        tags: Tags | None = None,
        names: Sequence[str] = ("",),
    ) -> None:
        import av

        self._file, self._codec, self._rate = file, codec, int(sample_rate)
        self._layout, self._done = _LAYOUTS[channels - 1], 0
        options = {}
        if container in ("mp4", "m4a"):  # they count a track's length, without the encoder's padding, in this unit
            options["movie_timescale"] = str(sample_rate)
        if container == "m4a":  # FFmpeg's own "ipod" takes no cover in PNG
            container, options["brand"] = "mp4", "M4A "
        self._container = av.open(file, "w", format=container, container_options=options)
        self._container.flags |= _BITEXACT
        tags = tags or Tags()
        self._container.metadata.update(name_comments(tags) if container == "opus" else _name_tags(tags))
        self._tracks = [self._add_track(name) for name in names]
        if tags.cover and container != "opus":
            self._add_cover(tags.cover)

    def write(self, *tracks: np.ndarray) -> None:
        """Appends (C, n) float samples to every track."""
        import av

        if not tracks[0].shape[1]:
            return
        for stream, audio in zip(self._tracks, tracks, strict=True):
            samples = self._convert(audio)
            data = samples if self._codec.sample_format.endswith("p") else samples.T.reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(data), self._codec.sample_format, self._layout)
            frame.sample_rate, frame.pts, frame.time_base = self._rate, self._done, Fraction(1, self._rate)
            self._container.mux(stream.encode(frame))
        self._done += tracks[0].shape[1]

    def close(self) -> None:
        """Finishes the container; the file stays open."""
        for stream in self._tracks:
            self._container.mux(stream.encode(None))
        self._container.close()
        if self._codec.name == "libmp3lame":
            _correct_mp3_padding(self._file, self._done, self._tracks[0].codec_context.frame_size)

    def _convert(self, audio: np.ndarray) -> np.ndarray:
        if self._codec.bits is None:
            return np.clip(audio, -1, 1).astype(np.float32, copy=False)
        return quantize(audio, self._codec.bits)

    def _add_track(self, name: str) -> Any:
        import av

        options = dict(self._codec.options)
        if self._codec.bits:
            options["bits_per_raw_sample"] = str(self._codec.bits)
        try:
            stream: Any = self._container.add_stream(self._codec.name, rate=self._rate, options=options)
        except av.codec.codec.UnknownCodecError:
            raise ValueError(f"FFmpeg's libraries were built without the encoder {self._codec.name}") from None
        stream.layout, stream.format = self._layout, self._codec.sample_format
        stream.time_base = Fraction(1, self._rate)
        stream.codec_context.flags |= _CODEC_BITEXACT
        if self._codec.bitrate:
            stream.bit_rate = 1000 * self._codec.bitrate
        if name:
            stream.metadata.update(title=name, handler_name=name)
        if not stream.index:  # players of one track play the first
            stream.disposition = _DEFAULT
        return stream

    def _add_cover(self, cover: Cover) -> None:
        """Adds the cover as FFmpeg has it: a video stream of one picture, that is encoded already."""
        import av

        codec, pixels = _PIXELS[cover.kind]
        stream: Any = self._container.add_stream(codec, rate=1, options={"strict": "unofficial"})
        stream.width, stream.height, stream.pix_fmt = cover.width, cover.height, pixels
        stream.disposition = _ATTACHED_PICTURE
        stream.metadata["comment"] = "Cover (front)"
        packet = av.Packet(cover.data)
        packet.stream, packet.pts, packet.dts, packet.time_base = stream, 0, 0, Fraction(1)
        self._container.mux(packet)


def _correct_mp3_padding(file: Any, samples: int, frame: int) -> None:
    """Corrects the padding at the end that the first frame of an MP3 file tells, in a tag that LAME invented.

    Where LAME ends with a frame of padding alone, FFmpeg counts the padding in that frame only. Source:
    http://gabriel.mp3-tech.org/mp3infotag.html

    Args:
        file: the file.
        samples: of the track, per channel.
        frame: samples of a frame.
    """
    file.seek(0)
    head = file.read(10)
    start = 10 + sum(byte << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=False))  # after ID3's tags
    file.seek(start)
    tag = bytearray(file.read(256))
    at = tag.find(b"Info")
    if at < 0:  # a Sink that keeps an error
        return
    frames = int.from_bytes(tag[at + 8 : at + 12], "big")
    delay = int.from_bytes(tag[at + 141 : at + 144], "big") >> 12
    tag[at + 141 : at + 144] = (delay << 12 | frames * frame - delay - samples).to_bytes(3, "big")
    tag[at + 154 : at + 156] = _crc16(bytes(tag[: at + 154])).to_bytes(2, "big")
    file.seek(start)
    file.write(tag)


def _crc16(data: bytes) -> int:
    """The cyclic redundancy check with the polynomial 0x8005, lowest bits first."""
    value = 0
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ 0xA001 * (value & 1)
    return value


def name_comments(tags: Tags) -> dict[str, str]:
    """Returns tags under the names that comments of Ogg files have, with the cover."""
    texts = _name_tags(tags)
    comments = {("tracknumber" if name == "track" else name).upper(): text for name, text in texts.items()}
    return comments | ({"METADATA_BLOCK_PICTURE": _pack_cover(tags.cover)} if tags.cover else {})


def _name_tags(tags: Tags) -> dict[str, str]:
    """The texts under FFmpeg's names for them."""
    texts = {"title": tags.title, "artist": tags.artist, "album": tags.album, "track": tags.number, "date": tags.date}
    return {name: text for name, text in texts.items() if text}


def _pack_cover(cover: Cover) -> str:
    """FLAC's picture block, in base64, as Ogg has it."""
    kind, depth = f"image/{cover.kind}".encode(), 24
    head = struct.pack(f">II{len(kind)}sI", 3, len(kind), kind, 0)  # 3: the cover on the front; no description
    size = struct.pack(">IIIII", cover.width, cover.height, depth, 0, len(cover.data))
    return base64.b64encode(head + size + cover.data).decode()
