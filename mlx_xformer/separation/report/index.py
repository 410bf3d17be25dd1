"""add_song(): the index page of a folder, which lists the songs whose report pages lie below it.

The page holds its list as JSON too, so that it can be extended when other songs are separated.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...storage.replacing import replace_file
from .markup import (
    choose_hues,
    clock,
    decibels,
    describe_audio,
    escape,
    fill_template,
    hash_inline,
    label,
    link,
    meter,
    read_part,
)

INDEX = "index.html"
_BEGIN, _END = '<script type="application/json" id="mlx-xformer-songs">', "</script>"


@dataclass(frozen=True)
class Levels:
    """The levels of the mix or of a stem.

    Args:
        name: "mix", or the stem's name.
        file: the stem's file, or None.
        peak_db: the peak in dBFS.
        rms_db: the RMS level in dBFS.
    """

    name: str
    file: Path | None
    peak_db: float
    rms_db: float


@dataclass(frozen=True)
class Song:
    """What the index says of a song.

    Args:
        page: the song's report page.
        title: of the song.
        seconds: its length.
        sample_rate: of the stems, in Hz.
        channels: of the stems.
        residual_db: the energy of the mix minus the sum of the stems over that of the mix, in dB.
        tracks: the levels of the mix and of each stem.
    """

    page: Path
    title: str
    seconds: float
    sample_rate: int
    channels: int
    residual_db: float
    tracks: tuple[Levels, ...]


def add_song(folder: str | Path, song: Song, model: str) -> Path:
    """Adds a song to the index page of a folder, or replaces what it says of the song.

    Songs whose report page is gone leave the list. The index is replaced as a whole; processes that add songs at the
    same time wait for one another.

    Args:
        folder: where the index lies.
        song: the song.
        model: the name of the model that separated it.

    Returns:
        The index page.

    Raises:
        FileExistsError: if the folder has an index.html of another kind, which is kept.
        OSError: if the index cannot be written.
    """
    folder = Path(folder)
    path = folder / INDEX
    with _lock(folder):
        songs = _read_songs(path)
        entry = _make_entry(folder, song, model)
        songs = {name: old for name, old in songs.items() if (folder / name).exists()} | {entry["page"]: entry}
        with replace_file(path) as out:
            out.write(_page([songs[name] for name in sorted(songs, key=_order)]).encode())
    return path


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Keeps other processes from changing the folder's index."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _order(page: str) -> tuple[str, str]:
    return page.casefold(), page


def _read_songs(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of an index by the paths of their pages; none if there is no index yet."""
    if not path.exists():
        return {}
    text = path.read_text("utf-8", "replace")
    found = text.partition(_BEGIN)[2].partition(_END)[0]
    try:
        return {entry["page"]: entry for entry in json.loads(found)["songs"]}
    except (ValueError, KeyError, TypeError):
        raise FileExistsError(f"{path} is not an index of separated songs: it is kept as it is") from None


def _make_entry(folder: Path, song: Song, model: str) -> dict[str, Any]:
    """A song as JSON. Paths are relative to the folder of the index; levels are text, since JSON has no infinity."""

    def shorten(path: Path | None) -> str | None:
        return None if path is None else os.path.relpath(path, folder)

    tracks = [
        {"name": t.name, "file": shorten(t.file), "peak_db": f"{t.peak_db:.2f}", "rms_db": f"{t.rms_db:.2f}"}
        for t in song.tracks
    ]
    return {
        "page": shorten(song.page),
        "title": song.title,
        "model": model,
        "seconds": song.seconds,
        "sample_rate": song.sample_rate,
        "channels": song.channels,
        "residual_db": f"{song.residual_db:.2f}",
        "tracks": tracks,
    }


def _page(songs: list[dict[str, Any]]) -> str:
    """The index page of all songs."""
    style = read_part("base.css") + read_part("index.css")
    count = f"{len(songs)} song{'s' if len(songs) != 1 else ''}"
    models = sorted({song["model"] for song in songs})
    fields = {
        "style": style,
        "style_hash": hash_inline(style),
        "about": f"{count} · {clock(sum(song['seconds'] for song in songs))} · {escape(', '.join(models))}",
        "songs": "\n".join(_row(song, len(models) > 1) for song in songs),
        "data": _BEGIN + json.dumps({"version": 1, "songs": songs}).replace("<", "\\u003c") + _END,
    }
    return fill_template(read_part("index.html"), fields)


def _row(song: dict[str, Any], with_model: bool) -> str:
    """The list item of one song."""
    about = describe_audio(song["seconds"], song["sample_rate"], song["channels"])
    album = "/".join(Path(song["page"]).parts[1:-2])  # between the model's folder and the song's
    if album:
        about = f"{escape(album)} · {about}"
    if with_model:
        about += f" · {escape(song['model'])}"
    mix, *stems = song["tracks"]
    hues = ["mix", *choose_hues([stem["name"] for stem in stems])]
    levels = "\n".join(_level(hue, track) for hue, track in zip(hues, [mix, *stems], strict=True))
    residual = decibels(float(song["residual_db"]), "dB")
    return f"""<li class="song">
<div class="name"><h2><a href="{link(song["page"], ".")}">{escape(song["title"])}</a></h2>
<p>{about}</p><p>Residual {residual}</p></div>
<ul class="stems" aria-label="Levels and files of {escape(song["title"])}">
{levels}
</ul>
</li>"""


def _level(hue: str, track: dict[str, Any]) -> str:
    """The level of one track, with a link to its file."""
    text = label(track["name"])
    if track["file"] is not None:
        about = f'title="{escape(os.path.basename(track["file"]))}"'
        text = f'<a href="{link(track["file"], ".")}" download target="_blank" rel="noopener" {about}>{text}</a>'
    rms, peak = float(track["rms_db"]), float(track["peak_db"])
    return f"""<li data-hue="{hue}"><span class="stem">{text}</span>{meter(rms, peak)}
<span class="level"><span class="hidden">RMS </span>{decibels(rms)}</span> \
<span class="level"><span class="hidden">peak </span>{decibels(peak)}</span></li>"""
