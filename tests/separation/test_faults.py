"""What goes wrong on the way: kills, a full disk, a folder that vanishes, Ctrl-C.

Whatever it is, a file with a stem's name is whole, a failure is one line, and what a kill leaves the next run removes.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
from support.audio import TINY_RATE as RATE
from support.audio import write_noise as noise
from support.models import FAST, STEMS, checkpoint
from support.processes import end, run_all, start

from mlx_xformer.cli import main
from mlx_xformer.separation.separator import Separator
from mlx_xformer.separation.stems import Output

OUTPUTS = [
    {"bits": 16, "clip": "rescale"},
    {"bits": 32, "clip": "none"},
    {"bits": 24, "clip": "joint"},
    {"format": "flac", "bits": 16, "clip": "clamp"},
    {"format": "mp3", "mp3_bitrate": 64, "clip": "rescale"},
]
RUNS = 10  # kills for each of them


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A quick model of the full kind."""
    folder = tmp_path_factory.mktemp("models")
    return checkpoint(folder / "tiny", segment="5/1", **FAST)


def tree(folder):
    """Every file and folder below, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


VICTIM = """
import json, sys
from mlx_xformer.separation.separator import Separator
from mlx_xformer.separation.stems import Output

model, song, out, output = sys.argv[1:]
separator, output = Separator(model, shifts=0, mode="time_only"), Output(**json.loads(output))
print("ready", flush=True)
separator.separate_file(song, out, output)
"""


@dataclass
class Target:
    """One way to write stems, and what the files must be: {name: bytes}."""

    model: Path
    song: Path
    folder: Path
    output: dict
    whole: dict[str, bytes]

    def start(self):
        """A run of its own that has loaded the model."""
        process = start(VICTIM, self.model, self.song, self.folder, json.dumps(self.output))
        assert process.stdout.readline() == "ready\n"
        return process

    @property
    def place(self):
        return self.folder / self.song.stem

    def found(self):
        """The names of (whole stems, hidden files); anything else that lies there is an error."""
        names = [path.name for path in self.place.iterdir()] if self.place.exists() else []
        stems = [name for name in names if not name.startswith(".")]
        for name in stems:
            assert (self.place / name).read_bytes() == self.whole[name], f"{name} is not whole"
        return stems, [name for name in names if name.startswith(".")]


def target(model, song, folder, output):
    """Separates once in this process, and makes sure that it came out whole."""
    separator = Separator(model, shifts=0, mode="time_only")
    made = separator.separate_file(song, folder / "expected", Output(**output))
    samples = soundfile.info(song).frames
    for path in made.files.values():
        read, rate = soundfile.read(path, always_2d=True)
        assert rate == RATE and np.abs(read[-samples // 3 :]).max() > 0.01
        assert len(read) == samples or (path.suffix == ".mp3" and samples <= len(read) < samples + 4000)
    whole = {path.name: path.read_bytes() for path in made.files.values()}
    return Target(model, song, folder / "out", output, whole)


@pytest.fixture
def targets(models, tmp_path):
    song = noise(tmp_path / "song.flac", 200003)
    return [target(models, song, tmp_path / str(i), output) for i, output in enumerate(OUTPUTS)]


def duration(target):
    """Seconds from ready to the end, undisturbed."""
    process = target.start()
    begin = time.monotonic()
    code, _, err = end(process)
    assert code == 0, err
    return time.monotonic() - begin


def kill_often(target, seed):
    """Kills RUNS runs, each in its own part of the time that a run takes; returns (exit code, stems, hidden) each."""
    rng, seconds = random.Random(seed), min(duration(target), duration(target))
    seen = []
    for turn in range(RUNS):
        for path in target.place.glob("[!.]*"):
            path.unlink()
        process = target.start()
        time.sleep(seconds * (turn + rng.random()) / RUNS)
        process.kill()
        code, _, err = end(process)
        assert err == "", err
        seen.append((code, *target.found()))
    return seen


@pytest.mark.slow
def test_kills_leave_whole_stems_and_the_next_run_sweeps(targets):
    """50 runs, killed at random moments from the loaded model to the end."""
    with ThreadPoolExecutor(2) as pool:
        seen = list(pool.map(kill_often, targets, range(len(targets))))
    runs = [run for of_target in seen for run in of_target]
    assert len(runs) == 50
    killed = [run for run in runs if run[0] == -signal.SIGKILL]
    assert len(killed) >= 20 and all(code in (0, -signal.SIGKILL) for code, _, _ in runs)
    assert any(hidden for _, _, hidden in killed) and any(not stems for _, stems, _ in killed)
    for _, _, hidden in runs:
        assert len(hidden) <= len(STEMS)  # those of runs before are gone
    for target in targets:
        duration(target)
        stems, hidden = target.found()
        assert sorted(stems) == sorted(target.whole) and hidden == []


AT_EVENT = """
import os, signal, sys
from mlx_xformer.separation.separator import Separator

