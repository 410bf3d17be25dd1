"""Several processes that mlx.launch starts share a folder of recordings, and write what one would."""

import json
import signal
from functools import partial
from pathlib import Path

import pytest
from support.audio import write_noise as noise
from support.models import FAST, STEMS, checkpoint
from support.processes import BIN, free_ports, run, run_command, side_by_side

LENGTHS = {"a": 10007, "b": 120011, "c": 40009, "d": 90001, "e": 20011}  # samples


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("models") / "tiny", segment="1/2", **FAST)


@pytest.fixture
def songs(tmp_path):
    folder = tmp_path / "songs"
    folder.mkdir()
    for seed, (name, samples) in enumerate(LENGTHS.items()):
        noise(folder / f"{name}.wav", samples, seed=seed)
    return folder


def plain(*arguments):
    """What one process answers: this one."""
    return run_command("separate", *arguments)


def launch(count, *arguments):
    """The command line by mlx.launch, which ends with 0 whatever became of what it started."""
    head = [BIN / "mlx.launch", "-n", count, "--backend", "ring", "--starting-port", free_ports()[0], "--"]
    return run(([*head, BIN / "mlx-xformer", "separate", *arguments], {}))[0]


def ring(folder, *arguments, **given):
    """Both processes' answers, started as mlx.launch starts them."""
    return side_by_side(folder, BIN / "mlx-xformer", "separate", *arguments, **given)


def files(folder):
    """{name: bytes} of all files below."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def done(stdout):
    """What --json says of each recording."""
    return [json.loads(line) for line in stdout.splitlines() if line.startswith("{")]


def whole(folder):
    """The files of all stems of all songs, which are there and nothing else."""
    found = files(folder)
    assert found.keys() == {f"tiny/{name}/{stem}.wav" for name in LENGTHS for stem in STEMS}
    return found


@pytest.mark.parametrize(
    "given",
    [
        pytest.param([], id="16"),
        pytest.param(["--bits", 32, "--clip", "none", "--shifts", 2], id="32", marks=pytest.mark.slow),
    ],
)
def test_two_processes_write_what_one_writes(model, songs, tmp_path, given):
    arguments = [songs, "-n", model, "--json", *given]
    for name, start in (("one", plain), ("two", partial(launch, 2))):
        code, out, err = start(*arguments, "-o", tmp_path / name)
        assert (code, err) == (0, "")
        assert sorted(line["file"] for line in done(out)) == [str(songs / f"{name}.wav") for name in LENGTHS]
    assert whole(tmp_path / "one") == whole(tmp_path / "two")


@pytest.mark.slow
def test_a_launch_of_one_process_changes_nothing(model, songs, tmp_path):
    for name, start in (("plain", plain), ("launched", partial(launch, 1))):
        code, out, err = start(songs, "-n", model, "--json", "-o", tmp_path / name)
        assert (code, err, len(done(out))) == (0, "", len(LENGTHS))
    assert whole(tmp_path / "plain") == whole(tmp_path / "launched")


def test_they_share_the_work_and_a_broken_file_is_reported_once(model, songs, tmp_path):
    (songs / "broken.wav").write_text("no audio" * 2003)
    arguments = [songs, "-n", model, "--json"]
    code, out, err = plain(*arguments, "-o", tmp_path / "one")
    assert code == 1
    (reason,) = (line["error"] for line in done(out) if "error" in line)
    answers = ring(tmp_path, *arguments, "-o", tmp_path / "two")
    assert [code for code, _, _ in answers] == [1, 1]
    assert "".join(err for _, _, err in answers) == err and err.count("\n") == 1
    lines = [done(out) for _, out, _ in answers]
    assert [line for line in lines[0] + lines[1] if "error" in line] == [
        {"file": str(songs / "broken.wav"), "error": reason}
    ]
    shares = [[Path(line["file"]).stem for line in of_one if "error" not in line] for of_one in lines]
    assert sorted(shares[0] + shares[1]) == list(LENGTHS)
    loads = [sum(LENGTHS[name] for name in share) for share in shares]
    assert min(loads) > sum(loads) / 4, shares
    assert whole(tmp_path / "one") == whole(tmp_path / "two")


def test_what_is_wrong_with_the_whole_is_one_line_each(model, songs, tmp_path):
    answers = ring(tmp_path, songs, "-n", "no/such/model", "-o", tmp_path / "out")
    assert answers == [(1, "", "mlx-xformer: no/such/model: no such file or folder\n")] * 2
    answers = ring(tmp_path, songs, songs / "gone.wav", "-n", model, "-o", tmp_path / "out")
    assert [code for code, _, _ in answers] == [1, 1]
    assert "".join(err for _, _, err in answers) == f"mlx-xformer: {songs / 'gone.wav'} does not exist\n"
    whole(tmp_path / "out")


def test_fewer_songs_than_processes(model, songs, tmp_path):
    song = songs / "a.wav"
    answers = ring(tmp_path, song, "-n", model, "-o", tmp_path / "two")
    assert [(code, err) for code, _, err in answers] == [(0, "")] * 2
    assert plain(song, "-n", model, "-o", tmp_path / "one")[0] == 0
    assert files(tmp_path / "one") == files(tmp_path / "two") and len(files(tmp_path / "one")) == len(STEMS)


def test_a_process_that_is_killed(model, songs, tmp_path):
    """The other one does its share, and knows at the end that something is missing."""

    def kill(children):
        assert children[1].stdout.readline()  # it has a song done, and another one before it
        children[1].kill()

    answers = ring(tmp_path, songs, "-n", model, "-o", tmp_path / "two", "--json", meanwhile=kill)
    assert answers[1][0] == -signal.SIGKILL
    code, out, err = answers[0]
    assert code == 1 and err.splitlines()[-1].startswith("mlx-xformer: ") and "Traceback" not in err
    assert plain(songs, "-n", model, "-o", tmp_path / "one")[0] == 0
    expected, found = whole(tmp_path / "one"), files(tmp_path / "two")
    places = [Path(path).relative_to(tmp_path / "two") for line in done(out) for path in line["files"].values()]
    assert len(places) >= 2 * len(STEMS) and {str(place) for place in places} <= found.keys()
    assert all(found[name] == expected[name] for name in found if not Path(name).name.startswith("."))
