"""Plants bugs into the package one by one, in child processes, and tells which check noticed each.

A bug replaces a piece of a module's source that occurs there exactly once. A child (child.py) imports the package anew
for each bug, and its import system hands out the changed source. No file is changed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHILD = Path(__file__).with_name("child.py")
CHILDREN = 2  # at the same time
SHARE = 24  # bugs for one child
PATIENCE = 300  # seconds for one bug

Check = tuple[str, ...]


def parity(operation: str) -> Check:
    """`parity.run([operation])` must fail, and name the operation."""
    return "parity", operation


def tests(*nodes: str) -> Check:
    """pytest must fail in one of these tests: paths below the repository's root, or paths with ::names."""
    return "tests", *nodes


@dataclass(frozen=True)
class Bug:
    """A piece of a module's source, what is planted in its place, and the check that must notice.

    `module` is a dotted name below mlx_xformer; None plants nothing.
    """

    name: str
    module: str | None
    source: str
    planted: str
    check: Check

    @property
    def file(self) -> Path:
        return ROOT / "mlx_xformer" / f"{self.module.replace('.', '/')}.py"

    def places(self) -> int:
        """How often the source occurs in the module."""
        return self.file.read_text().count(self.source)

    def changed(self) -> tuple[str, str] | None:
        """The module's dotted name, and its source with the bug."""
        if self.module is None:
            return None
        return f"mlx_xformer.{self.module}", self.file.read_text().replace(self.source, self.planted)

    def __str__(self) -> str:
        if self.module is None:
            kind, first, *rest = self.check
            return f"{kind} {first.rpartition('/')[2]}{f' and {len(rest)} more' if rest else ''}"
        return f"{self.module}: {self.name}"


class Outcomes:
    """What the check of each bug said: a message where it failed, None where it passed."""

    def __init__(self, bugs: Sequence[Bug]):
        self._said: dict[Bug, Future[str | None]] = {bug: Future() for bug in bugs}
        self._running: list[subprocess.Popen[str]] = []
        self._pool = ThreadPoolExecutor(CHILDREN)
        for at in range(0, len(bugs), SHARE):
            self._pool.submit(self._work, bugs[at : at + SHARE])

    def __getitem__(self, bug: Bug) -> str | None:
        return self._said[bug].result(timeout=PATIENCE * SHARE)

    def close(self) -> None:
        """Ends the children."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for child in self._running:
            child.kill()
        self._pool.shutdown()

    def _work(self, bugs: Sequence[Bug]) -> None:
        """One child for some bugs."""
        with tempfile.TemporaryDirectory() as folder:
            tasks, errors = Path(folder) / "tasks", Path(folder) / "errors"
            tasks.write_text("".join(json.dumps([bug.check, bug.changed()]) + "\n" for bug in bugs))
            with errors.open("w") as stderr:
                command = [sys.executable, str(CHILD), str(tasks)]
                child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=ROOT)
                self._running.append(child)
                for bug in bugs:
                    late = threading.Timer(PATIENCE, child.kill)
                    late.start()
                    line = child.stdout.readline()
                    late.cancel()
                    if line:
                        self._said[bug].set_result(json.loads(line))
                    else:
                        why = RuntimeError(f"the child died at {bug}: {errors.read_text()[-2000:]}")
                        self._said[bug].set_exception(why)
                child.communicate()
