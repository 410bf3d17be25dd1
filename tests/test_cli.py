"""The command line as users meet it: stems where they belong, one line for a mistake, nothing half written."""

import os
import re
import signal
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest
import soundfile
from harness import draw
from htdemucs_options import options
from mlx.utils import tree_flatten

from mlx_xformer import audio
from mlx_xformer.checkpoint import save_checkpoint
from mlx_xformer.cli import main
from mlx_xformer.models.htdemucs import HTDemucs, HTDemucsConfig
from mlx_xformer.pretrained import load
from mlx_xformer.separate import separate

RATE = 8000
STEMS = ["drums", "voice", "rest"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny model in a folder of its own."""
    tiny = {"nfft": 256, "depth": 2, "t_layers": 2, "segment": "128/1000", "t_heads": 2, "bottom_channels": 8}
    config = HTDemucsConfig.from_dict(options("base") | tiny)
    model = HTDemucs(config)
    draw(model, 1)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    weights = dict(tree_flatten(model.parameters()))
    save_checkpoint(folder, weights, family="htdemucs", config=config.to_dict(), provenance={})
    return folder


@pytest.fixture
def song(tmp_path):
    return write(tmp_path / "song.wav")


def write(path, samples=3000, channels=2, rate=RATE, seed=0):
    x = np.random.default_rng(seed).uniform(-0.5, 0.5, (samples, channels)).astype(np.float32)
    soundfile.write(path, x, rate, subtype="FLOAT", format="WAV")
    return path


def run(*arguments):
    return main([str(a) for a in arguments])


def expected(checkpoint, path, **given):
    samples, rate = audio.read(path)
    return {stem: np.array(x) for stem, x in separate(load(checkpoint), samples, rate, **given).items()}


def test_stems_go_where_users_expect_them(checkpoint, song, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("separate", song, "-n", checkpoint) == 0
    folder = tmp_path / "separated" / "tiny" / "song"
    assert sorted(p.name for p in folder.iterdir()) == sorted(f"{stem}.wav" for stem in STEMS)
    for stem, x in expected(checkpoint, song).items():  # the defaults: one shift, seed 0, rescale, 16 bits
        written, rate = soundfile.read(folder / f"{stem}.wav", dtype="int16")
        assert rate == RATE
        assert (audio.quantize(audio.prevent_clipping(x, "rescale"), 16) == written.T).all()
    out = capsys.readouterr().out
    assert "drums.wav, voice.wav, rest.wav" in out and re.search(r"0\.4 s of audio in .* times real time", out)


def test_options_reach_the_separation(checkpoint, song, tmp_path):
    given = ["--shifts", 2, "--overlap", 0.4, "--segment", 0.1, "--seed", 7, "--bits", 32, "--clip", "none"]
    assert run("separate", song, "-n", checkpoint, "-o", tmp_path / "out", *given) == 0
    for stem, x in expected(checkpoint, song, shifts=2, overlap=0.4, segment=0.1, seed=7).items():
        written, _ = soundfile.read(tmp_path / "out" / "tiny" / "song" / f"{stem}.wav", dtype="float32")
        assert (x == written.T).all()


@pytest.mark.parametrize(("bits", "subtype"), [(16, "PCM_16"), (24, "PCM_24"), (32, "FLOAT")])
def test_bits(checkpoint, song, tmp_path, bits, subtype):
    assert run("separate", song, "-n", checkpoint, "-o", tmp_path / "out", "--bits", bits) == 0
    assert soundfile.info(tmp_path / "out" / "tiny" / "song" / "rest.wav").subtype == subtype


def test_mono_and_other_rates(checkpoint, tmp_path):
    mono, fast = write(tmp_path / "mono.wav", channels=1), write(tmp_path / "fast.wav", rate=16000)
    assert run("separate", mono, fast, "-n", checkpoint, "-o", tmp_path / "out") == 0
    for name, frames in (("mono", 3000), ("fast", 1500)):
        info = soundfile.info(tmp_path / "out" / "tiny" / name / "drums.wav")
        assert (info.channels, info.samplerate, info.frames) == (2, RATE, frames)


def test_several_files_load_the_model_once_and_a_bad_one_stops_no_other(checkpoint, tmp_path, monkeypatch, capsys):
    from mlx_xformer import pretrained

    loads = []
    real = pretrained.load
    monkeypatch.setattr(pretrained, "load", lambda name: loads.append(name) or real(name))
    (tmp_path / "text.wav").write_text("no audio")
    (tmp_path / "a").mkdir()
    files = [
        write(tmp_path / "one.wav"),
        tmp_path / "gone.wav",
        tmp_path / "text.wav",
        write(tmp_path / "a" / "one.wav"),
        tmp_path,
        write(tmp_path / "two.wav"),
    ]
    assert run("separate", *files, "-n", checkpoint, "-o", tmp_path / "out") == 1
    assert len(loads) == 1
    assert sorted(p.name for p in (tmp_path / "out" / "tiny").iterdir()) == ["one", "two"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all(line.startswith("mlx-xformer: ") for line in lines)
    for part in ("gone.wav does not exist", "is a directory", "text.wav cannot be read as audio", "overwrite those of"):
        assert sum(part in line for line in lines) == 1, part


def bad_files(tmp_path):
    (tmp_path / "text.wav").write_text("no audio at all")
    soundfile.write(tmp_path / "empty.wav", np.zeros((0, 2)), RATE)
    soundfile.write(tmp_path / "nan.wav", np.array([[0.0, np.nan]] * 50), RATE, subtype="FLOAT")
    (tmp_path / "folder").mkdir()
    return {
        "gone.wav": "does not exist",
        "folder": "is a directory",
        "text.wav": "cannot be read as audio",
        "empty.wav": "holds no samples",
        "nan.wav": "holds NaN",
    }


def test_bad_input_gives_one_line_and_writes_nothing(checkpoint, tmp_path, capsys):
    for name, message in bad_files(tmp_path).items():
        assert run("separate", tmp_path / name, "-n", checkpoint, "-o", tmp_path / "out") == 1
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        assert name in captured.err and message in captured.err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "nosuch"], "model must be one of htdemucs, htdemucs_ft"),
        (["-n", "no/such/folder"], "no such file or folder"),
        (["--overlap", "1.5"], "overlap must be at least 0 and below 1, got 1.5"),
        (["--segment", "9"], "segment must be above 0 and at most the model's 0.128 s, got 9"),
        (["--shifts", "-1"], "shifts must be at least 0, got -1"),
    ],
)
def test_bad_options_give_one_line(checkpoint, song, tmp_path, capsys, arguments, message):
    model = [] if "-n" in arguments else ["-n", checkpoint]
    assert run("separate", song, *model, *arguments, "-o", tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and message in captured.err
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_written(checkpoint, song, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    assert run("separate", song, "-n", checkpoint, "-o", tmp_path / "file") == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "file is not a directory" in err
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # a folder that is read-only for this user
    assert run("separate", song, "-n", checkpoint, "-o", tmp_path / "out") == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "no permission to write" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", [[], ["separate"], ["separat", "x"], ["separate", "x", "--bits", "8"], ["convert", "x"]]
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2 and "usage: mlx-xformer" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["separate"], ["convert"], ["info"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0 and "usage: mlx-xformer" in capsys.readouterr().out


def test_info(checkpoint, capsys):
    assert run("info") == 0
    out = capsys.readouterr().out
    assert "device" in out and "BLAS" in out and mx.default_device().type.name in out
    assert run("info", checkpoint) == 0
    assert "drums, voice, rest" in capsys.readouterr().out
    assert run("info", "nosuch") == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_convert_there_and_back(checkpoint, tmp_path, capsys):
    assert run("convert", checkpoint, tmp_path / "dry", "--to", "pytorch", "--dry-run") == 0
    assert not (tmp_path / "dry").exists()
    assert run("convert", checkpoint, tmp_path / "theirs", "--to", "pytorch") == 0
    (file,) = (tmp_path / "theirs").glob("*.safetensors")
    assert run("convert", file, tmp_path / "ours") == 0
    assert "all accounted for" in capsys.readouterr().out
    before, after = (mx.load(str(folder / "model.safetensors")) for folder in (checkpoint, tmp_path / "ours"))
    assert before.keys() == after.keys() and all((before[k] == after[k]).all() for k in before)
    assert run("convert", tmp_path / "gone.th", tmp_path / "x") == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_interrupt_leaves_whole_tracks_only(checkpoint, tmp_path):
    """Ctrl-C in the middle of the second track: the first is whole, of the second nothing is left."""
    short, long = write(tmp_path / "short.wav"), write(tmp_path / "long.wav", samples=40 * 60 * RATE, channels=1)
    out = tmp_path / "out"
    code = "import sys; from mlx_xformer.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "separate", short, long, "-n", checkpoint, "-o", out]
    process = subprocess.Popen([str(c) for c in command], stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + 60
    while not (out / "tiny" / "short" / "rest.wav").exists() and time.monotonic() < limit:
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1].endswith("mlx-xformer: interrupted") and "Traceback" not in err
    assert [p.name for p in (out / "tiny").iterdir()] == ["short"]
    assert sorted(p.name for p in (out / "tiny" / "short").iterdir()) == sorted(f"{s}.wav" for s in STEMS)
    assert soundfile.info(out / "tiny" / "short" / "rest.wav").frames == 3000


def test_track_names(checkpoint, tmp_path, capsys):
    """What follows the last dot goes; a name that would lead elsewhere, or fall together with another's, is refused."""
    for name in ("a.b.wav", "Song.wav", "song.flac", "...wav", "..wav"):
        write(tmp_path / name)
    names = [tmp_path / n for n in ("a.b.wav", "Song.wav", "song.flac", "...wav", "..wav")]
    assert run("separate", *names, "-n", checkpoint, "-o", tmp_path / "out") == 1
    assert sorted(p.name for p in (tmp_path / "out" / "tiny").iterdir()) == ["Song", "a.b"]
    err = capsys.readouterr().err
    assert err.count("\n") == 3 and "song.flac: its stems would overwrite those of" in err
    assert err.count("leaves no name for the folder") == 2


def test_failures_of_mlx_give_one_line(checkpoint, song, tmp_path, capsys, monkeypatch):
    from mlx_xformer import pretrained

    class Failing:
        def __getattr__(self, name):
            raise RuntimeError("[metal::malloc] Unable to allocate\n  9 bytes")

    monkeypatch.setattr(pretrained, "load", lambda name: Failing())
    assert run("separate", song, "-n", checkpoint, "-o", tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "Unable to allocate 9 bytes" in captured.err


def test_nothing_is_loaded_for_options_that_cannot_be(song, tmp_path, capsys):
    for given in (["--overlap", "2"], ["--shifts", "-1"]):
        assert run("separate", song, song, "-n", "someone/no_such_model", "-o", tmp_path / "out", *given) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and given[0][2:] in err


def test_closed_output(checkpoint, song, tmp_path):
    """`mlx-xformer separate ... | head -0`: the stems are written, and nothing is said to be wrong with the track."""
    code = "import sys; from mlx_xformer.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "separate", song, "-n", checkpoint, "-o", tmp_path / "out"]
    read, write_end = os.pipe()
    os.close(read)
    answer = subprocess.run([str(c) for c in command], stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(write_end)
    assert answer.returncode == 1 and "song.wav" not in answer.stderr and "Traceback" not in answer.stderr
    assert (tmp_path / "out" / "tiny" / "song" / "rest.wav").exists()


def test_report(checkpoint, song, tmp_path, capsys):
    assert run("separate", song, "-n", checkpoint, "-o", tmp_path / "out", "--report", "--seed", 5) == 0
    page = (tmp_path / "out" / "tiny" / "song" / "report.html").read_text()
    assert "song.wav" in page and "<td>5</td>" in page.replace("<dd>5</dd>", "<td>5</td>")
    assert "report.html" in capsys.readouterr().out
