"""Planted bugs in the caches: random programs, as test_cache_properties.py runs them, must fail with each of them.

A child runs programs of a fixed seed, kind by kind, until one fails; the unchanged source passes all of them.
"""

import pytest
from support.planted import outcomes, source_of, task

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
    "a merge forgets who was rewound": (ROWS, "longest = length + max(", "longest = length + 0 * max("),
    "the capacity is forgotten": (KV, '"slack", "bits", "capacity")', '"slack", "bits")'),
    "one position beyond the capacity": (KV, "before + n > self.capacity", "before + n > self.capacity + 1"),
    "a merge drops kept positions": (ROWS, "held = [(0, cache._kept, 0),", "held = [(10**6, cache._kept, 0),"),
    "a fork shares its line with a write": (LINES, "fresh = [x[:] for x in lines]", "fresh = list(lines)"),
    "a file forgets how long it was": (KV, '"longest": self._longest}', '"longest": self.length}'),
    "a file takes rows for others": (FILES, '{index}.{row}")', '{index}.{0 * row}")'),
    "files without kept positions": (KV, "return joined([self._kept, ", "return joined([[], "),
    "slots off the grid": (SIZES, "size // 4 // STEP * STEP)", "size // 4)"),
    "bytes without biases": (SIZES, "2 * dtype.size * stored_width", "dtype.size * stored_width"),
    "values of another stretch": (QUANTIZED, "weights[..., at : at + n]", "weights[..., :n]"),
}


CHECK = """
import random, tempfile
from pathlib import Path

def program(draw, ragged, operations):
    step = draw.choice([4, 4, 4, 4, 256])
    options = {"window": draw.randint(1, 13), "keep": draw.randint(1, 4), "slack": draw.randint(0, 6)}
    options["capacity"] = draw.choice([None, None, draw.randint(20, 90) if step == 4 else draw.randint(200, 900)])
    options["padding"] = [draw.randint(0, 9) for _ in range(draw.randint(1, 3))] if ragged else None
    some = lambda: draw.choice([draw.randint(1, 9), draw.randint(1, 30)]) if step == 4 else draw.choice([1, 2, 60, 250])
    steps = [(draw.choice(operations), some(), draw.randrange(2**16)) for _ in range(draw.randint(6, 14))]
    return step, options, steps, draw.randrange(2**20)

def tried(properties):
    draw = random.Random(0)
    from mlx_xformer.nn.cache import quantized, sizes
    quantized._FLOATS = 1
    for _ in range(12):
        for kind in properties.KINDS:
            given = program(draw, kind[2] == "ragged", properties.OPERATIONS)
            sizes.STEP = given[0]
            sizes.slots.cache_clear()
            with tempfile.TemporaryDirectory() as folder:
                properties.run(kind, given, Path(folder))

def found():
    import test_cache_properties
    try:
        tried(test_cache_properties)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:300]
"""


@pytest.fixture(scope="module")
def caught():
    """What became of each mutant, and of the unchanged source."""
    mutants = [task(name, *mutant) for name, mutant in MUTANTS.items()]
    return outcomes([("nothing", KV, source_of(KV)), *mutants], CHECK)


def test_the_unchanged_source_passes(caught):
    assert caught["nothing"] is None
    assert caught.keys() == {"nothing", *MUTANTS}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_caught(caught, name):
    assert caught[name], f"every program passes with {name}"
