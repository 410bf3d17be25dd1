"""Memory does not grow with a recording, and the stems are, bit for bit, those of a run that holds all of it.

Peaks are those of processes of their own. Models are quick ones (see children.py), so that an hour takes seconds.
"""

import dataclasses
import json
import random

import av
import mlx.core as mx
import numpy as np
import pytest
import soundfile
import soxr
from support.audio import TINY_RATE as RATE
from support.audio import write_noise as noise
from support.models import FAST, STEMS, bag_checkpoint, checkpoint
from support.processes import end, start

from mlx_xformer.audio.encode import quantize
from mlx_xformer.audio.recording import Recording, read
from mlx_xformer.models.htdemucs import HTDemucs
from mlx_xformer.pretrained.loading import load
from mlx_xformer.separation.run import Run
from mlx_xformer.separation.separator import Separator
from mlx_xformer.separation.stems import Output

HOUR_RATE = 4001  # Hz: an hour of two stems takes 230 MB as floats, its recording 115
MOST = 40  # MiB that an hour may take beyond three minutes: a third of its recording

# Separates files in turn and prints the peak of memory after each, then that of the last one as an array, and in how
# many samples the files differ from it.
CHILD = """
import json, resource, sys
import numpy as np, soundfile
from pathlib import Path
from mlx_xformer.audio.recording import read
from mlx_xformer.separation.separator import Separator
from mlx_xformer.separation.stems import Output

def peak():
    if sys.platform == "linux":  # where a parent's peak shows in its child's ru_maxrss
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

model, songs, out, output, compare = json.loads(sys.argv[1])
separator, peaks = Separator(model, mode="time_only", shifts=0), []
for song in songs:
    made = separator.separate_file(song, out, Output(**output))
    peaks.append(peak())
answer = {"peaks": peaks, "samples": made.samples, "different": None}
if compare:
    stems = separator.separate(*read(songs[-1]))
    answer["different"] = 0
    for stem, path in made.files.items():
        written, _ = soundfile.read(path, dtype="float32", always_2d=True)
        assert written.T.shape == stems[stem].shape
        answer["different"] += int((written.T != stems[stem]).sum())
    answer["whole"] = peak()
print(json.dumps(answer))
"""


def measure(model, songs, out, output, compare=False):
    """What a process that separates `songs` says of itself."""
    code, stdout, err = end(start(CHILD, json.dumps([str(model), list(map(str, songs)), str(out), output, compare])))
    assert (code, err) == (0, "")
    return json.loads(stdout)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A model that separates an hour in seconds."""
    folder = tmp_path_factory.mktemp("models") / "quick"
    return checkpoint(folder, samplerate=HOUR_RATE, segment="5/1", sources=["one", "rest"], **FAST)


def adts(path, minute, minutes):
    """A file of AAC frames, those of one minute (samples at 11025 Hz) over and over."""
    single = path.with_suffix(".minute.aac")
    with av.open(str(single), "w", format="adts") as container:
        stream = container.add_stream("aac", rate=11025, layout="stereo")
        frame = av.AudioFrame.from_ndarray(minute, format="fltp", layout="stereo")
        frame.sample_rate = 11025
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    path.write_bytes(single.read_bytes() * minutes)
    return path


@pytest.mark.slow
def test_an_hour_takes_the_memory_of_three_minutes(quick, tmp_path):
    """And gives the same samples, each of them, as the whole hour in memory, which is seen to take more."""
    songs = [noise(tmp_path / f"{n}.flac", 60 * n * HOUR_RATE, HOUR_RATE, seed=n) for n in (3, 60)]
    output = {"bits": 32, "clip": "none"}
    short, long = (measure(quick, [song], tmp_path / "out", output, compare=True) for song in songs)
    assert long["peaks"][0] - short["peaks"][0] < MOST, (short, long)
    assert (short["samples"], short["different"]) == (180 * HOUR_RATE, 0)
    assert (long["samples"], long["different"]) == (3600 * HOUR_RATE, 0)
    assert long["whole"] - long["peaks"][0] > 4 * MOST, long  # so growth would be seen


@pytest.mark.slow
def test_an_hour_that_waits_for_its_gain(quick, tmp_path):
    """In a format that tells its length only at its end, and at another rate, which is kept."""
    minute = np.random.default_rng(0).uniform(-0.9, 0.9, (2, 60 * 11025)).astype(np.float32)
    songs = [adts(tmp_path / f"{n}.aac", minute, n) for n in (3, 60)]
    output = {"bits": 16, "clip": "joint", "rate": "keep"}
    short, long = (measure(quick, [song], tmp_path / "out", output) for song in songs)
    assert long["peaks"][0] - short["peaks"][0] < MOST, (short, long)
    assert long["samples"] == 20 * short["samples"] > 3590 * 11025


@pytest.mark.slow
def test_songs_one_after_another_take_the_memory_of_one(quick, tmp_path):
    """The sixth song needs no more than the second: ten minutes would be 19 MiB, their stems twice as much."""
    songs = [noise(tmp_path / f"{n}.wav", 600 * HOUR_RATE + n, HOUR_RATE, seed=n) for n in range(6)]
    peaks = measure(quick, songs, tmp_path / "out", {"clip": "joint"})["peaks"]
    assert peaks[5] - peaks[1] < 12, peaks


# What follows compares with an unstreamed run: all of the audio in arrays, one pass after the other.


@pytest.fixture
def on_cpu():
    """Where each operation is rounded as NumPy rounds it."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


