"""The examples that train mixtures: they learn, what they save speaks, they stop and go on, and say what is wrong."""

import hashlib
import json
import lzma
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from support.processes import BIN, run, run_script

from mlx_xformer import Tokenizer, load

EXAMPLES = Path(__file__).parents[2] / "examples"
TRAIN, COMPARE = EXAMPLES / "train_moe.py", EXAMPLES / "compare_moe.py"


@pytest.fixture
def text(tmp_path):
    """A short text, so that nothing takes long."""
    path = tmp_path / "text.txt"
    path.write_text("Der Käse war alt, die Maus war jung. " * 211, "utf-8")
    return path


def start(script, *arguments):
    return run(([sys.executable, script, *arguments], {}))[0]


def notes(folder):
    return json.loads((folder / "training.json").read_text())


def stopped(folder):
    """What is kept of a training that was stopped."""
    state, told = mx.load(str(folder / "state.safetensors"), return_metadata=True)
    record = json.loads(told["record"])
    assert state["optimizer.step"].item() == len(record["loss"]) == len(record["load"])
    return record


def test_a_few_steps_learn_and_the_model_speaks(tmp_path):
    """Of the book that the examples ship."""
    code, out, err = start(TRAIN, tmp_path / "out", "--steps", 13)
    assert code == 0 and "busiest expert" in out and "13/13" in err, err
    record = notes(tmp_path / "out")
    assert len(record["loss"]) == 13 and record["loss"][-1] < record["loss"][0] - 2
    assert record["held_out"] < 3.5  # of ln 256, 5.5
    loads = np.array(record["load"])
    assert loads.shape == (13, 3, 8) and (loads.sum(axis=-1) == 16 * 128 * 2).all()
    code, out, err = run(
        ([BIN / "mlx-xformer", "generate", tmp_path / "out" / "model", "I say", "--max-tokens", 11], {})
    )[0]
    assert code == 0 and out.strip(), err


@pytest.mark.slow
def test_it_stops_and_goes_on_as_if_it_had_not(tmp_path, text):
    arguments = ["--text", text, "--steps", 23, "--no-balance", "--seed", 5]
    assert start(TRAIN, tmp_path / "whole", *arguments)[0] == 0
    command = list(map(str, [sys.executable, TRAIN, tmp_path / "parts", *arguments]))
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        seen = b""
        while b"| 3/23" not in seen:
            more = child.stderr.read1()
            assert more, seen.decode()
            seen += more
        child.send_signal(signal.SIGINT)
        assert b"run the same command again to continue" in child.communicate(timeout=60)[1] and child.returncode == 1
    finally:
        child.kill()
    assert 3 <= len(stopped(tmp_path / "parts")["loss"]) < 23
    assert start(TRAIN, tmp_path / "parts", *arguments)[0] == 0
    whole, parts = (notes(tmp_path / name) for name in ("whole", "parts"))
    assert all(whole[name] == parts[name] for name in whole.keys() - {"seconds"})
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1] and not (tmp_path / "parts" / "state.safetensors").exists()
    assert start(TRAIN, tmp_path / "parts", *arguments)[2] == ""  # it is there already


@pytest.mark.slow
def test_impatience_does_no_harm(tmp_path, text):
    """Several Ctrl-C: none falls on what is being written."""
    command = list(map(str, [sys.executable, TRAIN, tmp_path / "out", "--text", text, "--steps", 5000]))
    for count in (1, 2):
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            seen = b""
            while not re.search(rb"\| \d+/5000 \[.*step/s", seen):
                more = child.stderr.read1()
                assert more, seen.decode()
                seen += more
            while child.poll() is None:
                child.send_signal(signal.SIGINT)
                time.sleep(0.002)
        finally:
            child.kill()
            child.communicate()
        assert len(stopped(tmp_path / "out")["loss"]) >= count
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["state.safetensors"]


def test_where_no_model_can_be_written_the_training_is_not_lost(tmp_path, text):
    out, arguments = tmp_path / "out", ["--text", text, "--steps", 3]
    (out / "model").mkdir(parents=True)
    (out / "model" / "letter.txt").write_text("mine")
    code, _, err = run_script(TRAIN, out, *arguments)
    assert code == 1 and "must be new or empty or a checkpoint, it holds letter.txt" in err, err
    loss = stopped(out)["loss"]
    (out / "model").rename(out / "mine")
    code, _, err = run_script(TRAIN, out, *arguments)
    assert code == 0 and notes(out)["loss"] == loss and (out / "model" / "config.json").is_file(), err


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("training.json", "{", "hold a run that can be read"),
        ("training.json", "[1]", "hold a run that can be read"),
        ("training.json", '{"loss": []}', "hold a run that can be read"),
        ("training.json", '{"held_out": 1.0}', "of the same text, loss, seed and steps"),
        ("state.safetensors", "half", "hold a run that can be read"),
        ("state.safetensors", None, "hold a run that can be read"),
    ],
)
def test_what_was_kept_and_is_no_good_is_one_line(tmp_path, text, name, content, reason):
    path = tmp_path / "out" / name
    path.parent.mkdir()
    if content is None:
        mx.save_safetensors(str(path), {"model.none": mx.array(0)})
    else:
        path.write_text(content)
    code, _, err = run_script(TRAIN, path.parent, "--text", text, "--steps", 3)
    assert code == 1 and err.count("\n") == 1 and "OUT must be new, " in err and reason in err, err


