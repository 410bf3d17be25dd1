"""Tags of recordings: title, artist, album, track number, date and cover."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal


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
