"""What the commands share."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


class Interrupted(KeyboardInterrupt):
    """Ctrl-C between two steps, when the caches are whole."""


@contextmanager
def between_steps(held_back: bool) -> Iterator[Callable[[], None]]:
    """Ctrl-C waits, if `held_back`, for a call of what this yields, or for the end; a second one does not wait."""
    asked = False

    def note(*_: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    def look() -> None:
        if asked:
            raise Interrupted

    usual = signal.getsignal(signal.SIGINT)
    ours = usual is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if not (held_back and ours):
        yield look
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield look
        look()
    finally:
        signal.signal(signal.SIGINT, usual)
