"""How far a separation has come, on standard error."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ..separation.run import Progress

_INTERVAL = 0.3  # seconds between two lines


@contextmanager
def show_progress(file: Path, kind: Literal["bar", "json"]) -> Iterator[Callable[[Progress], None]]:
    """Gives a function that shows the progress of one recording: a bar, if this is a terminal, or lines of JSON."""
    if kind == "json":
        yield _Lines(file).print
        return
    from tqdm import tqdm

    with tqdm(desc=file.name, unit="segment", leave=False, disable=None) as bar:

        def update(now: Progress) -> None:
            bar.total = now.total
            bar.update(now.done - bar.n)

        yield update


class _Lines:
    """Prints a line of JSON, but no more than a few each second, and always one at the end."""

    def __init__(self, file: Path) -> None:
        self._file, self._last = str(file), -_INTERVAL

    def print(self, now: Progress) -> None:
        ended = now.done == now.total
        if not ended and time.monotonic() - self._last < _INTERVAL:
            return
        self._last = time.monotonic()
        done, remaining = round(now.done / now.total, 4), round(now.remaining, 1)
        event = {"event": "progress", "file": self._file, "done": done, "remaining_s": remaining}
        print(json.dumps(event), file=sys.stderr, flush=True)
