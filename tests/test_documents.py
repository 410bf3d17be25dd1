"""What the README and the examples say is run."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import run_script
from support.text import language_model, word_tokenizer

from mlx_xformer.cli import _parser

ROOT = Path(__file__).parent.parent
TRAINER = ROOT / "examples" / "trainer.py"  # what others import
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.mark.parametrize("place", ["elsewhere", pytest.param("clone", marks=pytest.mark.slow)])
@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(tmp_path, code, place):
    """In any folder, and in the clone, where Python imports the package from the current folder."""
    folder = ROOT if place == "clone" else tmp_path
    answer = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=folder, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    if "print(" in code:
        assert answer.stdout.startswith("separated/demo/vocals.flac 8.0 {'drums': 1.0, ")
        assert answer.stdout.endswith(
            "{'drums': (2, 352800), 'bass': (2, 352800), 'other': (2, 352800), 'vocals': (2, 352800)}\n"
        )


def test_commands_are_understood():
    """Every mlx-xformer line of the README parses, and every make target exists."""
    lines = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    commands = [shlex.split(line.partition("mlx-xformer ")[2]) for line in lines if "mlx-xformer " in line]
    assert len(commands) >= 12
    for command in commands:
        if "--list-models" not in command:  # prints them and exits
            _parser().parse_args(command)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {line.split()[1] for line in lines if line.startswith("make ")} <= targets


def test_the_tree_is_there():
    tree = re.search(r"```\n(mlx_xformer/.*?)```", README, re.S).group(1)
    names = re.findall(r"(?:^|\s)([a-z_]+\.(?:py|md)|[a-z_/]+/)(?=\s|$)", tree)
    assert len(names) >= 15
    folders = [ROOT, ROOT / "docs", ROOT / "tests", *(ROOT / "mlx_xformer").glob("**/")]
    for name in names:
        assert any((folder / name).exists() for folder in folders), name


def test_example_separate(tmp_path):
    script = ROOT / "examples" / "separate.py"
    command = [sys.executable, script, ROOT / "mlx_xformer" / "data" / "demo.flac", "htdemucs_mini", tmp_path / "out"]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    names = sorted(p.name for p in (tmp_path / "out" / "demo").iterdir())
    assert names == ["bass.wav", "drums.wav", "other.wav", "vocals.wav"]


def test_example_convert(tmp_path):
    """There, back to PyTorch's layout, and through the example."""
    from mlx_xformer.converters.conversion import convert

    convert(ROOT / "mlx_xformer" / "data" / "htdemucs_mini", tmp_path / "theirs", to="pytorch")
    command = [sys.executable, ROOT / "examples" / "convert.py", tmp_path / "theirs", tmp_path / "ours"]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert float(answer.stdout.split()[-1]) < 1e-5
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["family"] == "htdemucs"


def test_example_generate(tmp_path):
    folder = word_tokenizer(language_model(tmp_path / "model"))
    command = [sys.executable, ROOT / "examples" / "generate.py", folder, "w3 w1 w4", "0.5"]
    answers = [subprocess.run(command, capture_output=True, text=True) for _ in range(2)]
    assert answers[0].returncode == 0, answers[0].stderr
    assert answers[0].stdout == answers[1].stdout and len(answers[0].stdout.split()) > 20


WITH_ORDER_CHECKED = """
import os, runpy, sys

class Order:
    def find_spec(self, name, *_):
        if name == "mlx" and "mlx_xformer" not in sys.modules:
            raise ImportError("mlx is imported before mlx_xformer")

path = sys.argv[1]
sys.meta_path.insert(0, Order())
sys.path[0], sys.argv = os.path.dirname(path), [path, "--help"]
runpy.run_path(path, run_name="__main__")
"""


@pytest.mark.parametrize("path", sorted({*(ROOT / "examples").glob("*.py")} - {TRAINER}), ids=lambda p: p.name)
def test_examples_have_help_and_import_the_package_before_mlx(path):
    """The first import chooses the BLAS on Linux: after MLX's own, products are several times slower."""
    answer = subprocess.run([sys.executable, "-c", WITH_ORDER_CHECKED, path], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith(f"usage: {path.name} ")


@pytest.mark.parametrize(
    "words",
    [
        ["generate.py", "nowhere/x/y", "w3"],
        ["embed.py", "nowhere/x/y"],
        ["transcribe.py", "nowhere/x/y", "nowhere.wav"],
        ["separate.py", "nowhere.wav", "htdemucs_mini"],
        ["convert.py", "nowhere/x/y", "out"],
    ],
    ids=lambda w: w[0],
)
def test_examples_say_in_a_line_what_is_wrong(words):
    answer = run_script(ROOT / "examples" / words[0], *words[1:])
    missing = "nowhere.wav does not exist" if words[0] == "separate.py" else "nowhere/x/y: no such file or folder"
    assert answer == (1, "", f"{words[0]}: {missing}\n")


@pytest.mark.parametrize("path", sorted({*(ROOT / "examples").glob("*.py")} - {TRAINER}), ids=lambda p: p.name)
def test_examples_are_short(path):
    limit = 190 if path.name in ("train_moe.py", "compare_moe.py") else 60
    assert len(path.read_text().splitlines()) <= limit
