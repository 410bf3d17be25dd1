"""What the cases share. At import it needs NumPy only: other programs' environments have no mlx_xformer, or no MLX."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np


def describe(run: Callable[[], Any], *, packages: Sequence[str], blas: str) -> dict[str, Any]:
    """What worker.py needs of a program: `run` computes, and returns a NumPy array or None."""
    versions = {name: version(name) for name in packages}
    return {"run": run, "versions": versions, "blas": blas, "threads": int(os.environ["BENCH_THREADS"])}


def describe_mlx(run: Callable[[], Any], *, packages: Sequence[str], blas: str) -> dict[str, Any]:
    """And the peak of a program on MLX."""
    import mlx.core as mx

    return {**describe(run, packages=[*packages, "mlx"], blas=blas), "peak": mx.get_peak_memory}


def import_device() -> Any:
    """This package's module that knows the BLAS. Of both layouts, as compare.py also runs older checkouts: until commit
    44b0a2f it was `runtime`."""
    try:
        from mlx_xformer.backend import device
    except ImportError:
        from mlx_xformer import runtime as device
    return device


def describe_ours(run: Callable[[], Any]) -> dict[str, Any]:
    """And of this package, which must be that of the clone that is measured."""
    import mlx_xformer

    checkout, file = os.environ["BENCH_CHECKOUT"], Path(mlx_xformer.__file__).resolve()
    if not file.is_relative_to(Path(checkout).resolve()):
        raise RuntimeError(f"mlx_xformer must come from {checkout}, got {file}")
    case = describe_mlx(run, packages=[], blas=import_device().blas)
    case["versions"]["mlx-xformer"] = mlx_xformer.__version__
    return case


def load_openblas() -> str:
    """Loads OpenBLAS where all later libraries see it (Linux), as this package does. Returns what serves MLX then."""
    if sys.platform != "linux":
        return "Accelerate"
    library = ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
    library.openblas_get_corename.restype = ctypes.c_char_p
    return f"OpenBLAS (libopenblas.so.0, {library.openblas_get_corename().decode().lower()})"


def draw_weights(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Random parameters by their names: matrices of about unit gain, and vectors that leave nothing at 0 or 1."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in sorted(shapes.items()):
        if len(shape) > 1:
            x = rng.standard_normal(shape) * math.prod(shape[1:]) ** -0.5
        else:
            x = rng.uniform(0.7, 1.3, shape) if name.endswith("weight") else rng.uniform(-0.1, 0.1, shape)
        found[name] = x.astype(np.float32)
    return found


def set_weights(model: Any, seed: int = 0) -> None:
    """Gives a module the parameters of `draw_weights`."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    shapes = {name: x.shape for name, x in tree_flatten(model.parameters())}
    model.load_weights([(name, mx.array(x)) for name, x in draw_weights(shapes, seed).items()])
    mx.eval(model.parameters())
