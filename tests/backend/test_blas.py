"""Which BLAS is loaded when, products of one row by OpenBLAS's cblas_sgemv, and its threads."""

import ctypes
import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from mlx_xformer.backend.linux import blas

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a choice of BLAS")
needed = pytest.mark.skipif(not blas.one_row, reason="needs OpenBLAS and a C compiler")


def run(code, **environment):
    """The output of a fresh Python."""
    kept = {k: v for k, v in os.environ.items() if k != "MLX_XFORMER_BLAS"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=kept | environment)


# An OpenBLAS with three threads, which hears how many it shall use.
FAKE = """
import ctypes, types
told = []
def name(): return b"Zen"
ctypes.CDLL = lambda *a, **k: types.SimpleNamespace(
    openblas_get_num_threads=lambda: 3, openblas_set_num_threads=told.append, openblas_get_corename=name)
"""


@pytest.mark.parametrize(
    ("before", "environment", "expected"),
    [
        ("", {"MLX_XFORMER_BLAS": "0"}, "MLX's own (MLX_XFORMER_BLAS=0)"),
        ("import mlx.core", {}, "the one found when mlx.core was imported"),
        ("import sys, types; sys.modules['torch'] = types.ModuleType('torch')", {}, "MLX's own (PyTorch is loaded"),
        ("import ctypes\ndef missing(*a, **k): raise OSError\nctypes.CDLL = missing", {}, "MLX's own (slow; install"),
        (FAKE, {}, "OpenBLAS (libopenblas.so.0, zen, products of one row by cblas_sgemm)"),
    ],
)
def test_choice_of_blas(before, environment, expected):
    answer = run(f"{before}\nimport mlx_xformer\nprint(mlx_xformer.backend.device.blas)", **environment)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith(expected)


def test_workers_take_the_place_of_the_threads_of_openblas():
    answer = run(
        f"{FAKE}\nfrom mlx_xformer.backend import device\nprint(device.workers, device.report().workers, told)"
    )
    assert answer.stdout == "3 3 [1]\n", answer.stderr
    answer = run("from mlx_xformer.backend import device\nprint(device.workers)", OPENBLAS_NUM_THREADS="1")
    assert answer.stdout == "1\n", answer.stderr
    answer = run("from mlx_xformer.backend import device\nprint(device.workers)", MLX_XFORMER_BLAS="0")
    assert answer.stdout == "1\n", answer.stderr


def test_results_do_not_depend_on_the_blas():
    code = """
import mlx_xformer, mlx.core as mx
print(mlx_xformer.backend.device.blas)
x = mx.random.normal((40, 40), key=mx.random.key(1))
print((x @ x).sum().item())
"""
    (plain, a), (loaded, b) = (run(code, MLX_XFORMER_BLAS=value).stdout.splitlines() for value in ("0", "1"))
    assert plain != loaded
    assert float(a) == pytest.approx(float(b), rel=1e-4)


def test_openblas_has_one_thread_also_while_something_is_generated():
    """Their number counts for the whole process, and another rounds sums otherwise."""
    code = """
import mlx_xformer, mlx.core as mx
from mlx_xformer.models.causal_lm.model import CausalLM, CausalLMConfig
from mlx_xformer.text.generation import generate
model = CausalLM(CausalLMConfig(vocab_size=11, embed_dim=8, num_layers=1, num_heads=2, hidden_dim=13))
list(generate(model, [1, 2], max_tokens=3, draft=model))
print(told)
"""
    answer = run(f"{FAKE}\n{code}")
    assert answer.stdout == "[1]\n", answer.stderr


def openblas():
    """The library itself, past one_row.c."""
    return ctypes.CDLL(blas.words.split("(")[1].split(",")[0])


ROW_MAJOR, PLAIN, TRANSPOSED = 101, 111, 112


def pointer(x):
    return x.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


def stored(x, transposed, spare):
    """A matrix as BLAS takes it, plain or transposed, in rows with NaN behind them; and how long these are."""
    x = x.T if transposed else x
    out = np.full((x.shape[0], x.shape[1] + spare), np.nan, np.float32)
    out[:, : x.shape[1]] = x
    return out


@needed
@pytest.mark.parametrize(
    "sizes", [(1, 31, 67), (31, 1, 67), (1, 1, 67), (1, 31, 1), (31, 1, 1), (3, 31, 67), (1, 400, 300), (1, 1100, 1300)]
)
@pytest.mark.parametrize("beta", [0, 1, 0.5])
def test_every_form_of_a_product(sizes, beta):
    """cblas_sgemm as MLX finds it, with matrices that are parts of larger ones; what is overwritten may be NaN."""
    m, n, k = sizes
    library, rng, number = ctypes.CDLL(None), np.random.default_rng(7), ctypes.c_float
    first, behind = (ctypes.cast(found.cblas_sgemm, ctypes.c_void_p).value for found in (library, openblas()))
    assert first != behind
    a, b, c = (rng.standard_normal(shape).astype(np.float32) for shape in ((m, k), (k, n), (m, n)))
    for trans_a in (PLAIN, TRANSPOSED):
        for trans_b in (PLAIN, TRANSPOSED):
            left, right = stored(a, trans_a == TRANSPOSED, 2), stored(b, trans_b == TRANSPOSED, 3)
            out = stored(c if beta else np.full_like(c, np.nan), False, 4)
            forms, sizes = (ROW_MAJOR, trans_a, trans_b), (m, n, k)
            matrices = pointer(left), left.shape[1], pointer(right), right.shape[1]
            library.cblas_sgemm(*forms, *sizes, number(0.7), *matrices, number(beta), pointer(out), out.shape[1])
            truth = 0.7 * a.astype(np.float64) @ b + (beta * c if beta else 0)
            limit = (k + 2) * 2**-23 * (np.abs(a).astype(np.float64) @ np.abs(b) + np.abs(c))
            assert (np.abs(out[:, :n] - truth) <= limit).all()
            assert np.isnan(out[:, n:]).all()


