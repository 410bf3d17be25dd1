"""Compares a mixture of experts with mlx-lm's, and in training with a dense network of as many products a token.

    python bench/run.py --mixture [--cases inference,training] [--rounds N] [--threads N]

mlx-lm is installed into an environment of its own under .bench/ on the first run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from peers import environment
from run import Case, finish, measure, records

D, H, E = 256, 512, 8  # as in cases/mixture.py, which needs the environment of a worker
SIZES = (1, 32, 512, 2048)
FILE = "cases/mixture.py"


def weights() -> dict[str, np.ndarray]:
    """Matrices of about unit gain, and tokens."""
    rng = np.random.default_rng(0)
    shapes = {"router": (E, D), "gate": (E, H, D), "up": (E, H, D), "down": (E, D, H)}
    found = {name: rng.standard_normal(shape) * shape[-1] ** -0.5 for name, shape in shapes.items()}
    return {name: x.astype(np.float32) for name, x in {**found, "x": rng.standard_normal((SIZES[-1], D))}.items()}


def compare(wanted: Sequence[str], rounds: int, threads: int, patience: float) -> None:
    """Measures the parts whose names hold one of the words `wanted`, each beside mlx-lm."""
    python = environment("mlx-lm")
    parts = {f"inference, {size} token{'s' * (size > 1)}": (f"peer_{size}", {"ours": f"ours_{size}"}) for size in SIZES}
    parts["training, 512 tokens"] = (
        "peer_train",
        {"dense": "dense", "ours, capacity 1.25": "ours_train_capped", "ours": "ours_train"},
    )
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "weights.npz", **weights())
        for part, (peer, ours) in parts.items():
            if not any(word in part for word in wanted):
                continue
            print(f"{part}:")
            cases = [Case(f"{part}, mlx-lm", FILE, peer, python)]
            cases += [Case(f"{part}, {what}", FILE, function) for what, function in ours.items()]
            found += records(measure(cases, folder, rounds, threads, patience), cases[0].name)
            if part.startswith("inference"):
                a, b = (np.load(folder / f"{case.function}.npy") for case in cases)
                print(f"  largest difference: {np.abs(a - b).max():.1e} of {np.abs(a).max():.1f}")
    finish("mixture", found, wanted)
