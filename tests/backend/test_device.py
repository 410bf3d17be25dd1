"""What the process keeps of the memory that it frees, the bound on MLX's cache, and a machine without a backend."""

import os
import platform
import subprocess
import sys

import mlx.core as mx
import pytest

from mlx_xformer.backend import device, dispatch


def run(code, **environment):
    """The output of a fresh Python."""
    kept = {k: v for k, v in os.environ.items() if k != "MLX_XFORMER_BLAS"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=kept | environment)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept_unless_the_user_says_otherwise():
    code = """
import resource
from mlx_xformer.backend import device
import mlx.core as mx
def pages(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work(): mx.eval([mx.zeros((1 << 24,)) + n for n in range(2)])
work()
before = pages()
work()
print(device.keeps_memory, pages() - before < 1000)
"""
    assert run(code).stdout.split() == ["True", "True"]
    assert run(code, MLX_XFORMER_MALLOC="0").stdout.split() == ["False", "False"]
    assert run(code, MALLOC_TRIM_THRESHOLD_="200000000").stdout.split()[0] == "False"


def test_a_tighter_bound_of_the_host_program_stays():
    code = """
import mlx.core as mx
mx.set_cache_limit(12345)
import mlx_xformer
print(mlx_xformer.backend.device.report().cache_limit, mx.set_cache_limit(0))
"""
    assert run(code).stdout.split() == ["12345", "12345"]


def test_cache_is_bounded():
    assert 0 < device.report().cache_limit <= device.total_memory() // 8
    before = device.set_cache_limit()
    try:
        assert device.set_cache_limit(1 << 20) == 1 << 20
        for n in range(20):
            mx.eval(mx.zeros((1 << 18,)) + n)
        assert mx.get_cache_memory() <= 1 << 20
    finally:
        device.set_cache_limit(before)
    with pytest.raises(ValueError, match="limit must be at least 0 bytes, got -1"):
        device.set_cache_limit(-1)


def test_report():
    report = device.report()
    assert report.device in ("cpu", "gpu") and report.memory > 1 << 28 and report.blas == device.blas


def test_without_a_backend(tmp_path):
    """As after `pip install mlx-xformer` on Linux, without an extra: one line, no traceback."""
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").write_text("")
    (tmp_path / "mlx" / "core.py").write_text("raise ImportError('libmlx.so: cannot open shared object file')")
    code = "import sys; from mlx_xformer.cli import main; sys.exit(main(['info']))"
    answer = run(code, PYTHONPATH=str(tmp_path))
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr.count("\n") == 1 and "install one of mlx-xformer[cpu]" in answer.stderr
    answer = run("from mlx_xformer import separate", PYTHONPATH=str(tmp_path))
    assert answer.stderr.rstrip().splitlines()[-1].startswith("ImportError: MLX has no backend on this machine")
    assert run("import mlx_xformer; assert not hasattr(mlx_xformer, 'x')", PYTHONPATH=str(tmp_path)).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MLX compiles in memory")
def test_a_second_call_compiles_nothing(tmp_path):
    """MLX keeps the chains it compiles as libraries in the temporary folder: another track adds none."""
    code = """
import sys, pathlib
import mlx.core as mx
from mlx_xformer import HTDemucs, HTDemucsConfig, separate
config = HTDemucsConfig(sources=("a", "b"), channels=4, dconv_comp=2, dconv_mode=3, nfft=256, depth=2, t_layers=2,
                        t_heads=2, bottom_channels=8, samplerate=8000, segment=0.128)
model = HTDemucs(config)
for samples in (1500, 4000, 3000):
    separate(model, mx.random.normal((2, samples)), 8000)
    print(len(list(pathlib.Path(sys.argv[1]).rglob("*.so"))))
"""
    answer = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        capture_output=True,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert answer.returncode == 0, answer.stderr
    first, second, third = map(int, answer.stdout.split())
    assert first > 0 or not dispatch._FUSES
    assert first == second == third
