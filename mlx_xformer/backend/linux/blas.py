"""Loads OpenBLAS for MLX on Linux, and a small library that computes products of one row with cblas_sgemv.

MLX's Linux wheel links the reference BLAS, which is about fifty times slower. The dynamic linker takes the first
library that defines a symbol, so this module must be imported before mlx.core. It imports nothing of MLX itself.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_NAMES = ("libopenblas.so.0", "libopenblas.so")
_MOST_WORKERS = 8
_SOURCE = Path(__file__).with_name("one_row.c")
_COMPILING = 30  # seconds that a compiler may take


def _reason_not_to() -> str | None:
    """The BLAS that is used instead of OpenBLAS and why, or None where OpenBLAS should be loaded."""
    if sys.platform != "linux":
        return "Accelerate" if sys.platform == "darwin" else "MLX's own"
    if os.environ.get("MLX_XFORMER_BLAS") == "0":
        return "MLX's own (MLX_XFORMER_BLAS=0)"
    if "mlx.core" in sys.modules:
        return "the one found when mlx.core was imported (import mlx_xformer first to use OpenBLAS)"
    if "torch" in sys.modules:
        return "MLX's own (PyTorch is loaded, and OpenBLAS would slow it)"
    return None


def _load() -> tuple[str, int, str, bool]:
    """Loads OpenBLAS into the global symbol scope.

    OpenBLAS is set to one thread. Its threads would share single products only, while everything else that MLX computes
    would take one core; instead, several streams of MLX compute products in parallel. The number of OpenBLAS's threads
    is never changed later: it applies to the whole process and changes how sums are rounded.

    Returns:
        A description of the BLAS in use, the number of workers (streams that compute in parallel), the processor that
        OpenBLAS's kernels are for in lower case, and whether products of one row go to cblas_sgemv.
    """
    reason = _reason_not_to()
    if reason is not None:
        return reason, 1, "", False
    for name in _NAMES:
        try:
            library = ctypes.CDLL(name)
            threads = int(library.openblas_get_num_threads())  # OPENBLAS_NUM_THREADS, or the cores
            library.openblas_set_num_threads(1)
            library.openblas_get_corename.restype = ctypes.c_char_p
            kernels = library.openblas_get_corename().decode().lower()
            single = _load_one_row(library)
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)  # after the library of one_row.c, which must come first
        except (OSError, AttributeError):
            continue
        words = f"OpenBLAS ({name}, {kernels}{'' if single else ', products of one row by cblas_sgemm'})"
        return words, max(1, min(threads, _MOST_WORKERS)), kernels, single
    return "MLX's own (slow; install OpenBLAS, Debian's package is libopenblas0-pthread)", 1, "", False


def _load_one_row(library: ctypes.CDLL) -> bool:
    """Compiles one_row.c and loads it ahead of OpenBLAS; returns False where there is no compiler.

    It is compiled at every start, in 50 ms, because a file that is kept could be damaged or replaced.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("g++")
    if compiler is None:
        return False
    try:
        functions = [ctypes.cast(f, ctypes.c_void_p) for f in (library.cblas_sgemm, library.cblas_sgemv)]
        with tempfile.TemporaryDirectory() as folder:
            made = str(Path(folder) / "one_row.so")
            command = [compiler, "-x", "c", "-O2", "-shared", "-fPIC", "-o", made, str(_SOURCE)]
            subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=_COMPILING)
            ctypes.CDLL(made, mode=ctypes.RTLD_GLOBAL).take_products_from(*functions)
    except (OSError, AttributeError, subprocess.SubprocessError):
        return False
    return True


words, workers, kernels, one_row = _load()

# Whether OpenBLAS copies a matrix for a product with few rows: all kernels do but those for AVX-512.
copies = kernels not in ("skylakex", "cooperlake", "sapphirerapids")
