"""What the commands share."""

from __future__ import annotations

import argparse
import sys

# A RuntimeError is MLX's: out of memory on the device, no temporary folder to compile in.
FAILURES = (ValueError, OSError, RuntimeError, MemoryError)


def fail(message: str) -> int:
    """Says what went wrong, in one line; the exit code."""
    print(f"mlx-xformer: {message}", file=sys.stderr)
    return 1


def reason_of(error: Exception) -> str:
    """One line for the user."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)
