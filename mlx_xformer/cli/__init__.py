"""The command line: parses, calls, reports."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .._version import __version__
from ..backend import device
from . import convert, generate, info, parity, separate
from .common import FAILURES, Help, fail, reason_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 for a failure, 2 for wrong usage, 130 for Ctrl-C."""
    options = _parser().parse_args(arguments)
    if device.backend_error:
        return fail(device.backend_error)
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
        ("convert", convert.add, convert.run, "convert a checkpoint from or to PyTorch"),
        ("parity", parity.add, parity.run, "prove every layer here, or a model, against NumPy"),
        ("info", info.add, info.run, "what runs here, or what a model is"),
    ):
        command = commands.add_parser(name, help=what, formatter_class=Help)
        add(command)
        command.set_defaults(run=run)
    return parser
