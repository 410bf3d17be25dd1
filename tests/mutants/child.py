"""The child process of runner.py: python tests/mutants/child.py FILE, where every line of the file is a check and the
module to change, if any. For each it prints what the check said, as a line of JSON."""

from __future__ import annotations

import contextlib
import importlib.machinery
import io
import json
import os
import sys
from pathlib import Path
from types import CodeType
from typing import ClassVar

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import mlx_xformer  # noqa: E402, F401  it loads the BLAS of MLX, once

import pytest  # isort: skip  # noqa: E402


class Loader(importlib.machinery.SourceFileLoader):
    """Compiles each file once for all bugs, and the changed module from its changed source."""

    compiled: ClassVar[dict[str, CodeType]] = {}

    def __init__(self, name: str, path: str, changed: str | None):
        super().__init__(name, path)
        self.changed = changed

    def get_code(self, fullname):
        if self.changed is not None:
            return compile(self.changed, self.path, "exec")
        if self.path not in self.compiled:
            self.compiled[self.path] = super().get_code(fullname)
        return self.compiled[self.path]


class Finder:
    """Finds the modules of the package, one of which may be changed."""

    changed: tuple[str, str] | None = None

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] != "mlx_xformer":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            changed = self.changed[1] if self.changed is not None and self.changed[0] == name else None
            spec.loader = Loader(name, spec.origin, changed)
        return spec


def forget() -> None:
    """Drops the package and all tests from Python's modules, so that they are imported anew."""
    for name in list(sys.modules):
        if name.split(".")[0] in ("mlx_xformer", "support", "tests"):
            del sys.modules[name]


class FoundByParity(BaseException):
    """Ends a run of parity at the first sample that fails."""


def parity(operation: str) -> str | None:
    """Why the first failing sample of an operation fails."""
    from mlx_xformer import parity
    from mlx_xformer.parity.report import Row

    def stop(row, ratio, place):
        if place.why:
            message = f"{row.name} {row.check}: seed {place.seed} sample {place.sample}, {place.what}: {place.why}"
            raise FoundByParity(message)
        row.attempted, row.passed = row.attempted + 1, row.passed + 1

    Row.add = stop
    try:
        parity.run([operation], dtypes=["float32"], seeds=1)
    except FoundByParity as found:
        assert str(found).startswith(operation), f"{operation} was asked for: {found}"
        return str(found)
    return None


class FirstFailure:
    """A plugin of pytest that keeps the first failure, and notes what is not one."""

    def __init__(self):
        self.failed, self.broken, self.passed = None, None, 0

    def pytest_collectreport(self, report):
        if report.failed:
            self.broken = str(report.longrepr)

    def pytest_runtest_logreport(self, report):
        if report.failed and self.failed is None:
            self.failed = f"{report.nodeid}: {report.longrepr}"
        self.passed += report.passed and report.when == "call"


def tests(*nodes: str) -> str | None:
    """The first failure of tests."""
    first, output = FirstFailure(), io.StringIO()
    with contextlib.redirect_stdout(output):
        code = pytest.main([*nodes, "-x", "-p", "no:cacheprovider", f"--rootdir={ROOT}"], plugins=[first])
    expected = pytest.ExitCode.TESTS_FAILED if first.failed else pytest.ExitCode.OK
    assert not first.broken and code == expected and (first.failed or first.passed), first.broken or output.getvalue()
    return first.failed


def main() -> None:
    finder = Finder()
    sys.meta_path.insert(0, finder)
    answers = os.fdopen(os.dup(1), "w")
    with Path(sys.argv[1]).open() as tasks:
        for line in tasks:
            (kind, *given), finder.changed = json.loads(line)
            forget()
            said = {"parity": parity, "tests": tests}[kind](*given)
            print(json.dumps(said and said[:300]), file=answers, flush=True)


if __name__ == "__main__":
    main()
