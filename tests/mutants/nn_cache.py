"""Caches: random programs of operations must notice."""

from mutants.runner import Bug, tests

KV = "nn.cache.kv"
SIZES = "nn.cache.sizes"
ROWS = "nn.cache.rows"
SLOTS = "nn.cache.slots"
FILES = "nn.cache.files"
QUANTIZED = "nn.cache.quantized"
PROGRAMS = tests("tests/nn/test_cache_properties.py::test_programs_of_one_seed")

BUGS = [
    Bug("trim keeps what it forgets", KV, "self.length -= n\n", "self.length -= 0\n", PROGRAMS),
    Bug("trim beyond what is there is passed over", KV, "raise RewindError(f", "return RewindError(f", PROGRAMS),
    Bug("a windowed cache rewinds without limit", KV, "if self._lost() > self.keep:", "if False:", PROGRAMS),
    Bug(
        "a rewind may reach one position further",
        KV,
        "self.slack - (self._longest",
        "self.slack + 1 - (self._longest",
        PROGRAMS,
    ),
    Bug("the longest length is forgotten", KV, "max(self._longest, before + n)", "before + n", PROGRAMS),
    Bug("the window begins a position late", KV, "self.length - window + 1)", "self.length - window + 2)", PROGRAMS),
    Bug("kept positions do not travel along", KV, "            if self._kept:\n", "            if False:\n", PROGRAMS),
    Bug(
        "kept positions are those of the batch",
        KV,
        "at = mx.array(self.padding or (0,))",
        "at = mx.array((0,))",
        PROGRAMS,
    ),
    Bug(
        "kept positions are hidden from a chunk",
        KV,
        "mx.ones((n, self.keep), mx.bool_)",
        "mx.broadcast_to(mx.arange(n)[:, None] < 1, (n, self.keep))",
        PROGRAMS,
    ),
    Bug("kept positions are counted from the padding", KV, "keys < padding + self.keep", "keys < self.keep", PROGRAMS),
    Bug("padding is seen", KV, "& (keys >= padding)", "", PROGRAMS),
    Bug("padding is seen where nothing is kept", KV, "mask = self._real(first, stop)", "mask = None", PROGRAMS),
    Bug(
        "a chunk overwrites what is before it",
        KV,
        "self._lines, new, stop)",
        "self._lines, new, max(0, stop - 1))",
        PROGRAMS,
    ),
    Bug(
        "offsets without padding",
        KV,
        "[self.length - row for row in self.padding]",
        "[self.length for _ in self.padding]",
        PROGRAMS,
    ),
    Bug(
        "a renewed line begins with what is lost",
        KV,
        "pieces = [self._kept, [x[:, :, self._slot : stop]",
        "pieces = [self._kept, [x[:, :, : stop - self._slot]",
        PROGRAMS,
    ),
    Bug(
        "a narrower window is passed over",
        KV,
        "for some in (self.window, window) if",
        "for some in (self.window,) if",
        PROGRAMS,
    ),
    Bug("selected rows are not reordered", KV, "mx.array(rows)", "mx.array(sorted(rows))", PROGRAMS),
    Bug(
        "selected rows keep their padding",
        KV,
        "= self._first - common, self._widths",
        "= self._first, self._widths",
        PROGRAMS,
    ),
    Bug("the capacity is forgotten", KV, '"slack", "bits", "capacity")', '"slack", "bits")', PROGRAMS),
    Bug(
        "one position beyond the capacity", KV, "before + n > self.capacity", "before + n > self.capacity + 1", PROGRAMS
    ),
    Bug("a file forgets how long it was", KV, '"longest": self._longest}', '"longest": self.length}', PROGRAMS),
    Bug("files without kept positions", KV, "return joined([self._kept, ", "return joined([[], ", PROGRAMS),
    Bug(
        "positions are lost a step early",
        SIZES,
        "longest - window + 1 - slack",
        "longest - window + 2 - slack",
        PROGRAMS,
    ),
    Bug("the slack is not held", SIZES, "longest - window + 1 - slack)", "longest - window + 1)", PROGRAMS),
    Bug("slots off the grid", SIZES, "size // 4 // STEP * STEP)", "size // 4)", PROGRAMS),
    Bug("bytes without biases", SIZES, "2 * dtype.size * stored_width", "dtype.size * stored_width", PROGRAMS),
    Bug(
        "merged rows are aligned left",
        ROWS,
        "(length - cache.length for cache in caches)",
        "(0 for _ in caches)",
        PROGRAMS,
    ),
    Bug("a merge forgets who was rewound", ROWS, "longest = length + max(", "longest = length + 0 * max(", PROGRAMS),
    Bug(
        "a merge drops kept positions",
        ROWS,
        "held = [(0, cache._kept, 0),",
        "held = [(10**6, cache._kept, 0),",
        PROGRAMS,
    ),
    Bug("a fork shares its line with a write", SLOTS, "fresh = [x[:] for x in lines]", "fresh = list(lines)", PROGRAMS),
    Bug("a file takes rows for others", FILES, '{index}.{row}")', '{index}.{0 * row}")', PROGRAMS),
    Bug("values of another stretch", QUANTIZED, "weights[..., at : at + n]", "weights[..., :n]", PROGRAMS),
]
