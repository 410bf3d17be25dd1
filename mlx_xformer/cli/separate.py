"""The command separate."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..backend import device
from .common import FAILURES, describe_error, print_error

if TYPE_CHECKING:
    from ..separation.run import Progress
    from ..separation.separator import Separated, Separator
    from ..separation.stems import Output

DEMO_MODEL = "htdemucs_mini"
DEMO_NOTE = (
    f"{DEMO_MODEL} is a small model for demonstrations, trained on rendered music; for real songs use "
    "-n htdemucs (downloaded on first use, 84 MB)"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add = parser.add_argument
    add(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="recordings, or folders of them: wav, flac, mp3, m4a, mp4 ...",
    )
    add("-n", "--name", default="htdemucs", metavar="NAME|DIR", help="model name, checkpoint folder or file")
    add("--list-models", action=_ListModels, help="list the models that have a name, and exit")
    add("-o", "--out", type=Path, default=Path("separated"), metavar="DIR", help="the output folder")
    _add_model_arguments(parser)
    _add_file_arguments(parser)


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds how the model is applied."""
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--stems",
        type=_parse_names,
        metavar="A,B",
        help="only these stems; a bag (several models, outputs averaged) runs only the models that they need",
    )
    what.add_argument("--two-stems", metavar="STEM", help="this stem, and the rest as --other-method makes it")
    add("--other-method", choices=["add", "minus", "none"], default="add", help=_REST)
    add(
        "--shifts",
        type=int,
        default=1,
        metavar="N",
        help="how many passes, each shifted by a random part of 0.5 s, are averaged",
    )
    add("--overlap", type=float, default=0.25, metavar="F", help="part of a segment shared with the next")
    add("--segment", type=float, metavar="S", help="seconds per segment; at most, and by default, the model's own")
    add("--seed", type=int, default=0, metavar="N", help="seed of the random shifts")
    add(
        "--batch-size",
        type=int,
        metavar="N",
        help="how many segments run at once; by default as many as suit device and memory",
    )
    add("--device", choices=["cpu", "gpu"], help="the device to compute on; by default the GPU if there is one")


def _add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds how stems are written, and what is printed."""
    add = parser.add_argument
    add("--format", choices=_FORMATS, default="wav", help="format of the stems' files")
    add("--bits", type=int, choices=[16, 24, 32], default=16, help="bits per sample of wav and flac; 32 is float wav")
    add("--bitrate", type=int, metavar="KBPS", help="kbit/s of mp3, ogg, opus or m4a; by default 320, 256, 192, 256")
    add("--mp3-bitrate", type=int, metavar="KBPS", help="the same, if the format is mp3")
    add("--clip", choices=["rescale", "joint", "clamp", "none"], default="rescale", help=_CLIP)
    add(
        "--rate",
        choices=["model", "keep"],
        default="model",
        help="sample rate of the stems: the model's, or the recording's",
    )
    add(
        "--filename",
        default="{folder}/{track}/{stem}.{ext}",
        metavar="PATTERN",
        help="pattern of {track}, {trackext}, {stem}, {ext}, {folder}, {artist}, {album}, {title}, {number}",
    )
    add("--stem-file", action="store_true", help="also write TRACK.stem.mp4: the mix and four stems for DJ programs")
    add("--report", action="store_true", help="also write an HTML page that plays and shows the stems together")
    add("--json", action="store_true", help="print a line of JSON for each recording")


_FORMATS = ["wav", "flac", "mp3", "ogg", "opus", "m4a"]
_REST = "the rest with --two-stems: the sum of the other stems, the mix minus the stem, or no file"
_CLIP = "against clipping: a gain for each stem, one gain for all (they still add up), limiting samples, or nothing"


def _parse_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


class _ListModels(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, help: str):
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from ..pretrained.summary import available

        for name, where in available().items():
            print(f"{name:15} {where}")
        parser.exit()


_SETTINGS = ("shifts", "overlap", "segment", "seed", "batch_size", "stems", "two_stems", "other_method")


def run(options: argparse.Namespace) -> int:
    """Separates all recordings; returns 1 if one of them failed."""
    from ..audio.files import check_writable
    from ..separation.options import Options
    from ..separation.separator import Separator
    from ..separation.stems import Output

    # Errors that do not depend on the model come before it is loaded or downloaded.
    settings = {name: getattr(options, name) for name in _SETTINGS}
    Options(**settings)
    kind = (options.format, options.bits, options.mp3_bitrate, options.clip, options.rate, options.filename)
    output = Output(*kind, bitrate=options.bitrate, stem_file=options.stem_file)
    check_writable(options.out)
    if options.device:
        device.use_device(options.device)
    group = device.process_group()
    rank, size = (group.rank(), group.size()) if group else (0, 1)
    failed: list[Path] = []
    folder = options.out / _model_folder(options.name)
    files = _list_files(options, folder, output, failed, quiet=rank > 0)
    done = 0
    if files:
        separator = Separator(options.name, **settings)
        for file in _select_share(files, rank, size):
            with _report_errors(file, options, failed):
                print(_separate_file(separator, file, folder, output, options), flush=True)
                done += 1
    if done and rank == 0 and options.name == DEMO_MODEL and not options.json:
        print(f"Note: {DEMO_NOTE}.")
    return int(bool(device.total(len(failed), group)))


def _list_files(
    options: argparse.Namespace, folder: Path, output: Output, failed: list[Path], *, quiet: bool
) -> list[Path]:
    """The recordings to separate. What cannot be separated is reported and added to `failed`."""
    from ..audio import folders, source

    files: list[Path] = []
    for given in options.files:
        with _report_errors(given, options, failed, quiet=quiet):
            files += folders.list_recordings(given) if given.is_dir() else [given]
    tracks: dict[str, Path] = {}
    for file in files:
        with _report_errors(file, options, failed, quiet=quiet):
            source.check_readable(file)
            target = str(output.path(folder, file, "stem"))
            # On some file systems names that differ in case or in an accent's encoding are the same.
            first = tracks.setdefault(unicodedata.normalize("NFC", target).casefold(), file)
            if first != file:
                raise ValueError(f"its stems would overwrite those of {first}")
    return list(tracks.values())


def _select_share(files: list[Path], rank: int, size: int) -> list[Path]:
    """The files that this process, one of several, separates.

    Each file, largest first, goes to the process with the fewest bytes so far.
    """
    if size == 1:
        return files
    loads, mine = [0] * size, []
    for file in sorted(files, key=lambda f: (-f.stat().st_size, f)):
        least = loads.index(min(loads))
        loads[least] += file.stat().st_size
        mine += [file] if least == rank else []
    return mine


@contextmanager
def _report_errors(
    file: Path, options: argparse.Namespace, failed: list[Path], *, quiet: bool = False
) -> Iterator[None]:
    """Reports an error with one file in a line, so that the other files are still separated."""
    try:
        yield
    except BrokenPipeError:
        raise
    except FAILURES as error:
        failed.append(file)
        reason = describe_error(error)
        if quiet:
            return
        if options.json:
            print(json.dumps({"file": str(file), "error": reason}), flush=True)
        print_error(reason if str(file) in reason else f"{file}: {reason}")


def _model_folder(name: str) -> str:
    """The name of the folder for a model's stems: that of its folder or file, or its name with "_" for "/"."""
    path = Path(name)
    if path.is_file():
        return path.stem
    return path.resolve().name if path.is_dir() else name.replace("/", "_")