def unstreamed(model, mix, *, shifts=1, overlap=0.25, seed=0, weights=None):
    """mix (C, N) at the model's rate -> (S, C, N): demucs' apply_model, on the whole track."""
    models = [model] if isinstance(model, HTDemucs) else model.models
    weights = np.array(model.config.weights if weights is None else weights, np.float32)
    mono = mix.mean(axis=0).astype(np.float64)
    center, scale = np.float32(mono.mean()), np.float32(mono.std(ddof=1) + 1e-8)
    level, rng, out = (mix - center) / scale, random.Random(seed), np.float32(0)
    for member, row in zip(models, weights, strict=True):
        passes = [one_pass(member, level, rng, overlap, bool(shifts)) for _ in range(max(shifts, 1))]
        out = out + sum(passes[1:], passes[0]) / np.float32(len(passes)) * row[:, None, None]
    return out / weights.sum(0)[:, None, None] * scale + center


def one_pass(model, level, rng, overlap, shifted):
    """(S, C, N) of a pass over the levelled track, which a random shift may move."""
    segment, half = model.config.segment_samples, model.config.samplerate // 2
    skip = half - rng.randint(0, half) if shifted else 0
    track = np.pad(level, [(0, 0), (skip + segment, segment)])  # zeros where the track is not
    length = skip + level.shape[1]
    weight = np.concatenate([np.arange(1, segment // 2 + 1), np.arange(segment - segment // 2, 0, -1)])
    weight = (weight / weight.max()).astype(np.float32)
    total, weighed = np.float32(0), np.zeros(length, np.float32)
    for offset in range(0, length, int((1 - overlap) * segment)):
        n = min(segment, length - offset)
        left = (segment - n) // 2
        draw = rng.randrange(model.config.t_sin_random_shift + 1) if model.config.t_layers else 0
        piece = mx.array(track[None, :, segment + offset - left : 2 * segment + offset - left])
        stem = np.array(model(piece, position_shift=draw)[0])[..., left : left + n] * weight[:n]
        total = total + np.pad(stem, [(0, 0), (0, 0), (offset, length - offset - n)])
        weighed[offset : offset + n] += weight[:n]
    return (total * (1 / weighed))[..., skip:]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "drawing": checkpoint(folder / "drawing", segment="1/1", t_sin_random_shift=11),  # a shift for each segment
        "one": checkpoint(folder / "one", **FAST, segment="2/1"),
        "bag": bag_checkpoint(folder / "bag", ((1.0, 0.25, 0.0), (0.5, 1.0, 2.0)), **FAST, segment="2/1"),
    }


@pytest.fixture(scope="module")
def song(tmp_path_factory):
    """More than a block (of 65536 samples), at the models' rate."""
    return noise(tmp_path_factory.mktemp("songs") / "song.wav", 70001, subtype="FLOAT")


def written(made):
    """(S, C, N) of the stems' files."""
    return np.stack([soundfile.read(path, dtype="float32", always_2d=True)[0].T for path in made.files.values()])


PLAIN = Output(bits=32, clip="none")


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("one", {"shifts": 0}),
        ("one", {"shifts": 2, "seed": 3, "overlap": 0.4}),
        ("drawing", {"shifts": 2, "seed": 4}),
        ("bag", {"shifts": 1, "seed": 5}),
    ],
    ids=["plain", "shifts", "draws", "bag"],
)
def test_files_agree_with_an_unstreamed_run(on_cpu, models, song, tmp_path, name, given):
    song = noise(tmp_path / "short.wav", 20011, subtype="FLOAT") if name == "drawing" else song  # it is slow
    separator = Separator(models[name], **given)
    model = load(models[name])
    audio, _ = read(song)
    expected = unstreamed(model, audio, **given, **({} if name == "bag" else {"weights": np.ones((1, 3))}))
    found = written(separator.separate_file(song, tmp_path / "out", PLAIN))
    assert found.shape == expected.shape and (found == expected).all()
    stems = separator.separate(audio, RATE)
    assert list(stems) == list(STEMS) and (np.stack(list(stems.values())) == expected).all()


