"""Error messages and help texts of all commands."""

from __future__ import annotations

import argparse
import sys

# MLX raises RuntimeError: for too little memory on the device, or no temporary folder to compile in.
FAILURES = (ValueError, OSError, RuntimeError, MemoryError)


def print_error(message: str) -> int:
    """Prints a message to standard error; returns the exit code of a failure."""
    print(f"mlx-xformer: {message}", file=sys.stderr)
    return 1


def describe_error(error: Exception) -> str:
    """Returns one line on an error, for users."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults of options that have one, and examples as they are written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        hidden = action.default in (None, []) or isinstance(action.default, bool)
        return action.help if hidden else super()._get_help_string(action)
