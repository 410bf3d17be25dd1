"""Tags of recordings: title, artist, album, track number, date and cover."""

from __future__ import annotations

import dataclasses
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .source import FileForC

_ATTACHED_PICTURE = 1 << 10  # AV_DISPOSITION_ATTACHED_PIC
_KINDS: dict[str, Literal["jpeg", "png"]] = {"mjpeg": "jpeg", "png": "png"}
_MAX_TEXT = 1000  # characters
_MAX_COVER, _MAX_SIDE = 2**23, 10_000  # bytes, of which FLAC holds 2**24 and Ogg needs a third more; pixels


@dataclass(frozen=True)
class Cover:
    """A picture of a recording.

    Args:
        data: the bytes of a JPEG or PNG file.
        kind: "jpeg" or "png".
        width: in pixels.
        height: in pixels.
    """

    data: bytes
    kind: Literal["jpeg", "png"]
    width: int
    height: int


@dataclass(frozen=True)
class Tags:
    """What a recording tells about itself. A text that it does not tell is empty.

    Args:
        title: of the recording.
        artist: of the recording.
        album: on which it appeared.
        number: of the track on the album, such as "3" or "3/12".
        date: of publication, such as "1998" or "1998-05-18".
        cover: the picture on the front, or None.
    """

    title: str = ""
    artist: str = ""
    album: str = ""
    number: str = ""
    date: str = ""
    cover: Cover | None = None

    def of_stem(self, stem: str) -> Tags:
        """Returns the tags of one stem: "Title (vocals)" if the recording has a title, and the rest as it is."""
        return dataclasses.replace(self, title=f"{self.title} ({stem})") if self.title else self


def read_tags(path: str | Path) -> Tags:
    """Reads the tags of an audio file. What is broken or absent is left out; nothing is raised.

    Args:
        path: the file.
    """
    import av

    try:
        with Path(path).open("rb") as file:
            # FFmpeg gets an open file and may use no protocol, so that a playlist cannot make it open other files.
            options = {"protocol_whitelist": "none"}
            with av.open(FileForC(file), mode="r", options=options, metadata_errors="replace") as container:
                return _collect_tags(container)
    except (OSError, ValueError, av.error.FFmpegError):
        return Tags()


def _collect_tags(container: Any) -> Tags:
    """The tags of an open container. Ogg has them in its stream."""
    found: dict[str, str] = {}
    for place in (container, *container.streams.audio[:1]):
        found |= {name.lower(): text for name, text in place.metadata.items()}

    def get(*names: str) -> str:
        texts = (_clean(found.get(name, "")) for name in names)
        return next((text for text in texts if text), "")

    return Tags(
        title=get("title"),
        artist=get("artist", "album_artist"),
        album=get("album"),
        number=get("track"),
        date=get("date", "year"),
        cover=_find_cover(container),
    )


def _clean(text: str) -> str:
    """A text in one line, without control characters and of a length that every format can hold."""
    line = (" " if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in text)
    return "".join(line)[:_MAX_TEXT].strip()


def _find_cover(container: Any) -> Cover | None:
    """The first attached picture that is a JPEG or PNG."""
    for stream in container.streams.video:
        kind = _KINDS.get(stream.codec_context.name)
        sides = (stream.width, stream.height)
        if kind and stream.disposition.value & _ATTACHED_PICTURE and min(sides) > 0 and max(sides) <= _MAX_SIDE:
            packet = next((packet for packet in container.demux(stream) if packet.size), None)
            if packet is not None and packet.size <= _MAX_COVER:
                return Cover(bytes(packet), kind, *sides)
    return None
