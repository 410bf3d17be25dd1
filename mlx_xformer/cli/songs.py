"""Which recordings the command separate works on: files, and what is found in folders."""

from __future__ import annotations

import argparse
import os
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .messages import Messages


@dataclass(frozen=True)
class Song:
    """A recording to separate.

    Args:
        path: its file.
        below: what {folder} stands for in its stems' names.
        named: whether the file was named on the command line; otherwise it was found in a folder.
        piped: whether it is standard input, whose file is called "stdin".
    """

    path: Path
    below: str = ""
    named: bool = True
    piped: bool = False


def list_songs(options: argparse.Namespace, skip: Sequence[Path], messages: Messages) -> list[Song]:
    """Returns the recordings that were named or are in folders that were named, each once.

    Args:
        options: those of the command.
        skip: folders that are passed over where they are found in a folder.
        messages: where what cannot be read is reported.
    """
    from ..audio.source import check_readable

    songs: dict[Path, Song] = {}
    prefixes = name_folders([given for given in options.files if given.is_dir()])
    for given in options.files:
        with messages.catch(given):
            if given == Path("-"):
                found = [Song(Path("stdin"), piped=True)]
            elif given in prefixes:
                found = _search(given, prefixes[given], options.recursive, skip, messages)
            else:
                found = [Song(given)]
            for song in found:
                with messages.catch(song.path):
                    if not song.piped:
                        check_readable(song.path)
                    key = Path("-") if song.piped else song.path.parent.resolve() / song.path.name
                    known = songs.get(key, song)
                    songs[key] = replace(known, named=known.named or song.named)
    return list(songs.values())


def _search(folder: Path, prefix: Path, recursive: bool, skip: Sequence[Path], messages: Messages) -> list[Song]:
    """The recordings in a folder."""
    from ..audio.folders import list_recordings

    def report(error: OSError) -> None:
        messages.fail(Path(error.filename), error)

    songs = []
    for file in list_recordings(folder, recursive, skip=skip, on_error=report):
        below = prefix / file.parent.relative_to(folder)
        songs.append(Song(file, "" if below == Path() else below.as_posix(), named=False))
    return songs


def name_folders(folders: Sequence[Path]) -> dict[Path, Path]:
    """Returns what {folder} begins with for the recordings of each folder.

    For a single folder that is nothing; for several, their names, with as many folders above as tell them apart.
    """
    parts = {folder: Path(os.path.abspath(folder)).parts[1:] for folder in folders}
    different = len(set(parts.values()))
    if different < 2:
        return dict.fromkeys(folders, Path())
    for depth in range(1, max(map(len, parts.values())) + 1):
        ends = {folder: Path(*names[-depth:]) for folder, names in parts.items()}
        if len({fold(path) for path in ends.values()}) == different:
            return ends
    return {folder: Path(*names) for folder, names in parts.items()}


def fold(path: Path | str) -> str:
    """A path such that those that some file systems take as equal are equal: in case, or an accent's encoding."""
    return unicodedata.normalize("NFC", str(path)).casefold()


def refuse_same_targets(
    songs: list[Song], target: Callable[[Song], Path], pattern: str, messages: Messages
) -> list[Song]:
    """Returns the songs but those whose stems would overwrite another's, which are reported.

    Args:
        songs: all of them.
        target: returns the path of a stem, in which the stem's name does not matter.
        pattern: that of the stems' names.
        messages: where errors are reported.
    """
    first: dict[str, Song] = {}
    for song in songs:
        with messages.catch(song.path):
            other = first.setdefault(fold(target(song)), song)
            if other is not song:
                raise ValueError(f"its stems would overwrite those of {other.path}: {_suggest(song, other, pattern)}")
    return list(first.values())


def _suggest(song: Song, other: Song, pattern: str) -> str:
    """What to do about two songs whose stems have the same names."""
    if song.below != other.below and "{folder}" not in pattern:
        return "add {folder} to --filename"
    if fold(song.path.suffix) != fold(other.path.suffix) and "{trackext}" not in pattern:
        return "add {trackext} to --filename"
    return "separate it with another --out"


def pass_over_own_stems(songs: list[Song], targets: Callable[[Song], list[Path]], messages: Messages) -> list[Song]:
    """Returns the songs but those that are stems of another one of them, and those whose stems would replace a song.

    A song that was found in a folder is passed over if it is one of the stems, all of them there, of another song: an
    earlier run wrote it. Otherwise a song whose stems would replace another song is refused.

    Args:
        songs: all of them.
        targets: returns the files that a song becomes.
        messages: where this is reported.
    """
    from ..separation.targets import identify

    by_file = {identify(song.path): song for song in songs if not song.piped}
    by_file.pop(None, None)
    stems: set[Song] = set()
    kept: list[Song] = []
    for song in songs:
        with messages.catch(song.path):
            found = [identify(path) for path in targets(song)]
            replaced = [by_file[file] for file in found if file in by_file]
            if all(found) and not any(other.named for other in replaced):
                stems.update(replaced)
            elif replaced:
                remedy = "choose another --out or --filename"
                raise ValueError(f"its stems would overwrite the recording {replaced[0].path}: {remedy}")
            kept.append(song)
    if passed := [song for song in kept if song in stems]:
        messages.say(f"passing over {len(passed)} files that are stems of an earlier run, such as {passed[0].path}")
    return [song for song in kept if song not in stems]


def select_share(songs: list[Song], rank: int, size: int) -> list[Song]:
    """The songs that this process, one of several, separates.

    Each file, largest first, goes to the process with the fewest bytes so far.
    """
    if size == 1:
        return songs
    loads, mine = [0] * size, []
    for song in sorted(songs, key=lambda song: (-song.path.stat().st_size, song.path)):
        least = loads.index(min(loads))
        loads[least] += song.path.stat().st_size
        mine += [song] if least == rank else []
    return mine
