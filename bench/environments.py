"""Python environments of the other programs, each of its own under .bench/, installed on first use."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from harness import BENCH, ROOT

HOME = ROOT / ".bench"
REQUIREMENTS = ROOT / "tests" / "oracle" / "requirements.txt"
INSTALLS = {  # what `pip install` is called with, one after the other
    "torch": [["torch==2.13.0"], ["--no-deps", "-r", str(REQUIREMENTS)]],
    "mlx-lm": [["-r", str(BENCH / "requirements-mlx-lm.txt")]],
    "demucs-mlx": [["mlx[cpu]==0.32.4" if sys.platform == "linux" else "mlx==0.32.4", "demucs-mlx==1.6.1"]],
}


def find_python(name: str) -> str:
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
