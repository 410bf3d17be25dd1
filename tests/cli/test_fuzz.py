"""Broken audio: 200 files with spoilt headers, noise and nothing at all. Each is separated, or is one line."""

import io
import itertools
import random
import re
from concurrent.futures import ThreadPoolExecutor

import av
import mlx.core as mx
import numpy as np
import pytest
import soundfile
from support.audio import TINY_RATE as RATE
from support.audio import write_noise as noise
from support.ffmpeg import FLOATS, decode, differ
from support.models import FAST, STEMS, checkpoint
from support.processes import run_all

from mlx_xformer.audio import recording
from mlx_xformer.cli import main

SAMPLES = 797  # a header that claims 1 Hz makes 13 minutes of them
KINDS = {
    "wav": {"format": "WAV", "subtype": "PCM_16"},
    "floats.wav": {"format": "WAVEX", "subtype": "FLOAT"},
    "flac": {"format": "FLAC"},
    "mp3": {"format": "MP3"},
    "ogg": {"format": "OGG"},
    "aiff": {"format": "AIFF"},
    "m4a": {"format": "ipod", "movflags": "empty_moov+frag_keyframe"},
    "mp4": {"format": "mp4", "movflags": "use_metadata_tags"},
}
CHATTER = re.compile(r"(\[src/libmpg123/|Note: |Warning: ).*\n|\n")  # of mpg123, which libsndfile reads MP3 with
HEADER = 200  # bytes that are spoilt; in mp4 its tables are at the end


def whole(kind):
    """A short recording in a format, as bytes."""
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (SAMPLES, 2)).astype(np.float32)
    file, given = io.BytesIO(), dict(KINDS[kind])
    if "movflags" not in given:
        soundfile.write(file, samples, RATE, **given)
        return file.getvalue()
    with av.open(file, "w", format=given.pop("format"), options=given) as container:
        stream = container.add_stream("aac", rate=RATE, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), format="fltp", layout="stereo")
        frame.sample_rate = RATE
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return file.getvalue()


def spoil(way, kind, rng):
    """A recording of a kind, spoilt in its header."""
    data = whole(kind)
    start = data.rfind(b"moov") if "movflags" in KINDS[kind] else 0
    start = max(0, start - 4) if rng.randrange(4) else 0
    return data[:start] + way(data[start:], rng)


def flipped(data, rng):
    for at in (rng.randrange(min(HEADER, len(data))) for _ in range(rng.choice((1, 1, 2, 5, 11)))):
        data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    return data


def inserted(data, rng):
    at = rng.randrange(HEADER)
    return data[:at] + rng.randbytes(rng.randrange(1, 17)) + data[at:]


def shortened(data, rng):
    at = rng.randrange(HEADER)
    return data[:at] + data[at + rng.randrange(1, 17) :]


def truncated(data, rng):
    return data[: rng.randrange(1, HEADER)]


def spoilt(seed=0):
    """(name, bytes) of 200 files."""
    rng = random.Random(seed)
    ways = [flipped, flipped, flipped, inserted, inserted, shortened, truncated]
    turns = itertools.product(range(3), ways, KINDS)
    for number, (_, way, kind) in enumerate(turns):
        yield f"{number}-{way.__name__}.{kind}", spoil(way, kind, rng)
    suffixes = [kind.split(".")[-1] for kind in KINDS]
    for number, suffix in enumerate((*suffixes, *suffixes[:-1], "opus", "raw", "txt", "none")):
        yield f"noise{number}.{suffix}", rng.randbytes(rng.randrange(1, 3001))
    for number, suffix in enumerate((*suffixes, "aac", "raw", "vox", "bin", "")):
        yield f"empty{number}.{suffix}", b""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("models") / "tiny", segment="5/1", **FAST)


def outcomes(model, folder, files, limit=240):
    """{name: Result} of files, each with a command line of its own."""
    folder.mkdir()
    tasks = []
    for name, data in files.items():
        (folder / name).write_bytes(data)
        tasks.append((["separate", folder / name, "-n", model, "--shifts", 0], folder / "out", None, None))
    return dict(zip(files, run_all(tasks, limit=limit), strict=True))


def test_whole_files_are_separated(model, tmp_path):
    """What is spoilt below is right before."""
    files = {f"whole.{kind}": whole(kind) for kind in KINDS}
    for name, result in outcomes(model, tmp_path / "whole", files).items():
        assert (result.code, result.err, len(result.files)) == (0, "", len(STEMS)), name


@pytest.mark.slow
def test_broken_files_give_stems_or_one_line(model, tmp_path):
    files = dict(spoilt())
    assert len(files) == 200 and len(set(files.values())) > 180
    names = list(files)
    halves = [{name: files[name] for name in names[first::2]} for first in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda n: outcomes(model, tmp_path / str(n), halves[n]), (0, 1)))
    results = found[0] | found[1]
    wrong = {}
    for name, result in results.items():
        err = "".join(line for line in result.err.splitlines(True) if not CHATTER.fullmatch(line))
        told = all(line.startswith("mlx-xformer: ") and name in line for line in err.splitlines())  # what is damaged
        fine = (result.code, len(result.files)) == (0, len(STEMS)) and told
        line = err.startswith("mlx-xformer: ") and err.count("\n") == 1 and name in err
        refused = (result.code, result.out, result.error) == (1, "", None) and line and not result.folder_exists
        if not (fine or refused):
            wrong[name] = result
    assert not wrong
    codes = [result.code for result in results.values()]
    assert codes.count(0) >= 20 and codes.count(1) >= 60  # both happen
    assert all(results[name].code == 1 for name in names if name.startswith("empty"))


def test_a_recording_that_is_cut_off_gives_what_is_there(tmp_path):
    """The header of an MP3 still counts all of it; what the file lacks is not filled up."""
    path = tmp_path / "half.mp3"
    samples = np.random.default_rng(1).uniform(-0.5, 0.5, (200003, 2)).astype(np.float32)
    soundfile.write(path, samples, 44100, format="MP3")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    expected, _ = decode(path)
    assert 65536 < expected.shape[1] < 200003
    with pytest.warns(UserWarning, match="the file ends at 0:02.* promises 0:04"):
        found, _ = recording.read(path)
    assert differ(found, expected) <= FLOATS


def test_levels_beyond_reason(model, tmp_path, capfd):
    """Samples that are finite, but whose sums are not: one line rather than stems of NaN."""
    path, out = tmp_path / "loud.wav", tmp_path / "out"
    samples = np.random.default_rng(0).uniform(-3e38, 3e38, (SAMPLES, 2)).astype(np.float32)
    soundfile.write(path, samples, RATE, subtype="FLOAT")
    assert main(["separate", str(path), "-n", str(model), "-o", str(out)]) == 1
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and err.startswith(f"mlx-xformer: {path}") and not out.exists()


def test_a_model_that_gives_nan(tmp_path, capfd):
    """Never stems of NaN."""
    folder = checkpoint(tmp_path / "nan", **FAST, segment="5/1")
    weights = mx.load(str(folder / "model.safetensors"))
    weights["tdecoder.0.conv_tr.bias"] = weights["tdecoder.0.conv_tr.bias"] * mx.nan
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    path, out = noise(tmp_path / "song.wav", SAMPLES), tmp_path / "out"
    assert main(["separate", str(path), "-n", str(folder), "-o", str(out)]) == 1
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "NaN" in err and not out.exists()