def hook(event, arguments):
    global left
    if event == "os.rename":
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

left = int(sys.argv[1])
sys.addaudithook(hook)
Separator(sys.argv[2], shifts=0, mode="time_only").separate_file(sys.argv[3], sys.argv[4])
"""


@pytest.mark.slow
def test_kills_between_the_stems_renames(models, tmp_path):
    song = noise(tmp_path / "song.wav", 3001)
    aim = target(models, song, tmp_path, {})
    for turn in (1, 2, 3):
        shutil.rmtree(aim.folder, ignore_errors=True)
        code, _, err = end(start(AT_EVENT, turn, models, song, aim.folder))
        assert code == -signal.SIGKILL, err
        stems, hidden = aim.found()
        assert (len(stems), len(hidden)) == (turn - 1, 4 - turn)
        duration(aim)
        stems, hidden = aim.found()
        assert sorted(stems) == sorted(aim.whole) and hidden == []


# The command line, with a signal to itself when half of the segments are done.
SIGNALLED = """
import os, signal, sys
from mlx_xformer import cli
from mlx_xformer.separation.separator import Separator

signal.signal(signal.SIGINT, signal.default_int_handler)
number, real = int(sys.argv[1]), Separator.separate_file

def separate_file(self, *given, progress, **named):
    def watch(now):
        progress(now)
        if now.done == now.total // 2:
            os.kill(os.getpid(), number)
    return real(self, *given, progress=watch, **named)

Separator.separate_file = separate_file
sys.exit(cli.main(sys.argv[2:]))
"""


def start_and_stop(*arguments):
    """A command line that has stopped itself half way."""
    process = start(SIGNALLED, int(signal.SIGSTOP), "separate", *arguments)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    return process


@pytest.mark.parametrize("clip", ["rescale", "none"])
def test_two_runs_at_once_leave_each_other_alone(models, tmp_path, clip):
    """What one of them has under way is no leftover for the other; nor does what a killed run left stay."""
    song = noise(tmp_path / "song.wav", 90001)
    arguments = [song, "-n", models, "-o", tmp_path / "out", "--clip", clip, "--shifts", 0]
    place = tmp_path / "out" / "tiny" / "song"
    killed = start_and_stop(*arguments)
    killed.kill()
    end(killed)
    before = set(tree(tmp_path / "out"))
    first = start_and_stop(*arguments)
    try:
        assert not {name for name in tree(tmp_path / "out") if name.endswith(".part")} & before
        assert main(["separate", *map(str, arguments)]) == 0
        second = {path.name: path.read_bytes() for path in place.iterdir() if path.name[0] != "."}
    finally:
        first.send_signal(signal.SIGCONT)
    code, _, err = end(first)
    assert (code, err) == (0, "")
    assert len(second) == len(STEMS) and {path.name: path.read_bytes() for path in place.iterdir()} == second


@pytest.mark.parametrize("clip", ["rescale", "joint", "clamp", "none"])
def test_a_folder_that_vanishes_gives_one_line(models, tmp_path, clip):
    song, out = noise(tmp_path / "song.wav", 90001), tmp_path / "out"
    process = start_and_stop(song, "-n", models, "-o", out, "--clip", clip)
    shutil.rmtree(out)
    process.send_signal(signal.SIGCONT)
    code, stdout, err = end(process)
    assert code == 1 and stdout == "" and err.count("\n") == 1
    assert err.startswith(f"mlx-xformer: {song}: ") and not out.exists()


@pytest.mark.parametrize("clip", ["rescale", "none"])
def test_a_folder_that_vanishes_in_a_callback(models, tmp_path, clip):
    song, out = noise(tmp_path / "song.wav", 90001), tmp_path / "out"
    with pytest.raises(FileNotFoundError):
        Separator(models).separate_file(
            song, out, Output(clip=clip), progress=lambda now: shutil.rmtree(out, ignore_errors=True)
        )
    assert not out.exists()


def test_a_folder_in_a_stems_place(models, tmp_path, capsys):
    """The second of three stems cannot be put in place: the first is not, either, and no work is done in vain."""
    song, out = noise(tmp_path / "song.wav", 3001), tmp_path / "out"
    (out / "tiny" / "song" / "voice.wav").mkdir(parents=True)
    before = tree(out)
    assert main(["separate", str(song), "-n", str(models), "-o", str(out)]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "voice.wav" in err and ".part" not in err
    assert tree(out) == before
    seen = []
    with pytest.raises(IsADirectoryError):
        Separator(models).separate_file(song, out / "tiny", progress=seen.append)
    assert seen == [] and tree(out) == before


def test_ctrl_c_half_way(models, tmp_path):
    song, out = noise(tmp_path / "song.wav", 90001), tmp_path / "out"
    arguments = ["separate", song, "-n", models, "-o", out, "--report"]
    for clip in ("rescale", "none"):
        process = start(SIGNALLED, int(signal.SIGINT), *arguments, "--clip", clip)
        assert end(process) == (130, "", "mlx-xformer: interrupted\n")
        assert not out.exists()


# Ctrl-C at the n-th thing that is done below the output folder, for all n; prints what came of each.
CTRL_C = """
import contextlib, io, json, os, pathlib, shutil, signal, sys
from mlx_xformer import cli

