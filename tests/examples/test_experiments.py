"""The experiments of llm_prep (S1-28): losses fall, a stopped run ends as any other, what is refused."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.processes import run_script

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
import autoregressive  # noqa: E402
import encoder_decoder  # noqa: E402
import regression  # noqa: E402
import trainer  # noqa: E402

sys.path.remove(str(EXAMPLES))
EXPERIMENTS = {module.__name__: module.EXPERIMENT for module in (regression, autoregressive, encoder_decoder)}
named = pytest.mark.parametrize("name", EXPERIMENTS)


def arrays(run):
    parts = {"model": run.model.parameters(), "optimizer": run.optimizer.state}
    return {**dict(tree_flatten(parts)), "losses": mx.array(run.losses)}


def same(one, other):
    one, other = arrays(one), arrays(other)
    assert one.keys() == other.keys() and len(one) > 20
    for name, x in one.items():
        assert x.dtype == other[name].dtype and mx.array_equal(x, other[name]), name


def disturbed(experiment, at, how):
    """The experiment, in which something happens as a step begins."""
    calls = []

    def batch(rng):
        calls.append(1)
        if len(calls) == at:
            how()
        return experiment.batch(rng)

    return dataclasses.replace(experiment, batch=batch)


@named
def test_a_few_steps_lower_the_loss(tmp_path, name):
    run = trainer.train(EXPERIMENTS[name], tmp_path, seed=0, steps=60)
    assert len(run.losses) == 60
    assert np.mean(run.losses[-5:]) < 0.9 * np.mean(run.losses[:5])


@named
def test_an_interrupted_run_ends_as_any_other(tmp_path, name):
    """Ctrl-C ends the step at hand and saves; what goes on from there has the same parameters, moments and losses, bit
    for bit, and every batch is seen once."""
    whole = trainer.train(EXPERIMENTS[name], tmp_path / "whole", seed=3, steps=11)
    stopping = disturbed(EXPERIMENTS[name], 5, lambda: os.kill(os.getpid(), signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(stopping, tmp_path / "parts", seed=3, steps=11)
    assert signal.getsignal(signal.SIGINT) is before
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["state.safetensors"]
    assert len(mx.load(str(tmp_path / "parts" / "state.safetensors"))["losses"]) == 5
    resumed = trainer.train(EXPERIMENTS[name], tmp_path / "parts", seed=3, steps=11)
    same(whole, resumed)
    same(whole, trainer.train(EXPERIMENTS[name], tmp_path / "whole", seed=3, steps=11))


def test_a_run_that_died_goes_on_from_what_was_saved(tmp_path, monkeypatch):
    experiment = EXPERIMENTS["regression"]
    whole = trainer.train(experiment, tmp_path / "whole", seed=1, steps=9)
    monkeypatch.setattr(trainer, "EVERY", 4)

    def die():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train(disturbed(experiment, 7, die), tmp_path / "parts", seed=1, steps=9)
    assert len(mx.load(str(tmp_path / "parts" / "state.safetensors"))["losses"]) == 4
    same(whole, trainer.train(experiment, tmp_path / "parts", seed=1, steps=9))


@named
def test_seeds_differ_and_held_out_data_is_other_data(tmp_path, name):
    experiment = EXPERIMENTS[name]
    one, other = (trainer.train(experiment, tmp_path / str(seed), seed=seed, steps=2) for seed in (0, 1))
    assert one.losses != other.losses
    seen = [experiment.batch(np.random.default_rng((0, step)))[0] for step in range(8)]
    held = experiment.batch(np.random.default_rng((0, 0, 1)))[0]
    assert not any(mx.array_equal(held, x) for x in seen)
    assert trainer.held_out(experiment, one.model, 0) == trainer.held_out(experiment, one.model, 0)


def test_what_is_learnt():
    """The targets: a scaled sum, the next of each position, the reversed source; inputs shifted by one step."""
    rng = np.random.default_rng
    x, target = regression.batch(rng(0))
    assert mx.allclose(target[:, 0] * 96**0.5, x.sum(axis=(1, 2)), atol=1e-4)
    source, shifted, target = encoder_decoder.batch(rng(0))
    assert mx.array_equal(target[:, 0], source[:, -1]) and mx.array_equal(target[:, -1], source[:, 0])
    assert mx.array_equal(shifted[:, 1:], target[:, :-1]) and (shifted[:, 0] == 0).all()
    (wave,) = autoregressive.batch(rng(0))
    last = wave[:, 1:-1] * 2 * mx.cos(mx.arccos((wave[:, 2:3] + wave[:, :1]) / 2 / wave[:, 1:2])) - wave[:, :-2]
    assert mx.median(mx.abs(last - wave[:, 2:])).item() < 1e-3  # sin(a + r) = 2 cos(r) sin(a) - sin(a - r)


@named
def test_the_readme_has_the_limits_and_figures_below_them(name):
    """Three seeds, as many steps as the script takes, every loss below its limit, and the picture."""
    text = (EXAMPLES / "README.md").read_text()
    lines = text[text.index(f"| {name} |") :].splitlines()[:3]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert rows[0][1] == str(EXPERIMENTS[name].steps) and [row[2] for row in rows] == ["0", "1", "2"]
    assert all(float(row[4]) < float(row[5]) == EXPERIMENTS[name].limit < float(row[3]) for row in rows)
    assert sum(float(row[6]) for row in rows) < 120
    assert f"({name}_loss.png)" in text and (EXAMPLES / f"{name}_loss.png").exists()


def command(name, *arguments):
    code, out, err = run_script(EXAMPLES / f"{name}.py", *arguments)
    return subprocess.CompletedProcess(name, code, out, err)


@named
def test_the_command(tmp_path, name):
    """A table and a picture; too few steps do not get below the limit, and say so."""
    answer = command(name, tmp_path / "out", "--seeds", "4", "5", "--steps", "2")
    assert answer.returncode == 1
    assert answer.stderr.splitlines()[-1].startswith(f"{name}.py: the loss must end below {EXPERIMENTS[name].limit}, ")
    table = (tmp_path / "out" / "table.md").read_text()
    assert table == answer.stdout and [line.split()[1] for line in table.splitlines()[2:4]] == ["4", "5"]
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    other = command(name, tmp_path / "out", "--seeds", "4", "--steps", "3")
    assert other.returncode == 1 and "OUT must be new, or of the same seed and steps" in other.stderr
    assert "Traceback" not in answer.stderr + other.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps must be at least 1 and seeds at least 0, got 0"),
        (["--seeds", "-1"], "steps must be at least 1 and seeds at least 0"),
    ],
)
def test_commands_that_are_refused(tmp_path, arguments, message):
    answer = command("regression", tmp_path / "out", *arguments)
    assert answer.returncode == 1 and message in answer.stderr and "Traceback" not in answer.stderr


@pytest.mark.parametrize("other", [False, True])
def test_a_state_that_is_none(tmp_path, other):
    path = tmp_path / "out" / "seed-0" / "state.safetensors"
    path.parent.mkdir(parents=True)
    mx.save_safetensors(str(path), {"a": mx.zeros(3)})
    path.write_bytes(path.read_bytes() if other else path.read_bytes()[:20])
    answer = command("regression", tmp_path / "out", "--seeds", "0", "--steps", "2")
    assert answer.returncode == 1 and f"{path}: not a saved run (" in answer.stderr.splitlines()[-1]
    assert "Traceback" not in answer.stderr


def test_a_missing_matplotlib_is_told_before_training(tmp_path):
    hidden = "import runpy, sys; sys.modules['matplotlib'] = None; sys.path.insert(0, sys.argv[1]); "
    hidden += "sys.argv = ['regression.py', sys.argv[2]]; runpy.run_module('regression', run_name='__main__')"
    given = [sys.executable, "-c", hidden, EXAMPLES, tmp_path / "out"]
    answer = subprocess.run(given, capture_output=True, text=True)
    assert answer.returncode == 1 and answer.stderr.startswith("regression.py: ") and "matplotlib" in answer.stderr
    assert not (tmp_path / "out").exists() and "Traceback" not in answer.stderr