def _separate_file(separator: Separator, file: Path, folder: Path, output: Output, options: argparse.Namespace) -> str:
    """Separates one recording; returns the lines to print."""
    from tqdm import tqdm

    start = time.perf_counter()
    with tqdm(desc=file.name, unit="segment", leave=False, disable=None) as bar:

        def progress(now: Progress) -> None:
            bar.total = now.total
            bar.update(now.done - bar.n)

        made = separator.separate_file(file, folder, output, progress=progress)
    page = _write_report(file, folder, made, output, options) if options.report else None
    made = dataclasses.replace(made, took=time.perf_counter() - start)  # the report included
    if options.json:
        paths = {stem: str(path) for stem, path in made.files.items()}
        result = {"file": str(file), "model": options.name, **dataclasses.asdict(made), "files": paths}
        result |= {"stem_file": made.stem_file and str(made.stem_file)}
        return json.dumps(result | {"report": page and str(page)})
    written = [*made.files.values(), *([made.stem_file] if made.stem_file else [])]
    names = sorted({str(path.parent) for path in written})
    lines = [
        f"{', '.join(names)}{os.sep}: {', '.join(path.name for path in written)}",
        f"  {made.seconds:.1f} s of audio in {made.took:.1f} s ({made.seconds / made.took:.1f} times real time)",
    ]
    quieter = {stem: gain for stem, gain in made.gains.items() if gain < 1}
    if quieter:
        levels = ", ".join(f"{stem} {20 * math.log10(gain):.1f} dB" for stem, gain in quieter.items())
        lines.append(f"  turned down to avoid clipping: {levels}")
    return "\n".join([*lines, f"  {page}"] if page else lines)


def _write_report(file: Path, folder: Path, made: Separated, output: Output, options: argparse.Namespace) -> Path:
    """Writes the page of one song and adds it to the index of the output folder; returns the page."""
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
    page = output.path(folder, file, "report", "html")
    with tqdm(desc=f"{file.name}: report", unit="section", leave=False, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        index = options.out / INDEX
        song = write_report(page, file, made.files, title=file.name, facts=facts, index=index, progress=progress)
    try:
        add_song(options.out, song, folder.name)
    except FileExistsError as error:  # a page of the user's, which is kept
        print_error(str(error))
    return page
