"""Compares generation by an encoder-decoder by what it keeps from step to step. The source is encoded in every run.

python bench/run.py --seq2seq [--rounds N] [--threads N]
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from harness import Case, Settings, finish, measure

CASES = {
    "no cache": "no_cache",
    "the memory kept": "memory_kept",
    "self cache": "self_cache",
    "self and cross cache": "both_caches",
    "generate()": "generated",
}


def run(settings: Settings) -> None:
    """Measures the chosen cases, in turns, and checks that tokens are the same."""
    cases = [Case(name, "seq2seq", function) for name, function in settings.choose(CASES).items()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = measure(cases, folder, settings)
        tokens = [np.load(folder / f"{case.function}.npy") for case in cases]
    same = all(np.array_equal(tokens[0], other) for other in tokens)
    print(f"identical tokens: {'yes' if same else 'NO'} ({len(set(tokens[0].tolist()))} different ones)")
    finish("seq2seq", [record | {"tokens": len(tokens[0])} for record in found], settings)
    if not same:
        raise SystemExit("the tokens differ")