signal.signal(signal.SIGINT, signal.default_int_handler)
out, armed, left, events = pathlib.Path(sys.argv[1]), False, 0, []

def hook(event, arguments):
    global left
    watched = event in ("os.mkdir", "os.rename", "os.chmod", "open")
    if armed and watched and str(arguments[0]).startswith(str(out)):
        left -= 1
        events.append(event)
        if left == 0:
            os.kill(os.getpid(), signal.SIGINT)

sys.addaudithook(hook)
for n in range(100):
    armed, left, events = True, n, []
    err, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(said):
        code = cli.main(sys.argv[2:])
    armed = False
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*")) if out.exists() else None
    print(json.dumps([n, code, events[n - 1 : n], err.getvalue(), files]), flush=True)
    shutil.rmtree(out, ignore_errors=True)
    if n and left > 0:
        break
"""


@pytest.mark.parametrize("clip", ["rescale", "none"])
def test_ctrl_c_at_every_change_of_a_file(models, tmp_path, clip):
    song, out = noise(tmp_path / "song.wav", 3001), tmp_path / "out"
    process = start(CTRL_C, out, "separate", song, "-n", models, "-o", out, "--clip", clip)
    code, stdout, err = end(process)
    assert (code, err) == (0, "")
    first, *interrupted, last = map(json.loads, stdout.splitlines())
    for _, code, _, err, files in (first, last):
        assert (code, err) == (0, "") and [f for f in files if f.endswith(".wav")] == [
            f"tiny/song/{stem}.wav" for stem in sorted(STEMS)
        ]
    events = [event for _, _, (event,), _, _ in interrupted]
    assert events.count("os.rename") == len(STEMS) and "os.mkdir" in events and "open" in events
    placed = {f"tiny/song/{stem}.wav" for stem in STEMS}
    for n, code, (event,), err, files in interrupted:  # all stems are there or nothing is
        assert (code, err) == (130, "mlx-xformer: interrupted\n"), (n, event)
        assert files is None or (event in ("os.chmod", "os.rename") and {f for f in files if "." in f} == placed), n


FORMATS = [
    ["--bits", 16],
    ["--bits", 24],
    ["--bits", 32],
    ["--format", "flac"],
    ["--format", "flac", "--bits", 24],
    ["--format", "mp3", "--mp3-bitrate", 64],
]
WAYS = [[*kind, "--clip", clip] for kind in FORMATS for clip in ("rescale", "joint", "clamp", "none")]
WAYS += [["--format", kind, "--clip", "none"] for kind in ("ogg", "opus", "m4a")]


def separation(models, song, way):
    return ["separate", song, "-n", models, "--shifts", 0, *way]


@pytest.fixture(scope="module")
def filled(models, tmp_path_factory):
    """A song, and for every way to write its stems the size of the largest, of all, and the files; from a free disk."""
    folder = tmp_path_factory.mktemp("filled")
    song = noise(folder / "song.wav", 30011)
    results = run_all([(separation(models, song, way), folder / "out", None, None) for way in WAYS])
    assert all(result.code == 0 and len(result.files) == 3 for result in results)
    sizes = [[size for size, _ in result.files.values()] for result in results]
    return song, [(max(s), sum(s), result.files) for s, result in zip(sizes, results, strict=True)]


def check_whole_or_nothing(result, files, what):
    """Either all stems and 0, or nothing at all, 1 and one line. Returns whether the former."""
    assert result.error is None, (what, result.error)
    if result.code == 0:
        assert result.err == "" and result.files == files, what
        return True
    assert (result.code, result.out) == (1, "") and "Traceback" not in result.err, (what, result)
    assert result.err.count("\n") == 1 and result.err.startswith("mlx-xformer: "), (what, result.err)
    assert not result.folder_exists, (what, result.files)
    return False


@pytest.mark.slow
def test_a_disk_that_ends_within_a_file(models, filled, tmp_path):
    """No file may exceed a limit, down from the size of the largest stem: one byte less, and nothing is left."""
    song, written = filled
    tasks, expected = [(separation(models, song, []), tmp_path / "out", None, None)], []  # MLX writes what it compiles
    for way, (largest, _, files) in zip(WAYS, written, strict=True):
        for less in (0, 1, 3001, largest // 2):
            tasks.append((separation(models, song, way), tmp_path / "out", largest - less, None))
            expected.append((way, less, files))
    for (way, less, files), result in zip(expected, run_all(tasks)[1:], strict=True):
        done = check_whole_or_nothing(result, files, (way, less))
        waits = "rescale" in way or "joint" in way  # in files that are larger than the stems
        assert (done or waits) if less == 0 else not done, (way, less)


def own_disk(folder):
    """The head of a command that has a small disk at `folder`, which ends with it; None where the system forbids it."""
    if sys.platform != "linux" or not shutil.which("unshare"):
        return None
    users = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    mount = 'mount -t tmpfs -o size=4m disk "$0" && exec "$@"'
    command = ["unshare", *users, "--mount", "sh", "-c", mount, str(folder)]
    return command if subprocess.run([*command, "true"], capture_output=True).returncode == 0 else None


@pytest.mark.slow
def test_a_full_disk(models, filled, tmp_path):
    """A disk with room for a part of what is written; where we can have none, each file has a part of the largest's."""
    song, written = filled
    disk = own_disk(tmp_path)
    tasks, expected = [(separation(models, song, []), tmp_path / "out", None, None)], []
    for way, (largest, all_, files) in zip(WAYS, written, strict=True):
        for part in (0.1, 0.6, 0.97, 3):
            room = (None, int(part * all_)) if disk else (int(part * largest), None)
            tasks.append((separation(models, song, way), tmp_path / "out", *room))
            expected.append((way, part, files))
    for (way, part, files), result in zip(expected, run_all(tasks, disk or ())[1:], strict=True):
        done = check_whole_or_nothing(result, files, (way, part))
        assert not done or part > 0.95, (way, part)  # a disk counts in pages


def test_a_folder_that_takes_a_stem_s_place_at_the_end(models, tmp_path):
    """A name that is lost while the stems are made: those that were placed are taken back, and the line names it."""
    song, folder = noise(tmp_path / "song.wav", 3001), tmp_path / "out"

    def steal(_):
        (folder / "song" / "voice.wav").mkdir(exist_ok=True)

    with pytest.raises(OSError) as failure:
        Separator(models).separate_file(song, folder, progress=steal)
    assert str(failure.value.filename).endswith("voice.wav") and ".part" not in str(failure.value)
    assert [path.name for path in (folder / "song").iterdir()] == ["voice.wav"]
