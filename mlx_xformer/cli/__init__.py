"""The command line: parses, calls, reports."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import runtime
from .._version import __version__
from . import generate, parity, separate
from .common import FAILURES, Help, fail, reason_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 for a failure, 2 for wrong usage, 130 for Ctrl-C."""
    options = _parser().parse_args(arguments)
    if runtime.backend_error:
        return fail(runtime.backend_error)
    try:
        code = options.run(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("mlx-xformer: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who read our output is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except FAILURES as error:
        return fail(reason_of(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlx-xformer", description="Transformers and music source separation on MLX.")
    parser.add_argument("--version", action="version", version=f"mlx-xformer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, add, run, what in (
        ("separate", separate.add, separate.run, "separate songs into stems"),
        ("generate", generate.add, generate.run, "continue a text with a language model"),
        ("convert", _add_convert, _convert, "convert a checkpoint from or to PyTorch"),
        ("parity", parity.add, parity.run, "prove every layer here, or a model, against NumPy"),
        ("info", _add_info, _info, "what runs here, or what a model is"),
    ):
        command = commands.add_parser(name, help=what, formatter_class=Help)
        add(command)
        command.set_defaults(run=run)
    return parser


def _add_convert(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="a checkpoint file, bag (.yaml), GGUF file or folder")
    add("out", type=Path, metavar="OUT", help="the folder to write")
    add("--to", choices=["mlx", "pytorch"], default="mlx", help="the layout to write")
    add("--family", metavar="F", help="the family of the source, where it is not recognised")
    add(
        "--quantize", type=int, choices=[0, 4, 8], help="bits of a language model's matrices, not of routers; 0: floats"
    )
    add("--group-size", type=int, choices=[32, 64, 128], default=64, help="numbers that share a scale")
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="of a language model's floats, if not as they are")
    add("--set", action="append", metavar="NAME=VALUE", help="what a file does not tell, as num_heads=8")
    add("--dry-run", action="store_true", help="report what would be written, write nothing")


def _convert(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ..converters.convert import convert

    names = ("family", "to", "dry_run", "quantize", "group_size", "dtype")
    with tqdm(desc=options.source.name, unit="tensor", leave=False, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        given = {name: getattr(options, name) for name in names}
        given["settings"] = dict(map(_setting, options.set or []))
        report = convert(options.source, options.out, **given, progress=progress)
    print(report)
    return 0


def _setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE; a value that is not JSON is text."""
    name, separator, value = text.partition("=")
    if not name or not separator:
        raise ValueError(f"--set must be NAME=VALUE, got {text!r:.80}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a model's name or checkpoint folder")


def _info(options: argparse.Namespace) -> int:
    if options.model is not None:
        from ..pretrained import describe

        print(describe(options.model))
        return 0
    report = runtime.report()
    print(f"mlx-xformer {__version__}, MLX {report.mlx}")
    print(f"device        {report.device} ({report.name})")
    kept = f"{report.cache_limit / 2**20:.0f} MiB"
    print(f"memory        {report.memory / 2**30:.1f} GiB, of freed memory MLX keeps at most {kept}")
    print(f"BLAS          {report.blas}")
    return 0
