"""STEM files: the mix and four stems in one MP4 file, as Native Instruments defined them and DJ programs play them.

The first track is the mix, which other players play alone. The box `stem` in the user data of the whole file holds the
stems' names and colours as JSON. Source: https://www.native-instruments.com/en/specials/stems (Stem Creator's files).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence

import numpy as np

from ..audio.encode import Encoding, choose_codec
from ..audio.encoders import ContainerEncoder
from ..audio.sink import Sink
from ..audio.tags import Tags

STEM_SUFFIX = ".stem.mp4"
_STEMS = 4
_MAX_CHANNELS = 8
_COLORS = ("#009E73", "#D55E00", "#CC79A7", "#56B4E9")  # of drums, bass, other and vocals; told apart by everyone
_MASTERING = {  # without any effect on the sum of the stems
    "compressor": {
        "enabled": False,
        "ratio": 3,
        "output_gain": 0.5,
        "release": 0.3,
        "attack": 0.003,
        "input_gain": 0.5,
        "threshold": 0,
        "hp_cutoff": 300,
        "dry_wet": 50,
    },
    "limiter": {"enabled": False, "release": 0.05, "threshold": 0, "ceiling": -0.35},
}


def check_stems(stems: Sequence[str], sample_rate: int, channels: int, encoding: Encoding) -> None:
    """Checks that a STEM file can hold these stems.

    Args:
        stems: the stems' names.
        sample_rate: in Hz.
        channels: of each stem.
        encoding: of the stems' own files.

    Raises:
        ValueError: if it cannot.
    """
    if len(stems) != _STEMS:
        raise ValueError(f"a STEM file holds four stems, got {len(stems)}: {', '.join(stems)}")
    if not encoding.lossless:
        Encoding("m4a").check(sample_rate, channels)
    elif channels > _MAX_CHANNELS:
        raise ValueError(f"a STEM file holds at most {_MAX_CHANNELS} channels, got {channels}")


class StemEncoder:
    """Encodes a STEM file: losslessly (ALAC) for lossless formats, else as AAC.

    Args:
        sink: where it goes.
        sample_rate: in Hz.
        channels: of each track.
        stems: the stems' names.
        encoding: of the stems' own files.
        tags: of the recording.
    """

    def __init__(
        self, sink: Sink, sample_rate: int, channels: int, stems: Sequence[str], encoding: Encoding, tags: Tags
    ) -> None:
        self._sink, self._stems = sink, stems
        if encoding.lossless:
            codec = choose_codec("alac", 16 if encoding.bits == 16 else 24, None)
        else:
            aac = encoding if encoding.format == "m4a" else Encoding("m4a")
            codec = choose_codec("aac", 16, aac.choose_bitrate(sample_rate, channels))
        names = ("mix", *stems)
        self._encoder = ContainerEncoder(sink, "mp4", codec, sample_rate, channels, tags=tags, names=names)

    def write(self, *tracks: np.ndarray) -> None:
        """Appends (C, n) float samples to each track, the mix first."""
        self._encoder.write(*tracks)

    def close(self) -> None:
        """Finishes the file."""
        self._encoder.close()
        stems = [{"name": name, "color": color} for name, color in zip(self._stems, _COLORS, strict=True)]
        about = {"mastering_dsp": _MASTERING, "version": 1, "stems": stems}
        _add_user_data(self._sink, b"stem", json.dumps(about).encode())


def _add_user_data(file: Sink, kind: bytes, data: bytes) -> None:
    """Adds a box to moov/udta of an MP4 file whose moov comes last, so that no offset of samples changes."""
    end, start, size, name = file.seek(0, os.SEEK_END), 0, 0, b""
    while name != b"moov" and start + size < end:
        start += size
        file.seek(start)
        size, name, large = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
        size = large if size == 1 else size or end - start  # 1: the size follows; 0: to the end
    if name != b"moov" or start + size != end:
        raise OSError("the box moov is not the last one")
    file.seek(start)
    boxes = _split_boxes(file.read(size)[8:])
    held = b"".join(payload for name, payload in boxes if name == b"udta")
    boxes = [box for box in boxes if box[0] != b"udta"] + [(b"udta", held + _join_boxes([(kind, data)]))]
    file.seek(start)
    file.write(_join_boxes([(b"moov", _join_boxes(boxes))]))


def _split_boxes(data: bytes) -> list[tuple[bytes, bytes]]:
    """The names and payloads of boxes that follow one another."""
    boxes = []
    while data:
        size = struct.unpack(">I", data[:4])[0]
        boxes.append((data[4:8], data[8:size]))
        data = data[size:]
    return boxes


def _join_boxes(boxes: Sequence[tuple[bytes, bytes]]) -> bytes:
    return b"".join(struct.pack(">I4s", 8 + len(payload), name) + payload for name, payload in boxes)
