"""The arguments of separate: its help, options of other programs, progress as JSON, and what is said of licences."""

import argparse
import json
import shlex

import pytest
from support.audio import write_noise
from support.models import FAST, checkpoint
from support.processes import run_command

from mlx_xformer.cli import _parser, progress
from mlx_xformer.cli.other_programs import _OPTIONS
from mlx_xformer.separation.run import Progress


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("models") / "tiny", segment="1/1", **FAST)


@pytest.fixture
def song(tmp_path):
    return write_noise(tmp_path / "song.wav", 3001)


# Options of other programs


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        (["--mp3"], "--mp3: did you mean --format mp3?"),
        (["--flac"], "--flac: did you mean --format flac?"),
        (["--int24"], "--int24: did you mean --bits 24?"),
        (["--float32"], "--float32: did you mean --bits 32?"),
        (["--clip-mode", "clamp"], "--clip-mode: did you mean --clip clamp?"),
        (["--clip-mode=rescale"], "--clip-mode: did you mean --clip rescale?"),
        (["-d", "cpu"], "-d: did you mean --device cpu?"),
        (["-dmps"], "-d: did you mean --device gpu?"),
        (["--device", "mps"], "--device mps: did you mean --device gpu?"),
        (["--mps"], "--mps: did you mean --device gpu?"),
        (["-j", "2"], "-j: leave it out: all cores work on one song"),
        (["-v"], "-v: leave it out"),
        (["--no-split"], "--no-split: leave it out"),
        (["--repo", "models"], "--repo: did you mean -n models/NAME.yaml, or -n with the path of another model file?"),
        (["-s", "955717e8"], "-s: did you mean -n with the path of the model file?"),
        (["--mp3-preset", "2"], "--mp3-preset: did you mean --mp3-bitrate KBPS?"),
        (["-n", "hdemucs_mmi"], "-n hdemucs_mmi: not an HTDemucs, the only kind here; did you mean -n htdemucs?"),
        (["--name", "mdx_extra_q"], "did you mean -n htdemucs_ft?"),
        (["--output_format=FLAC"], "--output_format: did you mean --format FLAC?"),
        (["--single_stem", "vocals"], "--single_stem: did you mean --stems vocals?"),
        (["--track-name", "x"], '--track-name: did you mean --filename "NAME/{stem}.{ext}"?'),
    ],
    ids=str,
)
def test_options_of_other_programs_give_one_line(tmp_path, song, given, hint):
    code, out, err = run_command("separate", *given, song, "-o", tmp_path / "out")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("mlx-xformer: ") and hint in err
    assert not (tmp_path / "out").exists()


def test_hints_name_options_that_there_are():
    separate = next(a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)).choices["separate"]
    ours = {
        option for action in separate._actions if action.help != argparse.SUPPRESS for option in action.option_strings
    }
    assert not ours & _OPTIONS.keys()
    for hint in _OPTIONS.values():
        named = {word.strip('?,"') for word in hint.split() if word.startswith("-")}
        assert named <= ours, hint


@pytest.mark.parametrize("name", ["mdx", "htdemucs.yaml"])
def test_a_model_of_ones_own_may_have_any_name(model, tmp_path, song, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).symlink_to(model)
    assert run_command("separate", song, "-n", name)[0] == 0


def test_no_option_is_abbreviated(song):
    """--repo of demucs was taken for --report, and its folder for songs."""
    parsers = [_parser()]
    commands = next(a for a in parsers[0]._actions if isinstance(a, argparse._SubParsersAction)).choices
    assert len(commands) == 5
    for parser in (*parsers, *commands.values()):
        assert parser.allow_abbrev is False
    for given in (["separate", "--repor", song], ["generate", "m", "p", "--max", "3"], ["--vers"]):
        code, out, err = run_command(*given)
        assert (code, out) == (2, "") and "usage: mlx-xformer" in err


# Help


def test_help_has_groups_and_examples_that_are_understood():
    code, text, _ = run_command("separate", "--help")
    assert code == 0
    for title in ("input:", "model:", "stems:", "files:", "messages:"):
        assert f"\n{title}\n" in text
    assert not {"--mp3", "--repo", "-j"} & set(text.replace("[", " ").replace("]", " ").split())
    examples = text.partition("\nexamples:\n")[2].splitlines()
    commands = [line.strip().split("   ")[0] for line in examples if line.startswith("  mlx-xformer separate ")]
    assert len(commands) == 5
    for command in commands:
        _parser().parse_args(shlex.split(command)[1:])


# Progress


def test_progress_as_json(model, tmp_path, song):
    """Lines on standard error, one at the end, and the result on standard output as ever."""
    given = ["-n", model, "-o", tmp_path / "out", "--shifts", 0, "--batch-size", 1, "--segment", 0.05]
    code, out, err = run_command("separate", song, *given, "--progress", "json", "--json")
    events = [json.loads(line) for line in err.splitlines()]
    assert code == 0 and json.loads(out)["file"] == str(song)
    assert {event["event"] for event in events} == {"progress"} and {event["file"] for event in events} == {str(song)}
    done = [event["done"] for event in events]
    assert done == sorted(done) and 0 < done[0] < 0.2 and done[-1] == 1 and events[-1]["remaining_s"] == 0
    assert err.isascii()


def test_progress_is_printed_a_few_times_a_second(tmp_path, monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.show_progress(tmp_path / "曲.wav", "json") as update:
        for done in range(1, 1001):
            update(Progress(done, 1000, done * 0.01))
            now[0] += 0.01
    err = capsys.readouterr().err
    lines = [json.loads(line) for line in err.splitlines()]
    assert err.isascii() and 30 <= len(lines) <= 40  # of ten seconds
    assert lines[0]["done"] == 0.001 and lines[-1] == {
        "event": "progress",
        "file": str(tmp_path / "曲.wav"),
        "done": 1.0,
        "remaining_s": 0.0,
    }


# Licences


def test_what_is_known_of_licences(model, tmp_path):
    released = json.loads((model / "config.json").read_text())
    released["provenance"] = {"sources": [{"file": "955717e8-8726e21a.th", "sha256": "0" * 64}]}
    folder = tmp_path / "released"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(released))
    (folder / "model.safetensors").symlink_to(model / "model.safetensors")
    known = "the code is MIT; the released HTDemucs weights carry no clear licence"
    assert f"  licence     {known}" in run_command("info", folder)[1]
    assert "licence" not in run_command("info", model)[1]
    code, out, err = run_command("separate", "--list-models")
    assert code == 0 and err == f"Licence: {known}.\n" and "licence" not in out
