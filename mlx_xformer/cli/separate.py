"""The command separate."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..backend import device
from .messages import Messages
from .progress import show_progress
from .songs import Song, list_songs, pass_over_own_stems, refuse_same_targets, select_share

if TYPE_CHECKING:
    from ..audio.recording import Recording
    from ..separation.separator import Separated, Separator
    from ..separation.stems import Output
    from ..separation.targets import Targets

DEMO_MODEL = "htdemucs_mini"
DEMO_NOTE = (
    f"{DEMO_MODEL} is a small model for demonstrations, trained on rendered music; for real songs use "
    "-n htdemucs (downloaded on first use, 84 MB)"
)
_SETTINGS = ("shifts", "overlap", "segment", "seed", "batch_size", "stems", "two_stems", "other_method")


def run(options: argparse.Namespace) -> int:
    """Separates all recordings; returns 1 if one of them failed."""
    from ..audio.files import check_writable
    from ..separation.options import Options
    from ..separation.separator import Separator
    from ..separation.stems import Output
    from ..separation.targets import list_targets

    # Errors that do not depend on the model come before it is loaded or downloaded.
    settings = {name: getattr(options, name) for name in _SETTINGS}
    Options(**settings)
    kind = (options.format, options.bits, options.mp3_bitrate, options.clip, options.rate, options.filename)
    output = Output(*kind, bitrate=options.bitrate, stem_file=options.stem_file)
    _check_files(options)
    check_writable(options.out)
    if options.device:
        device.use_device(options.device)
    group = device.process_group()
    rank, size = (group.rank(), group.size()) if group else (0, 1)
    if size > 1 and Path("-") in options.files:
        raise ValueError(f"files must not be standard input where {size} processes divide them, got -")
    messages = Messages(options.json, quiet=rank > 0)
    folder = options.out / _model_folder(options.name)
    songs = list_songs(options, (options.out, folder), messages)

    def targets(song: Song, stems: Iterable[str]) -> list[Path]:
        return list_targets(output, folder, song.path, stems, song.below).files

    songs = refuse_same_targets(songs, lambda song: targets(song, ["stem"])[0], output.filename, messages)
    done = 0
    if songs:
        separator = Separator(options.name, **settings)
        songs = pass_over_own_stems(songs, lambda song: targets(song, separator.stems), messages)
        messages.quiet = False
        for song in select_share(songs, rank, size):
            with messages.catch(song.path):
                print(_separate_song(separator, song, folder, output, options, messages), flush=True)
                done += 1
    if done and rank == 0 and options.name == DEMO_MODEL and not options.json:
        print(f"Note: {DEMO_NOTE}.")
    return int(bool(device.total(len(messages.failed), group)))


def _check_files(options: argparse.Namespace) -> None:
    """Checks what part of which file is read, and where stems go."""
    if options.out == Path("-"):
        raise ValueError("--out must be a folder, as stems are several files, got -")
    if options.end is not None and options.end <= options.start:
        raise ValueError(f"--end must be after --start, {options.start:g} s, got {options.end:g} s")
    if options.stream < 0:
        raise ValueError(f"--stream must be at least 0, got {options.stream}")


def _open_recording(song: Song, options: argparse.Namespace) -> Recording:
    """Opens a song, or standard input, or the part of it that is wanted."""
    from ..audio.recording import Recording

    if song.piped:
        if sys.stdin.isatty():
            raise ValueError("standard input is a terminal, and no recording is read from it")
        recording = Recording.spool(sys.stdin.buffer, stream=options.stream, downmix=options.downmix)
    else:
        recording = Recording.open(song.path, stream=options.stream, downmix=options.downmix)
    whole = options.start == 0 and options.end is None
    return recording if whole else recording.cut(options.start, options.end)


def _model_folder(name: str) -> str:
    """The name of the folder for a model's stems: that of its folder or file, or its name with "_" for "/"."""
    path = Path(name)
    if path.is_file():
        return path.stem
    return path.resolve().name if path.is_dir() else name.replace("/", "_")


