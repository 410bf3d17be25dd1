"""Compares one official HTDemucs segment with PyTorch demucs and demucs-mlx (`make bench-peers`).

    python bench/run.py --peers [--rounds N] [--threads N]

Installs each peer into an environment of its own under .bench/ on the first run. On Debian, demucs-mlx's audio package
is built from source and needs: apt-get install libavformat-dev libavcodec-dev libavutil-dev libswresample-dev.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
from run import BENCH, Case, finish, measure, records

ROOT = BENCH.parent
HOME = ROOT / ".bench"
OFFICIAL = {  # the released htdemucs; every other keyword at its default
    "sources": ["drums", "bass", "other", "vocals"],
    "segment": Fraction(39, 5),
    "multi_freqs": [],
    "dconv_mode": 3,
    "bottom_channels": 512,
    "t_dropout": 0.02,
    "t_sparse_attn_window": 400,
}
REQUIREMENTS = ROOT / "tests" / "oracle" / "requirements.txt"
INSTALLS = {  # what `pip install` is called with, one after the other
    "torch": [["torch==2.13.0"], ["--no-deps", "-r", str(REQUIREMENTS)]],
    "mlx-lm": [["-r", str(BENCH / "requirements-mlx-lm.txt")]],
    "demucs-mlx": [["mlx[cpu]==0.32.4" if sys.platform == "linux" else "mlx==0.32.4", "demucs-mlx==1.6.1"]],
}


def environment(name: str) -> str:
    """The Python of an environment; it is built where it is missing or unfinished. PyTorch may already be there."""
    if name == "torch":
        given = os.environ.get("MLX_XFORMER_TORCH_PYTHON")
        shared = ROOT / ".venv-torch"
        if given or (shared / "installed").exists():
            return given or str(shared / "bin" / "python")
    folder = HOME / name
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists():
        print(f"installing {name} into .bench/{name}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for arguments in INSTALLS[name]:
            command = [str(python), "-m", "pip", "install", "--quiet", *arguments]
            subprocess.run(command, check=True)
        done.touch()
    return str(python)


def prepare(folder: Path, torch_python: str, threads: int, ours: bool) -> dict[str, np.ndarray]:
    """Writes the weights, the input and, if asked, our checkpoint; returns PyTorch's answers in both precisions."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.torch_oracle import Oracle

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
        from mlx_xformer.converters.conversion import convert

        convert(folder / "model.safetensors", folder / "ours", family="htdemucs")
    return truth


def snr(x: np.ndarray, truth: np.ndarray) -> float:
    """Decibels over all sources."""
    truth = truth.astype(np.float64)
    return round(float(10 * np.log10(np.sum(truth**2) / np.sum((truth - x) ** 2))), 1)


def compare(wanted: Sequence[str], rounds: int, threads: int, patience: float) -> None:
    """Measures the peers whose names hold one of the words `wanted`, and PyTorch, the base."""
    torch_python = environment("torch")
    cases = [Case("PyTorch demucs", "cases/peers.py", "pytorch", torch_python)]
    if any(word in "demucs-mlx" for word in wanted):
        cases.append(Case("demucs-mlx", "cases/peers.py", "demucs_mlx", environment("demucs-mlx")))
    if any(word in "mlx-xformer" for word in wanted):
        cases.append(Case("mlx-xformer", "cases/peers.py", "ours"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # MLX keeps the loops it compiles in the temporary folder: an empty one makes the first run a first run.
        for index, case in enumerate(cases):
            (folder / str(index)).mkdir()
            cases[index] = replace(case, environment={"TMPDIR": str(folder / str(index))})
        truth = prepare(folder, torch_python, threads, any(case.function == "ours" for case in cases))

        found = records(measure(cases, folder, rounds, threads, patience), cases[0].name)
        for case, record in zip(cases, found, strict=True):
            record["cold"] = True
            output = np.load(folder / f"{case.function}.npy")
            record["snr64_db"] = snr(output, truth["float64"])
            if case.function != "pytorch":
                record["snr_db"] = snr(output, truth["float32"])
    finish("peers", found, wanted)