@pytest.mark.parametrize("method", ["add", "minus"])
def test_two_stems_agree_with_an_unstreamed_run(on_cpu, models, song, tmp_path, method):
    separator = Separator(models["one"], shifts=2, two_stems="voice", other_method=method)
    audio, _ = read(song)
    drums, voice, rest = unstreamed(load(models["one"]), audio, shifts=2, weights=np.ones((1, 3)))
    expected = np.stack([voice, drums + rest if method == "add" else audio - voice])
    found = written(separator.separate_file(song, tmp_path / "out", PLAIN))
    assert (found == expected).all()


@pytest.mark.parametrize("clip", ["rescale", "joint", "clamp", "none"])
@pytest.mark.parametrize("rate", ["model", "keep"])
def test_rates_and_clipping_agree_with_an_unstreamed_run(on_cpu, models, tmp_path, clip, rate):
    song = noise(tmp_path / "song.wav", 96013, 11027, level=2.5, subtype="FLOAT")
    audio, _ = read(song)
    audio = soxr.resample(audio.T, 11027, RATE, quality="VHQ").T
    stems = unstreamed(load(models["one"]), audio, shifts=0, weights=np.ones((1, 3)))
    if rate == "keep":
        stems = np.stack([soxr.resample(stem.T, RATE, 11027, quality="VHQ").T[:, :96013] for stem in stems])
        stems = np.pad(stems, [(0, 0), (0, 0), (0, 96013 - stems.shape[2])])
    peaks = np.maximum(np.float32(1.01) * np.abs(stems).max(axis=(1, 2)), 1).astype(np.float32)
    assert peaks.max() > 1
    divisors = {"rescale": peaks, "joint": np.full(3, peaks.max()), "clamp": np.ones(3), "none": np.ones(3)}[clip]
    expected = stems / divisors.astype(np.float32)[:, None, None]
    expected = np.clip(expected, -0.99, 0.99) if clip == "clamp" else expected
    for bits in (32, 16):
        made = Separator(models["one"], shifts=0).separate_file(
            song, tmp_path / "out", Output(bits=bits, clip=clip, rate=rate)
        )
        found = [soundfile.read(path, dtype="float32" if bits == 32 else "int16")[0].T for path in made.files.values()]
        assert (np.stack(found) == (expected if bits == 32 else quantize(expected, 16))).all()


def stems_of(separator, recording):
    return np.concatenate(
        [np.array(part) for part in Run(separator.model, separator.options, recording, None, None).blocks()], axis=-1
    )


@pytest.mark.parametrize("size", [1009, 65535, 65536, 65537, 10**6])
@pytest.mark.parametrize("rate", [RATE, 11027])
def test_blocks_of_any_size_give_the_same_bits(models, song, size, rate):
    separator = Separator(models["one"], shifts=1)
    audio, _ = read(song)
    whole = Recording.from_array(audio, rate)
    starts = range(0, audio.shape[1], size)
    other = dataclasses.replace(whole, decode=lambda warn: (audio[:, at : at + size] for at in starts))
    assert (stems_of(separator, whole) == stems_of(separator, other)).all()
    assert (np.concatenate(list(other.convert_blocks(2, rate)), axis=1) == audio).all()


def test_a_recordings_format_does_not_matter(models, tmp_path):
    """WAV and FLAC in libsndfile's blocks, and samples in FFmpeg's frames."""
    samples = np.random.default_rng(0).integers(-16001, 16001, (70001, 2), dtype=np.int16)
    songs = [tmp_path / name for name in ("a.wav", "b.flac", "c.mov")]
    for song in songs[:2]:
        soundfile.write(song, samples, RATE)
    with av.open(str(songs[2]), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=RATE, layout="stereo")
        for start_ in range(0, len(samples), 1009):
            part = np.ascontiguousarray(samples[start_ : start_ + 1009]).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(part, format="s16", layout="stereo")
            frame.sample_rate, frame.pts = RATE, start_
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert Recording.open(songs[2]).samples is None
    separator = Separator(models["one"], shifts=1)
    first, *others = (written(separator.separate_file(song, tmp_path / "out", PLAIN)) for song in songs)
    assert first.shape == (3, 2, 70001) and all((other == first).all() for other in others)
