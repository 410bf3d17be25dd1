"""The command line as users meet it: stems where they belong, one line for a mistake, nothing half written."""

import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time

import av
import mlx.core as mx
import numpy as np
import pytest
import soundfile
import tqdm
from mlx.utils import tree_flatten
from support.harness import draw
from support.models import options

from mlx_xformer.audio import recording, resample
from mlx_xformer.audio.encode import quantize
from mlx_xformer.cli import main
from mlx_xformer.models.htdemucs import HTDemucs, HTDemucsConfig
from mlx_xformer.pretrained.loading import load
from mlx_xformer.separation import separator
from mlx_xformer.separation.separator import separate
from mlx_xformer.storage.checkpoint import save_checkpoint

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


def write(path, samples=3000, channels=2, rate=RATE, seed=0, gain=0.5):
    x = np.random.default_rng(seed).uniform(-gain, gain, (samples, channels)).astype(np.float32)
    soundfile.write(path, x, rate, subtype="FLOAT", format="WAV")
    return path


def run(*arguments):
    return main([str(a) for a in arguments])


def expected(checkpoint, path, **given):
    samples, rate = recording.read(path)
    return {stem: np.array(x) for stem, x in separate(load(checkpoint), samples, rate, **given).items()}


def test_stems_go_where_users_expect_them(checkpoint, song, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("separate", song, "-n", checkpoint) == 0
    folder = tmp_path / "separated" / "tiny" / "song"
    assert sorted(p.name for p in folder.iterdir()) == sorted(f"{stem}.wav" for stem in STEMS)
    for stem, x in expected(checkpoint, song).items():  # the defaults: one shift, seed 0, rescale, 16 bits
        written, rate = soundfile.read(folder / f"{stem}.wav", dtype="int16")
        assert rate == RATE
        quiet = x / max(np.float32(1.01) * np.abs(x).max(), np.float32(1))
        assert (quantize(quiet, 16) == written.T).all()
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
    loads = []
    monkeypatch.setattr(separator, "load", lambda name: loads.append(name) or load(name))
    (tmp_path / "text.wav").write_text("no audio")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    files = [
        write(tmp_path / "one.wav"),
        tmp_path / "gone.wav",
        tmp_path / "text.wav",
        write(tmp_path / "a" / "one.wav"),
        tmp_path / "b",
        write(tmp_path / "two.wav"),
    ]
    assert run("separate", *files, "-n", checkpoint, "-o", tmp_path / "out") == 1
    assert len(loads) == 1
    assert sorted(p.name for p in (tmp_path / "out" / "tiny").iterdir()) == ["one", "two"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all(line.startswith("mlx-xformer: ") for line in lines)
    for part in (
        "gone.wav does not exist",
        "holds no recordings",
        "text.wav cannot be read as audio",
        "overwrite those of",
    ):
        assert sum(part in line for line in lines) == 1, part


def bad_files(tmp_path):
    (tmp_path / "text.wav").write_text("no audio at all")
    soundfile.write(tmp_path / "empty.wav", np.zeros((0, 2)), RATE)
    soundfile.write(tmp_path / "nan.wav", np.array([[0.0, np.nan]] * 50), RATE, subtype="FLOAT")
    (tmp_path / "folder").mkdir()
    return {
        "gone.wav": "does not exist",
        "folder": "holds no recordings",
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
    heard = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # also where the tests run in the background
    code = f"import signal, sys; {heard}; from mlx_xformer.cli import main; sys.exit(main(sys.argv[1:]))"
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
    assert err.count("leaves none for its stems") == 2


def test_failures_of_mlx_give_one_line(checkpoint, song, tmp_path, capsys, monkeypatch):
    def failing(name):
        raise RuntimeError("[metal::malloc] Unable to allocate\n  9 bytes")

    monkeypatch.setattr(separator, "load", failing)
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
    assert 'href="../../index.html"' in page and 'href="drums.wav"' in page


def test_reports_are_listed_in_an_index(checkpoint, song, tmp_path, capsys):
    """Of the output folder: later runs add to it, and a page of the user's is kept."""
    out = tmp_path / "out"
    other = write(tmp_path / "other song.wav", seed=3)
    for file in (song, other):
        assert run("separate", file, "-n", checkpoint, "-o", out, "--report") == 0
    index = (out / "index.html").read_text()
    for href in ("tiny/song/report.html", "tiny/song/rest.wav", "tiny/other%20song/report.html"):
        assert f'href="{href}"' in index
    (out / "index.html").write_text("mine")
    capsys.readouterr()
    assert run("separate", song, "-n", checkpoint, "-o", out, "--report") == 0
    assert "index.html is not an index of separated songs: it is kept as it is" in capsys.readouterr().err
    assert (out / "index.html").read_text() == "mine"


@pytest.mark.parametrize("format", ["flac", "mp3", "ogg", "opus", "m4a"])
def test_stems_of_all_formats_have_reports(checkpoint, song, tmp_path, format):
    given = ["-n", checkpoint, "-o", tmp_path / "out", "--format", format, "--report"]
    assert run("separate", song, *given) == 0
    page = (tmp_path / "out/tiny/song/report.html").read_text()
    assert f'href="drums.{format}"' in page and "NaN" not in page


def test_a_bar_shows_how_far_the_report_is(checkpoint, song, tmp_path, monkeypatch):
    bars = []

    class Bar(tqdm.tqdm):
        def __init__(self, **given):
            super().__init__(**given | {"disable": False, "file": io.StringIO()})
            bars.append(self)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    assert run("separate", song, "-n", checkpoint, "-o", tmp_path / "out", "--report") == 0
    assert [(bar.desc, bar.n, bar.total) for bar in bars][1:] == [("song.wav: report", 1, 1)]


def test_the_time_of_a_song_includes_its_report(checkpoint, song, tmp_path, capsys, monkeypatch):
    from mlx_xformer.separation.report import page

    honest = page.write_report
    monkeypatch.setattr(page, "write_report", lambda *given, **named: time.sleep(0.5) or honest(*given, **named))
    assert run("separate", song, "-n", checkpoint, "-o", tmp_path / "out", "--report", "--json") == 0
    assert json.loads(capsys.readouterr().out)["took"] > 0.5


def stream_of(path):
    """(rate, channels, bits, seconds, kbit/s) as FFmpeg's libraries see a file."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        bits = stream.codec_context.format.bits if "mp3" not in stream.codec_context.name else None
        return stream.rate, stream.channels, bits, container.duration / 1e6, (stream.bit_rate or 0) // 1000


@pytest.mark.parametrize(
    ("given", "ext", "bits", "kbps"),
    [
        (["--format", "wav", "--bits", 24], "wav", 32, None),  # FFmpeg holds 24 bits in 32
        (["--format", "flac"], "flac", 16, None),
        (["--format", "flac", "--bits", 24], "flac", 32, None),
        (["--format", "mp3"], "mp3", None, 64),
        (["--format", "mp3", "--mp3-bitrate", 32], "mp3", None, 32),
    ],
    ids=str,
)
def test_formats(checkpoint, song, tmp_path, given, ext, bits, kbps):
    assert run("separate", song, "-n", checkpoint, "-o", tmp_path / "out", *given) == 0
    folder = tmp_path / "out" / "tiny" / "song"
    assert sorted(p.name for p in folder.iterdir()) == sorted(f"{stem}.{ext}" for stem in STEMS)
    rate, channels, found, seconds, rate_kbps = stream_of(folder / f"rest.{ext}")
    assert (rate, channels, found) == (RATE, 2, bits) and kbps in (None, rate_kbps)
    assert abs(seconds - 3000 / RATE) < (1e-4 if ext != "mp3" else 0.2)  # a container counts MP3's padding
    assert soundfile.info(folder / f"rest.{ext}").frames == 3000


def test_rate_keep(checkpoint, tmp_path):
    """The recording's own rate and length, whatever they are; what the model made, resampled."""
    for rate, samples in ((44100, 20_011), (11025, 4001), (8000, 3001)):
        song = write(tmp_path / f"{rate}.wav", samples=samples, rate=rate)
        given = ["--rate", "keep", "--bits", 32, "--clip", "none"]
        assert run("separate", song, "-n", checkpoint, "-o", tmp_path / "out", *given) == 0
        for stem, x in expected(checkpoint, song).items():
            path = tmp_path / "out" / "tiny" / str(rate) / f"{stem}.wav"
            assert stream_of(path)[:2] == (rate, 2)
            written, _ = soundfile.read(path, dtype="float32")
            whole = resample(x, RATE, rate)[:, :samples]
            assert len(written) == samples and (whole == written[: whole.shape[1]].T).all()
            assert not written[whole.shape[1] :].any() and samples - whole.shape[1] <= -(-rate // RATE)


@pytest.mark.parametrize("method", ["add", "minus", "none"])
def test_two_stems(checkpoint, song, tmp_path, method):
    """The names and sums of demucs."""
    given = ["--two-stems", "voice", "--other-method", method, "--bits", 32, "--clip", "none"]
    assert run("separate", song, "-n", checkpoint, "-o", tmp_path / "out", *given) == 0
    whole = expected(checkpoint, song)
    mix, _ = recording.read(song)
    rest = {
        "add": {"no_voice": whole["drums"] + whole["rest"]},
        "minus": {"minus_voice": mix - whole["voice"]},
        "none": {},
    }[method]
    files = {p.stem: soundfile.read(p, dtype="float32")[0].T for p in (tmp_path / "out/tiny/song").iterdir()}
    assert files.keys() == {"voice"} | rest.keys()
    for name, x in ({"voice": whole["voice"]} | rest).items():
        assert np.abs(files[name] - x).max() < 1e-6


def test_two_stems_of_a_loud_song_add_up_to_the_mix(checkpoint, tmp_path):
    """--clip joint with the mix minus the stem: at one gain, within quantisation, though the parts would clip."""
    song = write(tmp_path / "loud.wav", gain=1.9)
    given = ["--two-stems", "voice", "--other-method", "minus", "--clip", "joint", "--json"]
    assert run("separate", song, "-n", checkpoint, "-o", tmp_path / "out", *given) == 0
    parts = [soundfile.read(p, dtype="float64")[0].T for p in (tmp_path / "out/tiny/loud").iterdir()]
    mix = recording.read(song)[0].astype(np.float64)
    gain = np.sum(sum(parts) * mix) / np.sum(mix**2)
    assert gain < 0.8
    assert np.abs(sum(parts) - gain * mix).max() < 2 * 2 * 2.0**-15  # each part is truncated by less than two steps


def test_joint_keeps_the_sum_of_all_stems(checkpoint, tmp_path):
    song = write(tmp_path / "loud.wav", gain=1.9)
    assert run("separate", song, "-n", checkpoint, "-o", tmp_path / "out", "--clip", "joint", "--bits", 24) == 0
    whole = expected(checkpoint, song)
    gain = 1 / (1.01 * max(np.abs(x).max() for x in whole.values()))
    total = sum(soundfile.read(p, dtype="float64")[0].T for p in (tmp_path / "out/tiny/loud").iterdir())
    assert gain < 0.8 and np.abs(total - gain * sum(whole.values())).max() < 3 * 2 * 2.0**-23 + 1e-6


def test_stems_and_names_of_files(checkpoint, song, tmp_path):
    given = ["--stems", "rest,drums", "--filename", "{stem}/{track}-{trackext}.{ext}", "--bits", 32, "--clip", "clamp"]
    assert run("separate", song, "-n", checkpoint, "-o", tmp_path / "out", *given, "--report") == 0
    found = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")}
    stems = {"tiny/rest/song-wav.wav", "tiny/drums/song-wav.wav"}
    assert found == {*stems, "tiny/report/song-wav.html", "index.html"}
    whole = expected(checkpoint, song)
    written, _ = soundfile.read(tmp_path / "out/tiny/drums/song-wav.wav", dtype="float32")
    assert np.abs(written.T - np.clip(whole["drums"], -0.99, 0.99)).max() < 1e-6


def test_a_seed_reproduces_every_bit(checkpoint, tmp_path):
    """Of the files, whatever their format; another seed makes others."""
    song = write(tmp_path / "song.wav", 501)
    for kind in (["--bits", 32], ["--format", "flac"], ["--format", "mp3"]):
        made = []
        for turn, seed in enumerate((3, 3, 4)):
            out = tmp_path / f"{kind[-1]}{turn}"
            assert run("separate", song, "-n", checkpoint, "-o", out, "--seed", seed, "--shifts", 1, *kind) == 0
            made.append({p.name: p.read_bytes() for p in (out / "tiny" / "song").iterdir()})
        assert len(made[0]) == 3 and made[0] == made[1]
        assert all(made[0][name] != made[2][name] for name in made[0])


def test_batch_size_and_device(checkpoint, song, tmp_path, capsys):
    assert run("separate", song, "-n", checkpoint, "-o", tmp_path / "a", "--batch-size", 3, "--device", "cpu") == 0
    assert run("separate", song, "-n", checkpoint, "-o", tmp_path / "b") == 0
    for stem in STEMS:
        a, b = (soundfile.read(tmp_path / x / f"tiny/song/{stem}.wav", dtype="int16")[0] for x in "ab")
        assert np.abs(a.astype(int) - b).max() <= 1
    assert run("separate", song, "-n", checkpoint, "-o", tmp_path / "c", "--batch-size", 0) == 1
    assert "batch_size must be at least 1, got 0" in capsys.readouterr().err
    if not mx.is_available(mx.Device(mx.gpu)):
        assert run("separate", song, "-n", checkpoint, "-o", tmp_path / "c", "--device", "gpu") == 1
        assert "device must be available, got 'gpu'" in capsys.readouterr().err


def test_json(checkpoint, song, tmp_path, capsys):
    """One line a recording, good or bad, and nothing else."""
    gone = tmp_path / "gone.wav"
    given = ["-n", checkpoint, "-o", tmp_path / "out", "--json", "--report", "--rate", "keep"]
    assert run("separate", song, gone, *given) == 1
    captured = capsys.readouterr()
    bad, good = map(json.loads, captured.out.splitlines())
    assert bad == {"file": str(gone), "error": f"{gone} does not exist"} and captured.err.count("\n") == 1
    assert good["file"] == str(song) and list(good["files"]) == STEMS
    for path in good["files"].values():
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.frames) == (
            good["sample_rate"],
            good["channels"],
            good["samples"],
        )
    assert good["seconds"] == 3000 / RATE and good["took"] > 0 and good["report"].endswith("song/report.html")
    assert good["gains"].keys() == good["files"].keys() and all(0 < g <= 1 for g in good["gains"].values())


def test_a_folder_of_recordings(checkpoint, tmp_path, capsys):
    songs = tmp_path / "songs"
    songs.mkdir()
    for name in ("b.wav", "a.WAV"):
        write(songs / name)
    (songs / "cover.txt").write_text("no recording")
    assert run("separate", songs, songs / "b.wav", "-n", checkpoint, "-o", tmp_path / "out") == 0
    assert sorted(p.name for p in (tmp_path / "out" / "tiny").iterdir()) == ["a", "b"]
    assert capsys.readouterr().out.count("times real time") == 2


def test_container(checkpoint, tmp_path):
    """The sound of a container that libsndfile does not know."""
    x = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 4001)).astype(np.float32)
    with av.open(str(tmp_path / "song.mka"), "w") as container:
        stream = container.add_stream("pcm_f32le", rate=RATE, layout="stereo")
        frame = av.AudioFrame.from_ndarray(x.T.reshape(1, -1).copy(), "flt", "stereo")
        frame.sample_rate = RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    given = ["-n", checkpoint, "-o", tmp_path / "out", "--bits", 32, "--clip", "none"]
    assert run("separate", tmp_path / "song.mka", *given) == 0
    for stem, y in separate(load(checkpoint), x, RATE).items():
        written, _ = soundfile.read(tmp_path / "out/tiny/song" / f"{stem}.wav", dtype="float32")
        assert (y == written.T).all()


def test_list_models(capsys, monkeypatch, tmp_path, checkpoint):
    kept = tmp_path / "hub" / "adefossez--HTDemucs-6s" / "htdemucs_6s" / "abc"
    kept.parent.mkdir(parents=True)
    kept.symlink_to(checkpoint)
    monkeypatch.setenv("MLX_XFORMER_CACHE", str(tmp_path))
    with pytest.raises(SystemExit) as exit_:
        run("separate", "--list-models")
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert exit_.value.code == 0 and list(lines) == ["htdemucs", "htdemucs_ft", "htdemucs_6s", "htdemucs_mini"]
    assert lines["htdemucs"] == "on the hub, downloaded on first use" and lines["htdemucs_6s"] == str(kept)
    assert lines["htdemucs_mini"].startswith("in this package")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--stems", "rest,flute"], "stems must be among drums, voice, rest, got flute"),
        (["--two-stems", "flute"], "two_stems must be one of drums, voice, rest, got flute"),
        (["--format", "flac", "--bits", "32"], "bits must be 16 or 24 for flac, got 32"),
        (["--format", "mp3", "--mp3-bitrate", "100"], "mp3_bitrate must be one of"),
        (["--format", "mp3", "--mp3-bitrate", "320"], "kbit/s at 8000 Hz, got 320"),
        (["--filename", "{track}.{ext}"], "filename must hold {stem}"),
        (["--filename", "../{stem}.{ext}"], "filename must name files below the output folder"),
    ],
    ids=str,
)
def test_options_that_cannot_be(checkpoint, song, tmp_path, capsys, given, message):
    assert run("separate", song, "-n", checkpoint, "-o", tmp_path / "out", *given) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and message in captured.err
    assert not (tmp_path / "out").exists()


def test_shared_out_files():
    """Every file goes to exactly one process, and the bytes are spread."""
    from mlx_xformer.cli.songs import Song, select_share

    class File:
        def __init__(self, size):
            self.st_size = size

        def stat(self):
            return self

        def __lt__(self, other):
            return id(self) < id(other)

    files = [Song(File(size)) for size in (7, 50, 20, 31, 11, 40)]
    shares = [select_share(files, rank, 3) for rank in range(3)]
    assert sorted(map(id, itertools.chain(*shares))) == sorted(map(id, files))
    assert max(sum(song.path.st_size for song in share) for share in shares) == 57
    assert select_share(files, 0, 1) == files
