"""Compares generation by an encoder-decoder by what it keeps from step to step. The source is encoded in every run.

python bench/run.py --seq2seq [--rounds N] [--threads N]
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mlx.utils import tree_flatten
from run import BENCH, Case, finish, measure, records

CASES = {
    "no cache": "no_cache",
    "the memory kept": "memory_kept",
    "self cache": "self_cache",
    "self and cross cache": "both_caches",
    "generate()": "generated",
}


def weights() -> dict[str, np.ndarray]:
    """Matrices of about unit gain."""
    sys.path.insert(0, str(BENCH / "cases"))
    os.environ.setdefault("BENCH_THREADS", "1")
    from seq2seq_cases import CONFIG, Transformer

    rng = np.random.default_rng(0)
    shapes = {name: x.shape for name, x in tree_flatten(Transformer(CONFIG).parameters())}
    drawn = {
        name: rng.uniform(0.7, 1.3, shape) if len(shape) == 1 and name.endswith("weight")
        else rng.uniform(-0.1, 0.1, shape) if len(shape) == 1
        else rng.standard_normal(shape) * shape[-1] ** -0.5
        for name, shape in shapes.items()
    }  # fmt: skip
    return {name: x.astype(np.float32) for name, x in drawn.items()}


def compare(wanted: Sequence[str], rounds: int, threads: int, patience: float) -> None:
    """Measures the cases whose names hold one of the words `wanted`, in turns, and checks that tokens are the same."""
    chosen = {name: function for name, function in CASES.items() if any(word in name for word in wanted)}
    if not chosen:
        raise SystemExit(f"--cases must match some of {', '.join(CASES)}, got {','.join(wanted)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "weights.npz", **weights())
        np.save(folder / "source.npy", np.random.default_rng(1).integers(0, 1000, (1, 256)))
        cases = [Case(what, "cases/seq2seq_cases.py", function) for what, function in chosen.items()]
        found = records(measure(cases, folder, rounds, threads, patience), cases[0].name)
        tokens = [np.load(folder / f"{function}.npy") for function in chosen.values()]
    same = all(np.array_equal(tokens[0], other) for other in tokens)
    print(f"identical tokens: {'yes' if same else 'NO'} ({len(set(tokens[0].tolist()))} different ones)")
    finish("seq2seq", [record | {"tokens": 64} for record in found], wanted)
    if not same:
        raise SystemExit("the tokens differ")
