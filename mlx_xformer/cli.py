"""The command line: parses, calls, reports."""

from __future__ import annotations

import argparse
import os
import sys
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from . import runtime
from ._version import __version__

if TYPE_CHECKING:
    from .models.htdemucs import Bag, HTDemucs

DEMO_MODEL = "htdemucs_mini"
DEMO_NOTE = (
    f"{DEMO_MODEL} is a small model for demonstrations, trained on rendered music; for real songs use "
    "-n htdemucs (downloaded on first use, 84 MB)"
)


# A RuntimeError is MLX's: out of memory on the device, no temporary folder to compile in.
_FAILURES = (ValueError, OSError, RuntimeError, MemoryError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 for a failure, 2 for wrong usage, 130 for Ctrl-C."""
    options = _parser().parse_args(arguments)
    if runtime.backend_error:
        return _fail(runtime.backend_error)
    try:
        code = {"separate": _separate, "convert": _convert, "info": _info}[options.command](options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("mlx-xformer: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who read our output is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except _FAILURES as error:
        return _fail(_reason(error))


def _fail(message: str) -> int:
    print(f"mlx-xformer: {message}", file=sys.stderr)
    return 1


def _reason(error: Exception) -> str:
    """One line for the user."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlx-xformer", description="Music source separation on MLX.")
    parser.add_argument("--version", action="version", version=f"mlx-xformer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_separate(commands.add_parser("separate", help="separate songs into stems", formatter_class=_Help))
    convert = commands.add_parser("convert", help="convert a checkpoint from or to PyTorch", formatter_class=_Help)
    convert.add_argument("source", type=Path, metavar="SOURCE", help="a checkpoint file, bag (.yaml) or folder")
    convert.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    convert.add_argument("--to", choices=["mlx", "pytorch"], default="mlx", help="the layout to write")
    convert.add_argument("--family", metavar="F", help="the family of the source, where it is not recognised")
    convert.add_argument("--dry-run", action="store_true", help="report what would be written, write nothing")
    info = commands.add_parser("info", help="what runs here, or what a model is", formatter_class=_Help)
    info.add_argument("model", nargs="?", metavar="MODEL", help="a model's name or checkpoint folder")
    return parser


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def _add_separate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="FILE", help="audio files: wav, flac, mp3, ogg, ...")
    add("-n", "--name", default="htdemucs", metavar="NAME|DIR", help="model name, checkpoint folder or file")
    add("-o", "--out", type=Path, default=Path("separated"), metavar="DIR", help="where the stems go")
    add("--shifts", type=int, default=1, metavar="N", help="passes, each moved by a random part of 0.5 s, averaged")
    add("--overlap", type=float, default=0.25, metavar="F", help="part of a segment shared with the next")
    add("--segment", type=float, metavar="S", help="seconds per segment; at most, and by default, the model's own")
    add("--seed", type=int, default=0, metavar="N", help="seed of the random shifts")
    add("--bits", type=int, choices=[16, 24, 32], default=16, help="bits per sample; 32 is float")
    add("--report", action="store_true", help="also write report.html, to hear and see the stems together")
    add("--clip", choices=["rescale", "clamp", "none"], default="rescale", help="what keeps a stem from clipping")


def _separate(options: argparse.Namespace) -> int:
    from . import audio
    from .pretrained import load
    from .separate import Options

    how = Options(options.shifts, options.overlap, options.segment, seed=options.seed)
    audio.check_writable(options.out)
    failed = False
    tracks: dict[str, tuple[Path, str]] = {}
    for file in options.files:  # what can be known before the model is loaded, or downloaded, is said before
        with _reported(file) as problem:
            audio.check_readable(file)
            name = _track_name(file)
            # Some file systems take names that differ in case or in the form of an accent for the same.
            first = tracks.setdefault(unicodedata.normalize("NFC", name).casefold(), (file, name))[0]
            if first != file:
                raise ValueError(f"its stems would overwrite those of {first}")
        failed |= problem.happened
    if not tracks:
        return 1
    model = load(options.name)
    for member in getattr(model, "models", [model]):
        how.check(member.config)
    folder, lines = options.out / _model_folder(options.name), []
    for file, name in tracks.values():
        with _reported(file) as problem:
            lines = _separate_track(model, file, folder / name, options)
        failed |= problem.happened
        if not problem.happened:
            print("\n".join(lines), flush=True)
    if lines and options.name == DEMO_MODEL:
        print(f"Note: {DEMO_NOTE}.")
    return int(failed)