@needed
def test_products_of_mlx_with_one_row():
    """Views, batches, bias, and a product over nothing, in memory that was full of NaN."""
    rng = np.random.default_rng(8)
    x, w = rng.standard_normal((3, 1, 67)).astype(np.float32), rng.standard_normal((3, 31, 67)).astype(np.float32)
    X, W, bias = mx.array(x), mx.array(w), mx.arange(31).astype(mx.float32)
    truth = x.astype(np.float64) @ w.swapaxes(1, 2)
    limit = 67 * 2**-23 * (np.abs(x).astype(np.float64) @ np.abs(w).swapaxes(1, 2) + 31)
    for form in (
        lambda: X @ W.swapaxes(1, 2),
        lambda: (W @ X.swapaxes(1, 2)).swapaxes(1, 2),
        lambda: X @ mx.contiguous(W.swapaxes(1, 2)),
        lambda: mx.stack([X[i] @ W[i].T for i in range(3)]),
        lambda: mx.stack([W[i] @ X[i, 0] for i in range(3)])[:, None],
        lambda: mx.stack([mx.addmm(bias, X[i], W[i].T) for i in range(3)]) - bias,
        lambda: mx.repeat(X, 2, axis=2)[..., ::2] @ W.swapaxes(1, 2),
    ):
        mx.eval([mx.full((n,), mx.nan) for n in (31, 93, 67)])  # freed at once, to be taken by what follows
        assert (np.abs(np.array(form()) - truth) <= limit).all()
    assert (X[..., :0] @ W.swapaxes(1, 2)[:, :0] == 0).all()


@needed
@pytest.mark.parametrize("form", [lambda x, w: x @ w, lambda x, w: mx.contiguous(w.T) @ x.T, lambda x, w: w.T @ x.T])
def test_long_sums_are_as_exact_as_short_ones(form):
    """In sequence these would be off by 6e-6 of themselves."""
    rng = np.random.default_rng(9)
    x, w = np.ones((1, 40_000), np.float32), rng.uniform(2, 4, (40_000, 33)).astype(np.float32)
    truth = x.astype(np.float64) @ w
    assert np.abs(np.array(form(mx.array(x), mx.array(w))).ravel() / truth.ravel() - 1).max() <= 1e-6


SHOW = """
from mlx_xformer.backend.linux import blas
import mlx.core as mx
x = mx.arange(5).astype(mx.float32)[None]
print(blas.one_row, blas.words.count("by cblas_sgemm"), (x @ x.T).item())
"""


@needed
@pytest.mark.parametrize(
    "before", ["", "import tempfile, subprocess\ndef run(*a, **k): raise OSError\nsubprocess.run = run"]
)
@pytest.mark.parametrize("environment", [{}, {"PATH": ""}, {"TMPDIR": "/nowhere"}])
def test_with_a_compiler_and_without(before, environment):
    """What cannot be compiled, or not be written, is done without; where there is no home makes no difference."""
    there = not before and "PATH" not in environment
    code = f"{before}\nimport os\nos.environ.pop('HOME', None)\n{SHOW}"
    answer = run(code, **environment)
    assert answer.stdout == f"{there} {int(not there)} 30.0\n", answer.stderr


@needed
def test_one_row_is_cblas_sgemv_s(monkeypatch):
    """Bit for bit, which cblas_sgemm's result is not."""
    rng = np.random.default_rng(3)
    x, w = rng.standard_normal((1, 300)).astype(np.float32), rng.standard_normal((400, 300)).astype(np.float32)
    one, many, number = np.zeros((1, 400), np.float32), np.zeros((1, 400), np.float32), ctypes.c_float
    library, given = openblas(), (pointer(w), 300, pointer(x))
    library.cblas_sgemv(ROW_MAJOR, PLAIN, 400, 300, number(1), *given, 1, number(0), pointer(one), 1)
    sizes = (ROW_MAJOR, PLAIN, TRANSPOSED, 1, 400, 300)
    library.cblas_sgemm(*sizes, number(1), pointer(x), 300, pointer(w), 300, number(0), pointer(many), 400)
    out = np.array(mx.array(x) @ mx.array(w).T)
    assert np.array_equal(out, one) and not np.array_equal(one, many)
