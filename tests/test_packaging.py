"""The sdist and the wheel hold the whole package, converters included; both ways to a wheel give the same one."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = {
    "mlx_xformer/py.typed",
    "mlx_xformer/backend/linux/one_row.c",
    "mlx_xformer/data/demo.flac",
    "mlx_xformer/data/htdemucs_mini/config.json",
    "mlx_xformer/data/htdemucs_mini/model.safetensors",
    *(f"mlx_xformer/separation/report/data/{name}" for name in ("base.css", "page.css", "page.html", "page.js")),
    *(f"mlx_xformer/separation/report/data/{name}" for name in ("index.css", "index.html")),
}


def build(source, out, *kinds):
    """The files that `python -m build` makes of a source folder."""
    command = [sys.executable, "-m", "build", *kinds, "--outdir", out, source]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout[-2000:] + answer.stderr[-2000:]
    return sorted(out.iterdir())


def contents(wheel):
    """Names and checksums of a wheel's files."""
    with zipfile.ZipFile(wheel) as files:
        return {info.filename: info.CRC for info in files.infolist()}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clean clone: nothing that git does not know."""
    folder = tmp_path_factory.mktemp("clone") / "mlx-xformer"
    subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{ROOT}", folder], check=True)
    return folder


@pytest.mark.slow
def test_a_wheel_from_the_sdist_is_that_from_the_clone(clone, tmp_path):
    through_sdist, sdist = build(clone, tmp_path / "both")
    (direct,) = build(clone, tmp_path / "wheel", "--wheel")
    assert contents(through_sdist) == contents(direct)
    listed = subprocess.run(["git", "ls-files", "mlx_xformer"], cwd=clone, capture_output=True, text=True, check=True)
    package = set(listed.stdout.split())
    assert {name for name in contents(direct) if "dist-info" not in name} == package >= DATA
    assert "mlx_xformer/converters/conversion.py" in package
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert package <= held


def test_converters_at_the_top_level_are_those_of_the_package():
    assert (ROOT / "converters").samefile(ROOT / "mlx_xformer" / "converters")