def test_a_folder_that_cannot_be_written_is_told_before_training(tmp_path, text):
    """Here as a folder is in the way, which stops root too."""
    (tmp_path / "out" / "new-state.safetensors").mkdir(parents=True)
    code, _, err = run_script(TRAIN, tmp_path / "out", "--text", text, "--steps", 5000)
    assert code == 1 and err.count("\n") == 1 and "new-state.safetensors" in err, err


def test_what_is_measured_is_of_the_text_held_out(tmp_path, text):
    """By hand, from the model that was saved, on more than fits one batch."""
    text.write_text(text.read_text("utf-8") * 11, "utf-8")
    assert run_script(TRAIN, tmp_path / "out", "--text", text, "--steps", 7)[0] == 0
    model, tokenizer = load(tmp_path / "out" / "model"), Tokenizer(tmp_path / "out" / "model")
    tokens = tokenizer.encode(text.read_text("utf-8"))
    assert len(tokens) == len(text.read_bytes()) and tokenizer.decode(tokens) == text.read_text("utf-8")
    held = tokens[len(tokens) * 9 // 10 :]
    rows = [held[i : i + 129] for i in range(0, len(held) - 128, 129)]
    losses, load_of = [], np.zeros((3, 8))
    for row in rows:
        routings = []
        logits = np.array(model(mx.array([row[:-1]]), routings=routings)[0], np.float64)
        logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        losses.append(-logits[np.arange(128), row[1:]].mean())
        for layer, routing in enumerate(routings):
            load_of[layer] += np.bincount(np.array(routing.experts).ravel(), minlength=8)
    record = notes(tmp_path / "out")
    assert len(rows) > 64 and abs(record["held_out"] - np.mean(losses)) < 1e-4
    assert record["imbalance"] == pytest.approx((load_of.max(axis=1) / (256 * len(rows) / 8)).tolist())


@pytest.mark.slow
def test_comparison(tmp_path, text):
    code, out, err = start(COMPARE, tmp_path / "out", "--seeds", "3,7", "--steps", 5, "--text", text)
    assert code == 0, err
    assert out == (tmp_path / "out" / "table.md").read_text()
    rows = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith(("| 3 ", "| 7 "))]
    for (seed, *cells), number in zip(rows, (3, 7), strict=True):
        assert int(seed) == number
        for i, name in enumerate(("with", "without")):
            record = notes(tmp_path / "out" / f"{name}-{number}")
            found = max(record["imbalance"])
            assert cells[i].strip() == f"{found:.2f} (layer {record['imbalance'].index(found)})"
            assert float(cells[2 + i]) == round(record["held_out"], 3)
            assert (record["alpha"] > 0) == (name == "with")
    for name in ("load.png", "loss.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    (tmp_path / "out" / "table.md").unlink()
    (tmp_path / "out" / "table.md").mkdir()
    code, _, err = start(COMPARE, tmp_path / "out", "--seeds", "3,7", "--steps", 5, "--text", text)
    assert code == 1 and err.count("\n") == 1 and "table.md" in err, err


@pytest.mark.parametrize("script", [TRAIN, COMPARE], ids=lambda path: path.name)
def test_help(script):
    code, out, err = start(script, "--help")
    assert code == 0 and "the same command continues" in out and "--steps" in out, err


def test_what_is_wrong_is_one_line(tmp_path, text):
    short = tmp_path / "short.txt"
    short.write_text("too short")
    broken = tmp_path / "broken.xz"
    broken.write_bytes(b"no archive")
    done = tmp_path / "done"
    assert run_script(TRAIN, done, "--text", text, "--steps", 2)[0] == 0
    for arguments, reason in {
        ("--text", short): f"the text must have at least 2560 bytes, got 9 in {short}",
        ("--text", tmp_path / "gone.txt"): "gone.txt",
        ("--text", broken): "broken.xz: not a UTF-8 text (",
        ("--text", text, "--steps", 3): f"must be new, or of the same text, loss, seed and steps, got {done}",
    }.items():
        for script in (TRAIN, COMPARE) if "--steps" not in arguments else (TRAIN,):
            folder = done if "--steps" in arguments else tmp_path / "never"
            code, out, err = run_script(script, folder, *arguments)
            assert code == 1 and out == "" and err.count("\n") == 1 and reason in err, err
    for script, *arguments in (
        (TRAIN, "--steps", 0),
        (TRAIN, "--seed", -1),
        (TRAIN, "--seed", 2**63),
        (COMPARE, "--steps", -3),
    ):
        code, _, err = run_script(script, tmp_path / "never", *arguments)
        assert (
            code == 1 and err.count("\n") == 1 and "steps must be at least 1 and seed from 0 to 2^63 - 1, got" in err
        ), err
    assert run_script(COMPARE, tmp_path / "never", "--seeds", "1,x")[0] == 2 and not (tmp_path / "never").exists()


def test_the_readme_says_where_the_book_is_from_and_its_figures_meet_the_bar():
    readme = (EXAMPLES / "README.md").read_text("utf-8")
    book = lzma.decompress((EXAMPLES / "sherlock_holmes.txt.xz").read_bytes())
    assert hashlib.sha256(book).hexdigest() in readme and b"gutenberg" not in book.lower()
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \(layer \d\) \| ([\d.]+) \(layer \d\) \|", readme, re.M)
    assert len(rows) == 3
    for _, balanced, free in rows:
        assert float(balanced) < 1.3 and float(free) >= float(balanced) + 0.2
    for name in re.findall(r"!\[.*?\]\((.*?)\)", readme):
        assert (EXAMPLES / name).is_file()
