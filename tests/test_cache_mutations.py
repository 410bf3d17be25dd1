"""Planted bugs in the caches: random programs, as test_cache_properties.py runs them, must fail with each of them.

Mutants and child processes are as in test_attention_mutations.py. A child runs programs of a fixed seed, kind by kind,
until one fails; the unchanged source passes all of them.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "mlx_xformer"
KV, ROWS, FILES, SIZES, LINES, QUANTIZED = (
    f"cache.{name}" for name in ("kv", "rows", "files", "sizes", "lines", "quantized")
)

# name: (module, source, planted)
MUTANTS = {
    "trim keeps what it forgets": (KV, "self.length -= n\n", "self.length -= 0\n"),
    "trim beyond what is there is passed over": (KV, "raise RewindError(f", "return RewindError(f"),
    "a windowed cache rewinds without limit": (KV, "if self._lost() > self.keep:", "if False:"),
    "a rewind may reach one position further": (KV, "self.slack - (self._longest", "self.slack + 1 - (self._longest"),
    "the longest length is forgotten": (KV, "max(self._longest, before + n)", "before + n"),
    "the window begins a position late": (KV, "self.length - window + 1)", "self.length - window + 2)"),
    "positions are lost a step early": (SIZES, "longest - window + 1 - slack", "longest - window + 2 - slack"),
    "the slack is not held": (SIZES, "longest - window + 1 - slack)", "longest - window + 1)"),
    "kept positions do not travel along": (KV, "            if self._kept:\n", "            if False:\n"),
    "kept positions are those of the batch": (KV, "at = mx.array(self.padding or (0,))", "at = mx.array((0,))"),
    "kept positions are hidden from a chunk": (
        KV,
        "mx.ones((n, self.keep), mx.bool_)",
        "mx.broadcast_to(mx.arange(n)[:, None] < 1, (n, self.keep))",
    ),
    "kept positions are counted from the padding": (KV, "keys < padding + self.keep", "keys < self.keep"),
    "padding is seen": (KV, "& (keys >= padding)", ""),
    "padding is seen where nothing is kept": (KV, "mask = self._real(first, stop)", "mask = None"),
    "a chunk overwrites what is before it": (KV, "self._lines, new, stop)", "self._lines, new, max(0, stop - 1))"),
    "offsets without padding": (
        KV,
        "[self.length - row for row in self.padding]",
        "[self.length for _ in self.padding]",
    ),
    "a renewed line begins with what is lost": (
        KV,
        "pieces = [self._kept, [x[:, :, self._slot : stop]",
        "pieces = [self._kept, [x[:, :, : stop - self._slot]",
    ),
    "a narrower window is passed over": (KV, "for some in (self.window, window) if", "for some in (self.window,) if"),
    "selected rows are not reordered": (KV, "mx.array(rows)", "mx.array(sorted(rows))"),
    "selected rows keep their padding": (KV, "= self._first - common, self._widths", "= self._first, self._widths"),
    "merged rows are aligned left": (ROWS, "(length - cache.length for cache in caches)", "(0 for _ in caches)"),
    "a merge forgets who was rewound": (ROWS, "longest = length + max(", "longest = length + min(0, "),
    "a merge drops kept positions": (ROWS, "held = [(0, cache._kept, 0),", "held = [(10**6, cache._kept, 0),"),
    "a fork shares its line with a write": (LINES, "fresh = [x[:] for x in lines]", "fresh = list(lines)"),
    "a file forgets how long it was": (KV, '"longest": self._longest}', '"longest": self.length}'),
    "a file takes rows for others": (FILES, '{index}.{row}")', '{index}.{0 * row}")'),
    "files without kept positions": (KV, "return joined([self._kept, ", "return joined([[], "),
    "slots off the grid": (SIZES, "size // 4 // STEP * STEP)", "size // 4)"),
    "bytes without biases": (SIZES, "2 * dtype.size * stored_width", "dtype.size * stored_width"),
    "values of another stretch": (QUANTIZED, "weights[..., at : at + n]", "weights[..., :n]"),
}


CHILD = """
import importlib.machinery, importlib.util, itertools, json, random, sys, tempfile
from pathlib import Path

class Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, name):
        return compile(planted[name], self.path, "exec")

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in planted:
            return importlib.util.spec_from_file_location(name, paths[name], loader=Loader(name, paths[name]))

def program(draw, ragged):
    step = draw.choice([4, 4, 4, 4, 256])
    options = {"window": draw.randint(1, 13), "keep": draw.randint(1, 4), "slack": draw.randint(0, 6)}
    options["padding"] = [draw.randint(0, 9) for _ in range(draw.randint(1, 3))] if ragged else None
    some = lambda: draw.choice([draw.randint(1, 9), draw.randint(1, 30)]) if step == 4 else draw.choice([1, 2, 60, 250])
    steps = [(draw.choice(OPERATIONS), some(), draw.randrange(2**16)) for _ in range(draw.randint(6, 14))]
    return step, options, steps, draw.randrange(2**20)

def tried(properties):
    draw = random.Random(0)
    from mlx_xformer.cache import quantized, sizes
    quantized._FLOATS = 1
    for _ in range(ROUNDS):
        for kind in properties.KINDS:
            given = program(draw, kind[2] == "ragged")
            sizes.STEP = given[0]
            sizes.slots.cache_clear()
            with tempfile.TemporaryDirectory() as folder:
                properties.run(kind, given, Path(folder))

import mlx_xformer
import test_cache_properties
OPERATIONS, ROUNDS = test_cache_properties.OPERATIONS, ROUNDS_HERE
planted, paths = {}, {}
sys.meta_path.insert(0, Finder())
for line in sys.stdin:
    name, module, text = json.loads(line)
    planted.clear()
    planted[f"mlx_xformer.{module}"] = text
    paths[f"mlx_xformer.{module}"] = sys.modules[f"mlx_xformer.{module}"].__file__
    for loaded in [x for x in sys.modules if x.split(".")[0] in ("mlx_xformer", "test_cache_properties", "harness")]:
        del sys.modules[loaded]
    try:
        import test_cache_properties
        tried(test_cache_properties)
        found = None
    except BaseException as error:
        found = f"{type(error).__name__}: {error}"[:300]
    print(json.dumps([name, found]), flush=True)
"""
ROUNDS = 7


def planted(name):
    """The module and its changed source."""
    module, source, text = MUTANTS[name]
    whole = (PACKAGE / f"{module.replace('.', '/')}.py").read_text()
    assert whole.count(source) == 1, f"{module} holds {whole.count(source)} times: {source}"
    return name, module, whole.replace(source, text)


@pytest.fixture(scope="module")
def caught():
    """What became of each mutant, and of the unchanged source."""
    tasks = [("nothing", KV, (PACKAGE / "cache/kv.py").read_text()), *map(planted, MUTANTS)]
    children = []
    for share in (tasks[::2], tasks[1::2]):
        pipe = subprocess.PIPE
        code = f"import sys; sys.path.insert(0, {str(TESTS)!r})\n" + CHILD.replace("ROUNDS_HERE", str(ROUNDS))
        child = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        child.stdin.write("".join(json.dumps(task) + "\n" for task in share))
        child.stdin.close()
        child.stdin = None
        children.append(child)
    answers = {}
    for child in children:
        out, errors = child.communicate(timeout=600)
        assert child.returncode == 0, errors
        answers |= dict(map(json.loads, out.splitlines()))
    return answers


def test_the_unchanged_source_passes(caught):
    assert caught["nothing"] is None
    assert caught.keys() == {"nothing", *MUTANTS}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_caught(caught, name):
    assert caught[name], f"every program passes with {name}"
