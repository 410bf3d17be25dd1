"""Elementwise chains that are compiled on Linux."""

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_xformer.backend import dispatch
from mlx_xformer.backend.linux import chains


def test_exp_by_its_bits():
    """Good to 3e-7 of itself down to e^-87, and that value below, where the exponent has no more bits."""
    scores = np.linspace(-500, 0, 9001).astype(np.float32)
    weights = np.array(chains.exp_below_0(mx.array(scores)), np.float64)
    exact = np.exp(np.maximum(scores, -87).astype(np.float64))
    assert weights.min() >= np.finfo(np.float32).tiny
    assert np.abs(weights / exact - 1).max() < 3e-7


@pytest.mark.slow
@pytest.mark.skipif(not dispatch._FUSES, reason="nothing is compiled here")
def test_chains_are_vectorised(tmp_path):
    """Each chain is one library, whose loop g++ vectorises: a chain cut into passes, or a loop that stays scalar, is
    right, but two to four times slower."""
    code = """
import mlx.core as mx
from mlx_xformer.backend.linux import chains as cpu
x = mx.random.normal((1000,))
mx.eval(getattr(cpu, "{}")(*[-mx.abs(x)] * {}))
"""
    for name, count, passes in [("gelu", 1, 1), ("gate", 2, 1), ("add_gate", 3, 1), ("exp_below_0", 1, 2)]:
        folder = tmp_path / name
        folder.mkdir()
        run = [sys.executable, "-c", "import mlx_xformer" + code.format(name, count)]
        subprocess.run(run, check=True, env=os.environ | {"TMPDIR": str(folder)})
        sources = sorted(folder.rglob("*.cpp"))
        assert len(sources) == passes, name
        for source in sources:
            include = Path(mx.__file__).parent / "include"
            command = [
                "g++",
                "-std=c++17",
                "-O3",
                "-fPIC",
                "-shared",
                f"-I{include}",
                source,
                "-o",
                folder / "again.so",
            ]
            answer = subprocess.run([*command, "-fopt-info-vec"], capture_output=True, text=True, check=True)
            assert "loop vectorized" in answer.stderr, f"{name}: {source.name}"
