"""mlx-xformer parity: what it prints, and its exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from support.models import checkpoint

import mlx_xformer
from mlx_xformer import parity
from mlx_xformer.cli import main
from mlx_xformer.nn.attention import scores

MINI = Path(mlx_xformer.__file__).parent / "data" / "htdemucs_mini"


def test_a_proof(capsys):
    assert main(["parity", "glu", "causal_mask", "--seeds", "1", *["--dtype", "float16"] * 2]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [["glu", "float16"]] * 2 + [["causal_mask", "exact"]]
    assert lines[-1].startswith("passed: ")


def test_json_and_list(capsys):
    assert main(["parity", "relu", "--seeds", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["failed"] is False and {row["name"] for row in told["rows"]} == {"relu"}
    assert main(["parity", "--list"]) == 0
    assert tuple(capsys.readouterr().out.split()) == parity.NAMES


@pytest.mark.mutants
def test_a_planted_bug_is_named(capsys, monkeypatch):
    """A mask taken for its opposite: exit code 1, and the worst case by seed, sample and words."""
    part = scores.part_of
    monkeypatch.setattr(scores, "part_of", lambda x, *at: ~part(x, *at) if x.dtype == mx.bool_ else part(x, *at))
    assert main(["parity", "attention", "--seeds", "1", "--dtype", "float32"]) == 1
    lines = capsys.readouterr().out.splitlines()
    (failed,) = [line for line in lines if line.startswith("FAILED   attention float32:")]
    assert "largest error at seed 0 sample " in failed and "(nothing to attend): error " in failed
    assert lines[-1].startswith("FAILED: ")


@pytest.mark.slow
def test_a_model_by_its_name(capsys):
    assert main(["parity", "htdemucs_mini", "--seeds", "1"]) == 0
    assert "crosstransformer.layers_t.1 " in capsys.readouterr().out


def test_a_model_by_its_folder(tmp_path, capsys):
    assert main(["parity", str(checkpoint(tmp_path / "tiny")), "--seeds", "1"]) == 0
    assert "crosstransformer.layers_t.1 " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flash"], "names must be among attention, "),
        (["glu", "flash"], "got 'flash'"),
        (["nowhere/at/all"], "nowhere/at/all: no such folder"),
        (["nowhere/"], "nowhere: no such folder"),
        (["glu", str(MINI)], "a model must be given alone, got glu "),
        (["htdemucs_mini", "htdemucs_mini"], "a model must be given alone, got htdemucs_mini htdemucs_mini"),
        (["glu", "--seeds", "0"], "seeds must be at least one number from 0, got 0"),
        ([str(MINI), "--dtype", "float16"], "dtypes must be float32 where a folder is proven, got float16"),
        ([str(MINI / "config.json")], "config.json"),
    ],
)
def test_refusals(capsys, arguments, message):
    assert main(["parity", *arguments]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and message in said.err


def test_wrong_usage(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["parity", "--dtype", "float64"])
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and all(dtype in said for dtype in parity.DTYPES)


def test_products_are_not_rounded_to_tf32():
    """What MLX does with float32 on some GPUs by default; read once, hence in a process of its own."""
    code = (
        "import os; from mlx_xformer.cli import main; main(['parity', 'relu', '--seeds', '1']); "
        "print(os.environ['MLX_ENABLE_TF32'])"
    )
    for given, found in ({}, "0"), ({"MLX_ENABLE_TF32": "1"}, "1"):
        kept = {name: value for name, value in os.environ.items() if name != "MLX_ENABLE_TF32"}
        answer = subprocess.run([sys.executable, "-c", code], env={**kept, **given}, capture_output=True, text=True)
        assert answer.stdout.split()[-1] == found, answer.stderr
