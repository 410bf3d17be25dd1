"""What is read: a part of a song, a track of a film, standard input, damaged files; and what is said of it."""

import io
import json
import sys

import numpy as np
import pytest
import soundfile
from support.audio import TINY_RATE as RATE
from support.audio import write_noise
from support.ffmpeg import decode, ffmpeg
from support.models import FAST, STEMS, checkpoint
from support.processes import run_command

from mlx_xformer.cli.separate_arguments import _parse_time
from mlx_xformer.pretrained.loading import load
from mlx_xformer.separation.separator import separate


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("models") / "tiny", segment="1/1", **FAST)


@pytest.fixture
def run(model, tmp_path):
    def call(*arguments, out="out"):
        exact = ["--bits", 32, "--clip", "none", "--shifts", 0]
        return run_command("separate", *arguments, "-n", model, "-o", tmp_path / out, *exact)

    return call


def check_stems(model, folder, audio, rate=RATE):
    """The files in a folder are the stems of this audio (C, N)."""
    for stem, expected in separate(load(model), audio, rate, shifts=0).items():
        written = soundfile.read(folder / f"{stem}.wav", dtype="float32")[0].T
        assert written.shape == expected.shape and (written == expected).all()


# Parts


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("90", 90), ("1:30", 90), ("0:01:30", 90), ("1:02:03.25", 3723.25), ("90:00", 5400), ("0.5", 0.5)],
)
def test_times(text, seconds):
    assert _parse_time(text) == seconds


@pytest.mark.parametrize("text", ["1:75", "1:60:00", ":30", "1:", "-1", "1e3", "nan", "1:2:3:4", "", "x", "1_0", "5."])
def test_what_is_no_time(run, tmp_path, text):
    code, out, err = run(tmp_path / "song.wav", f"--start={text}")
    assert (code, out) == (2, "") and f"must be seconds, m:ss or h:mm:ss, got {text!r}" in err


def test_a_part_of_a_song(run, model, tmp_path):
    """Its stems are those of a file that holds that part alone."""
    song = write_noise(tmp_path / "song.wav", 5 * RATE)
    audio = soundfile.read(song, dtype="float32")[0].T
    code, out, err = run(song, "--start", "1.5", "--end", "0:03", "--json", "--report")
    assert (code, err) == (0, "") and json.loads(out)["seconds"] == 1.5
    check_stems(model, tmp_path / "out/tiny/song", audio[:, 3 * RATE // 2 : 3 * RATE])
    assert run(song, "--start", "4", out="tail")[0] == 0
    check_stems(model, tmp_path / "tail/tiny/song", audio[:, 4 * RATE :])
    assert "skipped" in run(song, "--start", "4", "--skip-existing", out="tail")[1]
    assert "skipped" not in run(song, "--start", "3", "--skip-existing", out="tail")[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--start", "2", "--end", "1:00", "--end", "2"], "--end must be after --start, 2 s, got 2 s"),
        (["--stream", "-1"], "--stream must be at least 0, got -1"),
        (["--start", "9:00"], "start must be before the end of the recording, got 540 s of 1.0 s"),
        (["-o", "-"], "--out must be a folder, as stems are several files, got -"),
    ],
    ids=str,
)
def test_what_cannot_be(run, model, tmp_path, given, message):
    song = write_noise(tmp_path / "song.wav", RATE)
    code, out, err = run_command("separate", song, "-n", model, "-o", tmp_path / "out", *given)
    assert (code, out) == (1, "") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "out").exists()


# Films


def test_a_sound_track_of_a_film(run, model, tmp_path):
    first, second = (write_noise(tmp_path / f"{n}.wav", RATE, seed=n) for n in range(2))
    film = tmp_path / "film.mkv"
    ffmpeg("-i", first, "-i", second, "-map", 0, "-map", 1, "-c:a", "pcm_f32le", film)
    for stream in (0, 1):
        code, _, err = run(film, "--stream", stream, out=f"{stream}")
        assert (code, err) == (0, "")
        check_stems(model, tmp_path / f"{stream}/tiny/film", *decode(film, stream=stream))
    code, _, err = run(film, "--stream", 2)
    assert code == 1 and err.count("\n") == 1 and "film.mkv" in err


def test_downmix(run, model, tmp_path):
    """5.1 becomes stereo as ffmpeg mixes it, or is its two front channels."""
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, (RATE, 6)).astype(np.float32)
    soundfile.write(tmp_path / "raw.wav", noise, RATE, subtype="FLOAT")
    song = tmp_path / "song.mka"
    ffmpeg("-channel_layout", "5.1", "-i", tmp_path / "raw.wav", "-c:a", "pcm_f32le", song)
    assert run(song, "--downmix", "front", out="front")[0] == 0
    check_stems(model, tmp_path / "front/tiny/song", noise.T[:2])
    assert run(song, out="standard")[0] == 0
    mixed = separate(load(model), decode(song, channels=2)[0], RATE, shifts=0)
    for stem in STEMS:
        written = soundfile.read(tmp_path / f"standard/tiny/song/{stem}.wav", dtype="float32")[0].T
        assert np.abs(written - mixed[stem]).max() < 1e-4 < np.abs(written).max()


# Standard input


def pipe(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_standard_input(run, model, tmp_path, monkeypatch):
    song = write_noise(tmp_path / "song.flac", 2 * RATE)
    audio = soundfile.read(song, dtype="float32")[0].T
    pipe(monkeypatch, song.read_bytes())
    code, out, err = run("-", "--json", "--report")
    assert (code, err) == (0, "") and json.loads(out)["file"] == "stdin"
    check_stems(model, tmp_path / "out/tiny/stdin", audio)
    pipe(monkeypatch, song.read_bytes())
    assert run("-", song, "--start", 1, "--filename", "{track}-{stem}.{ext}", out="both")[0] == 0
    assert len(list((tmp_path / "both/tiny").iterdir())) == 2 * len(STEMS)


def test_a_file_that_is_called_as_standard_input(run, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_noise(tmp_path / "-", RATE, format="WAV")
    assert run("./-")[::2] == (0, "")
    check_stems(model, tmp_path / "out/tiny/-", soundfile.read(tmp_path / "-", dtype="float32")[0].T)


def test_standard_input_that_is_no_audio(run, tmp_path, monkeypatch):
    for data in (b"", b"no audio at all"):
        pipe(monkeypatch, data)
        code, out, err = run("-")
        assert (code, out) == (1, "") and err.count("\n") == 1 and "standard input" in err
    pipe(monkeypatch, b"")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert "standard input is a terminal" in run("-")[2]
    assert not (tmp_path / "out").exists()


# Damage


def test_damage_is_said_in_a_line(run, tmp_path):
    """On standard error, in JSON; and refused with --strict. The other songs are separated as ever."""
    whole = write_noise(tmp_path / "whole.wav", RATE)
    cut = tmp_path / "cut.wav"
    cut.write_bytes(whole.read_bytes()[: -RATE // 2])
    code, out, err = run(cut, whole, "--json")
    first, second = map(json.loads, out.splitlines())
    assert code == 0 and err.count("\n") == 1 and err.startswith(f"mlx-xformer: {cut}: ")
    (warning,) = first["warnings"]
    assert warning in err and second["warnings"] == []
    code, out, err = run(cut, whole, "--strict", out="strict")
    assert code == 1 and err == f"mlx-xformer: {cut}: {warning}\n" and out.count("times real time") == 1
    assert sorted(path.name for path in (tmp_path / "strict/tiny").iterdir()) == ["whole"]
