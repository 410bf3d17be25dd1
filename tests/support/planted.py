"""Bugs planted one by one into the package, which children import anew for each, and what became of them.

A mutant replaces a piece of source that occurs exactly once. A finder hands out the changed source.
"""

import json
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
PACKAGE = TESTS.parent / "mlx_xformer"

CHILD = """
import importlib.machinery, importlib.util, json, sys

class Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, name):
        return compile(planted[name], self.path, "exec")

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in planted:
            file = paths[name]
            return importlib.util.spec_from_file_location(name, file, loader=Loader(name, file))

sys.path.insert(0, sys.argv[1])
import mlx_xformer
planted, paths = {}, {}
sys.meta_path.insert(0, Finder())
for line in sys.stdin:
    name, module, text, *given = json.loads(line)
    planted.clear()
    planted[f"mlx_xformer.{module}"] = text
    paths[f"mlx_xformer.{module}"] = f"{sys.argv[2]}/{module.replace('.', '/')}.py"
    for loaded in [x for x in sys.modules if x.split(".")[0] in ("mlx_xformer", "support") or "test_" in x]:
        del sys.modules[loaded]
    print(json.dumps([name, found(*given)]), flush=True)
"""


def source_of(module: str) -> str:
    return (PACKAGE / f"{module.replace('.', '/')}.py").read_text()


def task(name: str, module: str, source: str, planted: str, *given: str) -> tuple[str, ...]:
    """Name, module, changed source, and what the check is given."""
    whole = source_of(module)
    assert whole.count(source) == 1, f"{module} holds {whole.count(source)} times: {source}"
    return name, module, whole.replace(source, planted), *given


def outcomes(tasks: list[tuple[str, ...]], check: str, timeout: float = 600) -> dict[str, str | None]:
    """By name what `check` found of each, in two processes. check: source that defines found(*given) -> str | None."""
    children = []
    for share in (tasks[::2], tasks[1::2]):
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", check + CHILD, str(TESTS), str(PACKAGE)]
        child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        child.stdin.write("".join(json.dumps(task) + "\n" for task in share))
        child.stdin.close()
        child.stdin = None
        children.append(child)
    answers = {}
    for child in children:
        out, errors = child.communicate(timeout=timeout)
        assert child.returncode == 0, errors
        answers |= dict(map(json.loads, out.splitlines()))
    return answers
