"""Compares one official HTDemucs segment with PyTorch demucs and demucs-mlx (`make bench-peers`).

    python bench/run.py --peers [--rounds N] [--threads N]

Installs each peer into an environment of its own under .bench/ on the first run. On Debian, demucs-mlx's audio package
is built from source and needs: apt-get install libavformat-dev libavcodec-dev libavutil-dev libswresample-dev.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
from environments import find_python
from harness import ROOT, Case, Settings, finish, measure

OFFICIAL = {  # the released htdemucs; every other keyword at its default
    "sources": ["drums", "bass", "other", "vocals"],
    "segment": Fraction(39, 5),
    "multi_freqs": [],
    "dconv_mode": 3,
    "bottom_channels": 512,
    "t_dropout": 0.02,
    "t_sparse_attn_window": 400,
}


def prepare(folder: Path, torch_python: str, threads: int, ours: bool) -> dict[str, np.ndarray]:
    """Writes the weights, the input and, if asked, our checkpoint; returns PyTorch's answers in both precisions."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.oracle import Oracle

    with Oracle(torch_python, threads=threads) as oracle:
        names = oracle.package(OFFICIAL, folder, seed=0, half=True)
        (folder / names["th"]).unlink()
        (folder / names["safetensors"]).rename(folder / "model.safetensors")
        truth = {}
        for dtype in ("float32", "float64"):
            answer = oracle.htdemucs(OFFICIAL, 0, dtype=dtype, half=True, state=False)
            truth[dtype] = answer["output"]
        np.save(folder / "mix.npy", answer["mix"])
    if ours:
        from mlx_xformer import convert

        convert(folder / "model.safetensors", folder / "ours", family="htdemucs")
    return truth


def snr(x: np.ndarray, truth: np.ndarray) -> float:
    """Decibels over all sources."""
    truth = truth.astype(np.float64)
    return round(float(10 * np.log10(np.sum(truth**2) / np.sum((truth - x) ** 2))), 1)


def run(settings: Settings) -> None:
    """Measures the chosen peers and PyTorch, the base."""
    torch_python = find_python("torch")
    cases = [Case("PyTorch demucs", "peers", "pytorch", torch_python, checkout=None)]
    if settings.wants("demucs-mlx"):
        cases.append(Case("demucs-mlx", "peers", "demucs_mlx", find_python("demucs-mlx"), checkout=None))
    if settings.wants("mlx-xformer"):
        cases.append(Case("mlx-xformer", "peers", "ours"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # MLX keeps the loops it compiles in the temporary folder: an empty one makes the first run a first run.
        for index, case in enumerate(cases):
            (folder / str(index)).mkdir()
            cases[index] = replace(case, environment={"TMPDIR": str(folder / str(index))})
        truth = prepare(folder, torch_python, settings.threads, any(case.function == "ours" for case in cases))

        found = measure(cases, folder, settings)
        for case, record in zip(cases, found, strict=True):
            record["cold"] = True
            output = np.load(folder / f"{case.function}.npy")
            record["snr64_db"] = snr(output, truth["float64"])
            if case.function != "pytorch":
                record["snr_db"] = snr(output, truth["float32"])
    finish("peers", found, settings)