def _separate_song(
    separator: Separator, song: Song, folder: Path, output: Output, options: argparse.Namespace, messages: Messages
) -> str:
    """Separates one recording, or passes over it; returns the lines to print."""
    from ..separation.targets import are_whole, list_targets

    recording = _open_recording(song, options)
    targets = list_targets(output, folder, song.path, separator.stems, song.below)
    page = None
    if options.report:
        page = output.path(folder, song.path, "report", "html", below=song.below, tags=targets.tags)
    wanted = [*targets.files, *([page] if page else [])]
    there = [path for path in wanted if path.is_file()]
    if options.skip_existing and there == wanted:
        config = separator.model.config
        if are_whole(targets, recording, config.samplerate, config.audio_channels, output):
            return _describe_skipped(song, targets, page, options)
    if there:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        messages.say(f"{song.path}: will replace {there[0]}{more}")
    start = time.perf_counter()
    with show_progress(song.path, options.progress) as progress:
        made = separator.separate_file(
            song.path,
            folder,
            output,
            below=song.below,
            recording=recording,
            strict=options.strict,
            progress=progress,
        )
    for warning in made.warnings:
        messages.say(f"{song.path}: {warning}")
    if page:
        _write_report(song, recording, folder, made, page, options, messages)
        made = dataclasses.replace(made, took=time.perf_counter() - start)  # the report included
    return _describe(song, made, page, options)


def _describe_skipped(song: Song, targets: Targets, page: Path | None, options: argparse.Namespace) -> str:
    """The line on a recording that was passed over."""
    if options.json:
        return _to_json(song, options, {"skipped": True}, targets.stems, targets.stem_file, page)
    return f"{_name_folders(targets.files)}: skipped {song.path}, all stems are there"


def _describe(song: Song, made: Separated, page: Path | None, options: argparse.Namespace) -> str:
    """The lines on a recording that was separated."""
    if options.json:
        return _to_json(song, options, dataclasses.asdict(made), made.files, made.stem_file, page)
    written = [*made.files.values(), *([made.stem_file] if made.stem_file else [])]
    lines = [
        f"{_name_folders(written)}: {', '.join(path.name for path in written)}",
        f"  {made.seconds:.1f} s of audio in {made.took:.1f} s ({made.seconds / made.took:.1f} times real time)",
    ]
    quieter = {stem: gain for stem, gain in made.gains.items() if gain < 1}
    if quieter:
        levels = ", ".join(f"{stem} {20 * math.log10(gain):.1f} dB" for stem, gain in quieter.items())
        lines.append(f"  turned down to avoid clipping: {levels}")
    return "\n".join([*lines, f"  {page}"] if page else lines)


def _to_json(
    song: Song,
    options: argparse.Namespace,
    facts: dict[str, Any],
    stems: dict[str, Path],
    stem_file: Path | None,
    page: Path | None,
) -> str:
    """The line of JSON on a recording."""
    files = {
        "files": {stem: str(path) for stem, path in stems.items()},
        "stem_file": stem_file and str(stem_file),
        "report": page and str(page),
    }
    return json.dumps({"file": str(song.path), "model": options.name, **facts, **files})


def _name_folders(files: Iterable[Path]) -> str:
    """The folders of files, in a line."""
    return ", ".join(sorted({str(path.parent) for path in files})) + os.sep


def _write_report(
    song: Song,
    mix: Recording,
    folder: Path,
    made: Separated,
    page: Path,
    options: argparse.Namespace,
    messages: Messages,
) -> None:
    """Writes the page of one song and adds it to the index of the output folder."""
    from tqdm import tqdm

    from ..separation.report.index import INDEX, add_song
    from ..separation.report.page import write_report

    facts = {
        "Model": options.name,
        "mlx-xformer": __version__,
        "Shifts": options.shifts,
        "Overlap": options.overlap,
        "Seed": options.seed,
        "Clip": options.clip,
    }
    with tqdm(desc=f"{song.path.name}: report", unit="section", leave=False, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        index = options.out / INDEX
        listed = write_report(page, mix, made.files, title=song.path.name, facts=facts, index=index, progress=progress)
    try:
        add_song(options.out, listed, folder.name)
    except FileExistsError as error:  # a page of the user's, which is kept
        messages.say(str(error))
