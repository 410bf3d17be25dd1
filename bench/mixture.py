"""Compares a mixture of experts with mlx-lm's, and in training with a dense network of as many products a token.

    python bench/run.py --mixture [--cases inference,training] [--rounds N] [--threads N]

mlx-lm is installed into an environment of its own under .bench/ on the first run.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from cases.mixture import REPEATS
from environments import find_python
from harness import Case, Settings, finish, measure


def run(settings: Settings) -> None:
    """Measures the chosen parts, each beside mlx-lm."""
    python = find_python("mlx-lm")
    parts = {  # part: (mlx-lm's function, ours by their names)
        f"inference, {size} token{'s' * (size > 1)}": (f"peer_{size}", {"ours": f"ours_{size}"}) for size in REPEATS
    }
    parts["training, 512 tokens"] = (
        "peer_train",
        {"dense": "dense", "ours, capacity 1.25": "ours_train_capped", "ours": "ours_train"},
    )
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, (peer, ours) in settings.choose(parts).items():
            print(f"{part}:")
            cases = [Case(f"{part}, mlx-lm", "mixture", peer, python, checkout=None)]
            cases += [Case(f"{part}, {what}", "mixture", function) for what, function in ours.items()]
            found += measure(cases, folder, settings)
            if part.startswith("inference"):
                a, b = (np.load(folder / f"{case.function}.npy") for case in cases)
                print(f"  largest difference: {np.abs(a - b).max():.1e} of {np.abs(a).max():.1f}")
    finish("mixture", found, settings)
