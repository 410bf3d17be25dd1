"""One official HTDemucs segment, the same weights and input for every program.

FOLDER holds model.safetensors (demucs' own layout), mix.npy (1, 2, 343980) and ours/ (our checkpoint).
"""

from __future__ import annotations

import json
import os
import sys
import types
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from cases.common import describe, describe_mlx, describe_ours, load_openblas


def pytorch(folder: Path) -> dict[str, Any]:
    """PyTorch demucs 4.1.0."""
    import torch
    from demucs.hf import load_safetensors_model

    torch.set_num_threads(int(os.environ["BENCH_THREADS"]))
    device = "mps" if torch.backends.mps.is_available() else "cpu"
    model = load_safetensors_model(folder / "model.safetensors").float().eval().to(device)
    mix = torch.from_numpy(np.load(folder / "mix.npy")).to(device)

    def run() -> np.ndarray:
        with torch.no_grad():
            return model(mix).cpu().numpy()

    return describe(run, packages=["torch", "demucs"], blas=f"PyTorch's own, {device}")


class _Tensor:
    """As much of a PyTorch tensor as demucs-mlx's converter touches."""

    def __init__(self, value: np.ndarray):
        self._value = value
        self.shape = value.shape

    def detach(self) -> _Tensor:
        return self

    def cpu(self) -> _Tensor:
        return self

    def numpy(self) -> np.ndarray:
        return self._value


def _fraction(value: Any) -> Any:
    if isinstance(value, dict) and value.get("_type") == "fraction":
        return Fraction(value["numerator"], value["denominator"])
    return value


def demucs_mlx(folder: Path) -> dict[str, Any]:
    """demucs-mlx 1.6.1, compiled, attention in float32."""
    os.environ |= {"DEMUCS_MLX_ATTENTION_FP16": "0", "DEMUCS_MLX_COMPILE_FORWARD": "1"}
    blas = load_openblas()
    import mlx.core as mx

    if not mx.metal.is_available():

        def refuse(*_: object, **__: object) -> None:
            raise RuntimeError("no Metal here")

        mx.fast.metal_kernel = refuse
    sys.modules.setdefault("torch", types.ModuleType("torch"))  # its converter imports it and, like this, needs none
    from demucs_mlx.apply_mlx import _forward
    from demucs_mlx.mlx_convert import _load_weights_into_model, convert_state_dict
    from demucs_mlx.mlx_htdemucs import HTDemucsMLX

    tensors, metadata = mx.load(str(folder / "model.safetensors"), return_metadata=True)
    kwargs = {key: _fraction(value) for key, value in json.loads(metadata["kwargs"]).items()}
    state = {name: _Tensor(np.array(value.astype(mx.float32))) for name, value in tensors.items()}
    model = HTDemucsMLX(**kwargs)
    _load_weights_into_model(model, convert_state_dict(state, flatten=True))
    model.eval()
    mix = mx.array(np.load(folder / "mix.npy"))
    return describe_mlx(lambda: np.array(_forward(model, mix)), packages=["demucs-mlx"], blas=blas)


def ours(folder: Path) -> dict[str, Any]:
    """This package."""
    from mlx_xformer import load
    from mlx_xformer.backend.device import mx

    model: Any = load(folder / "ours")
    mix = mx.array(np.load(folder / "mix.npy"))
    return describe_ours(lambda: np.array(model(mix)))
