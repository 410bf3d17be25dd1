"""A whole library in one command, killed twice and resumed: the files of one run, in the memory of a few songs."""

import json
import os
import signal
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile
from support.audio import TINY_RATE as RATE
from support.models import FAST, STEMS, checkpoint
from support.processes import end, start

FOLDERS, SONGS = 40, 300
MOST = 8  # MiB that all songs may take beyond a quarter of them: their stems would be 20 MiB
ODD = [
    "01",
    "a b  c",
    "-n",
    "{stem}",
    "%s 100%",
    'it\'s "so" $HOME',
    "dots...and.more",
    "#1 (live) [2020]",
    "曲 ☂ 🎵",
    "naïve",
    unicodedata.normalize("NFD", "naïveté"),
    "LOUD",
    "w" * 200,
]

COMMAND = "import sys; from mlx_xformer.cli import main; sys.exit(main(sys.argv[1:]))"
# The command for a part, then for all, in one process; prints the peak of memory after each.
MEASURED = """
import json, resource, sys
from pathlib import Path
from mlx_xformer.cli import main

def peak():
    if sys.platform == "linux":  # where a parent's peak shows in its child's ru_maxrss
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

part, music, elsewhere, out, *given = sys.argv[1:]
codes, peaks = [], []
for songs, folder in ((part, elsewhere), (music, out)):
    codes.append(main(["separate", songs, "-o", folder, *given]))
    peaks.append(peak())
print(json.dumps({"codes": codes, "peaks": peaks}))
"""


def make_library(music):
    """SONGS songs of 0.2 to 0.5 s in FOLDERS folders, up to four deep; the first ten folders have one above."""
    rng = np.random.default_rng(0)
    places = []
    for n in range(FOLDERS):
        artist = ODD[n % len(ODD)]
        places.append(music / "part" / artist if n < 10 else music / artist / f"album {n}" / ODD[(3 * n) % len(ODD)])
    names = [name for name in ODD if len(name) < 200] + ["w" * 120]
    if sys.platform == "linux":
        names.append(os.fsdecode(b"caf\xe9"))
    for n in range(SONGS):
        place = places[n % FOLDERS]
        place.mkdir(parents=True, exist_ok=True)
        path = place / f"{names[(n // FOLDERS + n) % len(names)]}.{('wav', 'flac', 'ogg')[n % 3]}"
        with path.open("xb") as file:
            samples = rng.uniform(-0.5, 0.5, (int(rng.integers(RATE // 5, RATE // 2)), 2))
            soundfile.write(file, samples, RATE, format=path.suffix[1:])


def tree(folder):
    """{name: bytes} of every file below, hidden ones too."""
    paths = (os.path.join(place, name) for place, _, names in os.walk(folder) for name in names)
    return {os.path.relpath(path, folder): Path(path).read_bytes() for path in paths}


def kill_after(songs, number, *arguments):
    """Runs the command until it has finished so many songs, and sends it a signal; returns what it said of songs."""
    process = start(COMMAND, "separate", *arguments)
    lines = [process.stdout.readline() for _ in range(songs)]
    process.send_signal(number)
    code, rest, _ = end(process)
    assert code == -number
    return [json.loads(line) for line in (*lines, *rest.splitlines()) if line.endswith("}\n") or line.endswith("}")]


@pytest.mark.slow
def test_a_library_killed_twice_and_resumed(tmp_path):
    music, model = tmp_path / "music", checkpoint(tmp_path / "tiny", segment="1/1", **FAST)
    make_library(music)
    given = ["-n", model, "--shifts", 0, "--json"]
    code, out, err = end(start(MEASURED, music / "part", music, tmp_path / "part", tmp_path / "one", *given), limit=300)
    assert code == 0 and err == ""
    measured = json.loads(out.splitlines()[-1])
    assert measured["codes"] == [0, 0] and measured["peaks"][1] - measured["peaks"][0] < MOST, measured
    whole = tree(tmp_path / "one")
    assert len(whole) == SONGS * len(STEMS)

    again = [music, "-o", tmp_path / "two", *given, "--skip-existing"]
    first = kill_after(83, signal.SIGKILL, *again)
    assert len(first) >= 83 and not any(line.get("skipped") for line in first)
    second = kill_after(len(first) + 101, signal.SIGTERM, *again)
    skipped = [line["file"] for line in second if line.get("skipped")]
    assert len(skipped) in (len(first), len(first) + 1)  # a song may be finished that is not told of yet
    assert {line["file"] for line in first} <= set(skipped)
    code, out, _ = end(start(COMMAND, "separate", *again), limit=300)
    third = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len({line["file"] for line in third}) == SONGS
    assert sum(bool(line.get("skipped")) for line in third) >= len(second)
    assert tree(tmp_path / "two") == whole
