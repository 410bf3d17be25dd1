"""Folders of recordings: which files are recordings, by their names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

# The suffixes of files with sound that libsndfile or FFmpeg's libraries read. Raw samples (.raw, .pcm) are not here,
# because nothing in such a file tells its sample rate and channels.
_NAMES = """
wav wave bwf rf64 w64 aif aiff aifc caf au snd flac tta wv ape tak shn dsf dff
mp1 mp2 mp3 mpa mpga m2a ogg oga opus spx m4a m4b m4r aac adts ac3 eac3 ec3 dts dtshd mlp thd truehd
wma ra amr awb gsm mpc mka weba adx at3 aa3 oma
avr paf pvf sd2 sds sf ircam nist sph svx 8svx 16sv iff voc wve xi htk
mp4 m4v mov qt mkv webm avi mpg mpeg vob ts mts m2ts m2t 3gp 3g2 flv f4v wmv asf ogv ogm rm rmvb mxf nut divx
"""
SUFFIXES = frozenset(f".{name}" for name in _NAMES.split())


def list_recordings(
    folder: Path,
    recursive: bool = True,
    *,
    skip: Iterable[Path] = (),
    on_error: Callable[[OSError], None] | None = None,
) -> list[Path]:
    """Returns the files of a folder that are recordings by their suffixes, sorted by their paths.

    Hidden files and folders, whose names begin with a dot, are passed over. Links to folders are followed; a folder
    that is reached in several ways, or that holds a link to itself, is read once.

    Args:
        folder: the folder.
        recursive: whether the folders below are searched too, through all levels.
        skip: folders that are passed over where they are found below `folder`.
        on_error: called with the error of each folder below that cannot be read; by default that error is raised.

    Raises:
        OSError: if the folder, or without `on_error` one below, cannot be read.
        ValueError: if there are no recordings.
    """
    seen = {_identify(path) for path in skip if path.exists()} - {_identify(folder)}
    files = _list_files(folder, recursive, seen, on_error)
    # A link that leads nowhere is one of them: reading it tells so.
    found = [f for f in files if f.suffix.lower() in SUFFIXES and (os.path.isfile(f) or not os.path.exists(f))]
    if not found:
        raise ValueError(f"{folder} holds no recordings")
    return sorted(found)


def _list_files(
    folder: Path, recursive: bool, seen: set[tuple[int, int]], on_error: Callable[[OSError], None] | None
) -> Iterator[Path]:
    """Yields what is in a folder and below and is neither hidden nor a folder; folders of `seen` are passed over."""
    waiting, links = [folder], list[Path]()  # links come last, so that songs are found under their real paths
    while waiting or links:
        place = waiting.pop() if waiting else links.pop(0)
        try:
            if _identify(place) in seen:
                continue
            seen.add(_identify(place))
            names = sorted(os.listdir(place))
        except OSError as error:
            if on_error is None or place == folder:
                raise
            on_error(error)
            continue
        for path in (place / name for name in names if not name.startswith(".")):
            if not os.path.isdir(path):
                yield path
            elif recursive:
                (links if path.is_symlink() else waiting).append(path)


def _identify(path: Path) -> tuple[int, int]:
    """What is the same for all paths of a file or folder."""
    status = path.stat()
    return status.st_dev, status.st_ino