def _track_name(file: Path) -> str:
    """The folder of a track's stems: the file's name without what follows the last dot."""
    name = file.name.rsplit(".", 1)[0]
    if name in ("", ".", ".."):
        raise ValueError("the file's name leaves no name for the folder of its stems")
    return name


class _Problem:
    happened = False


@contextmanager
def _reported(file: Path) -> Iterator[_Problem]:
    """Turns what goes wrong with one file into a line, so that the other files go on."""
    problem = _Problem()
    try:
        yield problem
    except BrokenPipeError:
        raise
    except _FAILURES as error:
        problem.happened = True
        reason = _reason(error)
        _fail(reason if str(file) in reason else f"{file}: {reason}")


def _model_folder(name: str) -> str:
    """The folder that a model's stems go to: the name of its folder or file, or on the hub, "/" as "_"."""
    path = Path(name)
    if path.is_file():
        return path.stem
    return path.resolve().name if path.is_dir() else name.replace("/", "_")


def _separate_track(model: HTDemucs | Bag, file: Path, folder: Path, options: argparse.Namespace) -> list[str]:
    """Separates and writes one track; returns what there is to say of it."""
    import numpy as np
    from tqdm import tqdm

    from . import audio
    from .separate import separate

    samples, rate = audio.read(file)
    audio.check_writable(folder)
    start = time.perf_counter()
    with tqdm(desc=file.name, unit="segment", leave=False, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        stems = separate(
            model,
            samples,
            rate,
            shifts=options.shifts,
            overlap=options.overlap,
            segment=options.segment,
            seed=options.seed,
            progress=progress,
        )
        files = {
            folder / f"{stem}.wav": audio.prevent_clipping(np.array(array), options.clip)
            for stem, array in stems.items()
        }
    seconds, took = samples.shape[-1] / rate, time.perf_counter() - start
    audio.write_all(files, model.config.samplerate, bits=options.bits)
    lines = [
        f"{folder}{os.sep}: {', '.join(path.name for path in files)}",
        f"  {seconds:.1f} s of audio in {took:.1f} s ({seconds / took:.1f} times real time)",
    ]
    if options.report:
        lines.append(f"  {_write_report(file, folder, model.config.sources, options)}")
    return lines


def _write_report(file: Path, folder: Path, stems: Sequence[str], options: argparse.Namespace) -> Path:
    from .report import write_report

    facts = {
        "Model": options.name,
        "mlx-xformer": __version__,
        "Shifts": options.shifts,
        "Overlap": options.overlap,
        "Seed": options.seed,
        "Clip": options.clip,
    }
    page = folder / "report.html"
    write_report(page, file, {s: folder / f"{s}.wav" for s in stems}, title=file.name, facts=facts)
    return page


def _convert(options: argparse.Namespace) -> int:
    from .converters.convert import convert

    print(convert(options.source, options.out, family=options.family, to=options.to, dry_run=options.dry_run))
    return 0


def _info(options: argparse.Namespace) -> int:
    if options.model is not None:
        from .pretrained import describe

        print(describe(options.model))
        return 0
    report = runtime.report()
    print(f"mlx-xformer {__version__}, MLX {report.mlx}")
    print(f"device        {report.device} ({report.name})")
    print(f"memory        {report.memory / 2**30:.1f} GiB, MLX keeps at most {report.cache_limit / 2**30:.1f} cached")
    print(f"BLAS          {report.blas}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
