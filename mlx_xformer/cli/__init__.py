"""The command line, mlx-xformer: a module for each command."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from .._version import __version__
from ..backend import device
from . import convert, generate, info, parity, separate, separate_arguments
from .common import FAILURES, Help, describe_error, print_error


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: the command and its arguments, by default those of the process.

    Returns:
        The exit code: 0, 1 after a failure or 130 after Ctrl-C. Wrong usage exits with 2.
    """
    for stream in (sys.stdout, sys.stderr):  # what a terminal cannot show, as a title in other letters, is escaped
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments)
    if device.backend_error:
        return print_error(device.backend_error)
    try:
        code = options.run(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("mlx-xformer: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the program that read the output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except FAILURES as error:
        return print_error(describe_error(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx-xformer", description="Transformers and music source separation on MLX.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"mlx-xformer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, add_arguments, run, help_text in (
        ("separate", separate_arguments.add_arguments, separate.run, "separate songs into stems"),
        ("generate", generate.add_arguments, generate.run, "continue a text with a language model"),
        ("convert", convert.add_arguments, convert.run, "convert a checkpoint from or to PyTorch"),
        ("parity", parity.add_arguments, parity.run, "compare every layer, or a model, with NumPy on this machine"),
        ("info", info.add_arguments, info.run, "show the device and libraries, or what a model is"),
    ):
        command = commands.add_parser(name, help=help_text, formatter_class=Help, allow_abbrev=False)
        add_arguments(command)
        command.set_defaults(run=run)
    return parser
