"""What the commands say of one file after another: a line for each error, so that the other files are still read."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from .common import FAILURES, describe_error, print_error


@dataclass
class Messages:
    """Prints what happens to files, and keeps those that failed.

    Args:
        as_json: whether errors are printed to standard output too, as JSON.
        quiet: whether nothing is printed, because another process prints the same.
    """

    as_json: bool = False
    quiet: bool = False
    failed: list[Path] = field(default_factory=list)

    def say(self, line: str) -> None:
        """Prints a line to standard error."""
        if not self.quiet:
            print(f"mlx-xformer: {line}", file=sys.stderr)

    def fail(self, file: Path, error: Exception) -> None:
        """Reports an error with a file."""
        self.failed.append(file)
        reason = describe_error(error)
        if self.quiet:
            return
        if self.as_json:
            print(json.dumps({"file": str(file), "error": reason}), flush=True)
        print_error(reason if str(file) in reason else f"{file}: {reason}")

    @contextmanager
    def catch(self, file: Path) -> Iterator[None]:
        """Reports an error within the block; the command goes on after it."""
        try:
            yield
        except BrokenPipeError:
            raise
        except FAILURES as error:
            self.fail(file, error)
