"""Stems' files, read back with other readers; clipping, faults."""

import json

import av
import numpy as np
import pytest
import soundfile
from support.ffmpeg import decode, ffmpeg
from support.models import FAST, checkpoint

from mlx_xformer.audio import encode, recording
from mlx_xformer.audio.tags import Tags, read_tags
from mlx_xformer.cli import main
from mlx_xformer.separation.separator import Separator
from mlx_xformer.separation.stems import Output, StemFiles


def noise(channels=2, samples=1000, seed=0, peak=0.9):
    x = np.random.default_rng(seed).uniform(-peak, peak, (channels, samples))
    return x.astype(np.float32)


def write(folder, tracks, output, rate=44100, cuts=(1000,)):
    """The files of some tracks, written in stretches that end at `cuts`, and their gains."""
    paths = {stem: folder / f"{stem}.{output.format}" for stem in tracks}
    channels, samples = next(iter(tracks.values())).shape
    with StemFiles(paths, rate, channels, samples, output) as files:
        for parts in zip(*(np.split(x, cuts, axis=1) for x in tracks.values()), strict=True):
            files.write(dict(zip(tracks, parts, strict=True)))
        gains = files.commit()
    return paths, gains


def read_back(path):
    """(rate, channels, sample format, bits, bit rate, (C, N) in the file's own numbers), by FFmpeg's libraries."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        frames = [
            f.to_ndarray().reshape(-1, stream.channels if f.format.is_packed else f.samples)
            for f in container.decode(stream)
        ]
        planar = stream.format.is_planar
        samples = np.concatenate(frames, axis=1).astype(float) if planar else np.concatenate(frames).T
        context = stream.codec_context
        return stream.rate, stream.channels, context.format.name, stream.bit_rate, samples


@pytest.mark.parametrize("cuts", [(), (1,), (97, 98, 700), (1000,)], ids=str)
@pytest.mark.parametrize("clip", ["rescale", "joint", "clamp", "none"])
def test_clipping(tmp_path, clip, cuts):
    """Each mode by its formula, however the samples arrive; the gains are those that were applied."""
    tracks = {"loud": noise(peak=2, seed=1), "louder": noise(peak=3, seed=2), "soft": noise(peak=0.3, seed=3)}
    paths, gains = write(tmp_path, tracks, Output(bits=32, clip=clip), cuts=cuts)
    divisors = {stem: max(np.float32(1.01) * np.abs(x).max(), np.float32(1)) for stem, x in tracks.items()}
    if clip == "joint":
        divisors = dict.fromkeys(divisors, max(divisors.values()))
    for stem, x in tracks.items():
        expected = {"clamp": np.clip(x, -0.99, 0.99), "none": x}.get(clip, x / divisors[stem])
        assert (expected == soundfile.read(paths[stem], dtype="float32")[0].T).all()
        assert gains[stem] == pytest.approx(1 / divisors[stem] if clip in ("rescale", "joint") else 1, rel=1e-6)
    assert len(set(gains.values())) == {"rescale": 3, "joint": 1, "clamp": 1, "none": 1}[clip]


@pytest.mark.parametrize("bits", [16, 24])
def test_joint_stems_add_up(tmp_path, bits):
    """Within quantisation: each stem is truncated by less than one step."""
    mix = noise(peak=1.9)
    part = noise(peak=0.8, seed=5)
    paths, gains = write(tmp_path, {"a": part, "b": mix - part}, Output(bits=bits, clip="joint"))
    total = sum(soundfile.read(path, dtype="float64")[0].T for path in paths.values())
    assert gains["a"] == gains["b"] < 1
    # A stem of full scale 2^(bits-1) - 1, read as parts of 2^(bits-1), is truncated by less than a step.
    budget = sum((1 + np.abs(x)) * 2.0 ** (1 - bits) + 2.0**-22 for x in (part, mix - part))
    assert (np.abs(total - gains["a"] * mix.astype(float)) < budget).all()


@pytest.mark.parametrize(("bits", "kind", "unit"), [(16, "s16", 2**15), (24, "s32", 2**31)])
def test_flac(tmp_path, bits, kind, unit):
    x = noise(samples=70_001)
    paths, _ = write(tmp_path, {"a": x}, Output("flac", bits=bits, clip="none"), rate=48000, cuts=(9,))
    rate, channels, found, _, samples = read_back(paths["a"])
    assert (rate, channels, found, samples.shape) == (48000, 2, kind, x.shape)
    assert (samples == encode.quantize(x, bits)).all()
    assert soundfile.info(paths["a"]).subtype == f"PCM_{bits}"
    assert np.abs(samples / unit - x).max() < 2.0 ** (2 - bits)


@pytest.mark.parametrize(
    ("rate", "kbps"), [(44100, 320), (44100, 128), (48000, 192), (32000, 64), (22050, 160), (16000, 64), (8000, 24)]
)
def test_mp3(tmp_path, rate, kbps):
    t = np.arange(5 * rate + 7) / rate
    tone = (0.4 * np.sin(2 * np.pi * 440 * t) * np.array([[1], [0.5]])).astype(np.float32)
    paths, _ = write(tmp_path, {"a": tone}, Output("mp3", mp3_bitrate=kbps), rate=rate, cuts=(5000,))
    found_rate, channels, _, bit_rate, samples = read_back(paths["a"])
    assert (found_rate, channels, bit_rate) == (rate, 2, 1000 * kbps)
    assert samples.shape[1] == tone.shape[1]  # the padding is noted in the header
    back, _ = soundfile.read(paths["a"], always_2d=True)
    assert len(back) == tone.shape[1] and np.abs(back.T - tone)[:, 3000:-3000].max() < 0.05


@pytest.mark.parametrize("rate", [44100, 22050, 8000])
def test_every_mp3_bitrate(tmp_path, rate):
    for kbps in (None, *encode._MP3_RATES[rate]):
        paths, _ = write(tmp_path, {"a": noise(samples=rate)}, Output("mp3", mp3_bitrate=kbps), rate=rate)
        assert read_back(paths["a"])[3] == 1000 * (kbps or {44100: 320, 22050: 160, 8000: 64}[rate])


@pytest.mark.parametrize("format", ["mp3", "ogg", "opus", "m4a"])
def test_loud_lossy_files_are_cut(tmp_path, format):
    t = np.arange(48000) / 48000
    loud = (3 * np.sin(2 * np.pi * 440 * t))[None].astype(np.float32)
    write(tmp_path, {"a": loud, "b": np.clip(loud, -1, 1)}, Output(format, clip="none"), rate=48000)
    assert (tmp_path / f"a.{format}").read_bytes() == (tmp_path / f"b.{format}").read_bytes()


@pytest.mark.parametrize("format", encode.FORMATS)
def test_separations_in_every_format(tmp_path, capsys, format):
    """A song at 11,025 Hz through a model at 8,000 Hz: what is told is what the files hold, with the song's tags."""
    model = checkpoint(tmp_path / "tiny", segment="5/1", **FAST)
    soundfile.write(tmp_path / "song.wav", noise(samples=20_011, peak=0.5).T, 11025)
    tags = ["-metadata", "title=Ode", "-metadata", "artist=Me", "-metadata", "track=7"]
    ffmpeg("-i", tmp_path / "song.wav", *tags, tmp_path / "song.flac")
    pattern = "{artist}/{number}. {title} - {stem}.{ext}"
    arguments = [tmp_path / "song.flac", "-n", model, "-o", tmp_path / "out", "--shifts", 0, "--filename", pattern]
    for rate, expected in (("model", 8000), ("keep", 11025)):
        assert main(["separate", *map(str, arguments), "--rate", rate, "--format", format, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        path = tmp_path / "out" / "tiny" / "Me" / f"07. Ode - voice.{format}"
        assert told["files"]["voice"] == str(path)
        back, found = decode(path)
        expected = 48000 if format == "opus" else expected
        assert (found, found, len(back)) == (expected, told["sample_rate"], told["channels"])
        assert back.shape[1] == told["samples"] == round(20_011 / 11025 * expected)
        assert np.abs(back).max() > 0.01
        found = read_tags(path)
        assert (found.title, found.artist, found.album, found.number) == ("Ode (voice)", "Me", "", "7")


def test_tags_that_are_given(tmp_path):
    """They name the files, and stand in them, instead of those of the song."""
    separator = Separator(checkpoint(tmp_path / "tiny", segment="5/1", **FAST), shifts=0)
    soundfile.write(tmp_path / "song.wav", noise(samples=3001, peak=0.5).T, 8000)
    output = Output("mp3", filename="{artist}/{stem}.{ext}")
    made = separator.separate_file(tmp_path / "song.wav", tmp_path, output, tags=Tags("Title", "Artist"))
    assert made.files["voice"] == tmp_path / "Artist" / "voice.mp3"
    assert read_tags(made.files["voice"]) == Tags("Title (voice)", "Artist")


def test_long_wav_files_are_rf64(tmp_path, monkeypatch):
    """A WAV header counts 4 GiB; the limit is lowered here."""
    monkeypatch.setattr(encode, "_WAV_LIMIT", 3999)
    write(tmp_path, {"over": noise()}, Output())
    monkeypatch.setattr(encode, "_WAV_LIMIT", 4000)
    write(tmp_path, {"under": noise()}, Output())
    assert [soundfile.info(tmp_path / f"{n}.wav").format for n in ("over", "under")] == ["RF64", "WAV"]
    assert (recording.read(tmp_path / "over.wav")[0] == recording.read(tmp_path / "under.wav")[0]).all()


def test_equal_samples_make_equal_files(tmp_path, monkeypatch):
    """libsndfile's PEAK chunk would note the second: of 0 here, so that no clock is needed to see it gone."""
    write(tmp_path, {"a": noise(samples=1003)}, Output(bits=32))
    raw = (tmp_path / "a.wav").read_bytes()
    assert raw[raw.index(b"PEAK") + 12 :][:4] == bytes(4)
    assert (noise(samples=1003) == soundfile.read(tmp_path / "a.wav", dtype="float32")[0].T).all()


class Failing:
    """soundfile.SoundFile, but the second file that is opened fails at its first samples."""

    def __init__(self, error):
        self.real, self.error, self.opened = soundfile.SoundFile, error, 0

    def __call__(self, *arguments, **options):
        self.opened += 1
        file = self.real(*arguments, **options)
        if self.opened == 2:

            def write(_):
                raise self.error

            file.write = write
        return file


@pytest.mark.parametrize("clip", ["rescale", "clamp"])
@pytest.mark.parametrize("error", [soundfile.LibsndfileError(2), AssertionError(), KeyboardInterrupt()], ids=repr)
def test_files_are_whole_or_not_there(tmp_path, monkeypatch, clip, error):
    """The second file fails: neither it, nor the first, nor a temporary file, nor a folder is left."""
    out = tmp_path / "new" / "deep"
    (tmp_path / "old").mkdir()
    monkeypatch.setattr(soundfile, "SoundFile", failing := Failing(error))
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OSError
    with pytest.raises(expected):
        write(out, {"a": noise(), "b": noise()}, Output(clip=clip))
    assert failing.opened == 2 and sorted(p.name for p in tmp_path.rglob("*")) == ["old"]


def test_older_files_survive_a_failure(tmp_path, monkeypatch):
    write(tmp_path, {"a": noise(seed=1), "b": noise(seed=2)}, Output())
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(soundfile, "SoundFile", Failing(soundfile.LibsndfileError(2)))
    with pytest.raises(OSError, match=r"could not write .*/[ab]\.wav: "):
        write(tmp_path, {"a": noise(seed=3), "b": noise(seed=4)}, Output())
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_what_a_killed_run_left_is_removed_and_what_another_writes_is_not(tmp_path):
    (tmp_path / ".mlx-xformer-dead1.part").write_text("left by a kill")
    (tmp_path / ".b.wav.part").write_text("of another program")
    paths = {"a": tmp_path / "a.wav"}
    with StemFiles(paths, 44100, 2, 10, Output(clip="none")) as one:
        assert not (tmp_path / ".mlx-xformer-dead1.part").exists() and (tmp_path / ".b.wav.part").exists()
        with StemFiles(paths, 44100, 2, 10, Output(clip="none")) as other:
            other.write({"a": noise(samples=10, seed=1)})
            other.commit()
        one.write({"a": noise(samples=10, seed=2)})
        one.commit()
    assert np.abs(recording.read(paths["a"])[0] - noise(samples=10, seed=2)).max() < 2.0**-14
    assert sorted(p.name for p in tmp_path.iterdir()) == [".b.wav.part", "a.wav"]


def test_names(tmp_path):
    song = tmp_path / "My.song.v2.flac"
    assert Output().path(tmp_path, song, "bass") == tmp_path / "My.song.v2" / "bass.wav"
    flat = Output("mp3", filename="{stem}/{track} ({trackext}).{ext}")
    assert flat.path(tmp_path, song, "bass") == tmp_path / "bass" / "My.song.v2 (flac).mp3"
    assert flat.path(tmp_path, tmp_path / "plain", "bass").name == "plain ().mp3"
    for name in ("..wav", "...wav", ".wav"):
        with pytest.raises(ValueError, match="its name leaves none for its stems"):
            Output().path(tmp_path, tmp_path / name, "bass")


def test_names_of_stem_files(tmp_path):
    """Beside the stems, or where they would be if the song's name were a stem's."""
    song = tmp_path / "My.song.flac"
    assert Output().stem_file_path(tmp_path, song, below="a") == tmp_path / "a/My.song/My.song.stem.mp4"
    flat = Output("mp3", filename="{track} ({stem}).{ext}")
    assert flat.stem_file_path(tmp_path, song) == tmp_path / "My.song.stem.mp4"
    tagged = Output(filename="{stem}/{artist}/{track}.{ext}")
    assert tagged.stem_file_path(tmp_path, song, tags=Tags(artist="A")) == tmp_path / "My.song/A/My.song.stem.mp4"
    for ext, name in (("{ext}", "A (My.song).stem.mp4"), ("wav", "A (My.song).wav.stem.mp4")):
        titled = Output(filename="{artist} ({stem})." + ext)
        assert titled.stem_file_path(tmp_path, song, tags=Tags(artist="A")) == tmp_path / name


def test_names_of_folders_and_tags(tmp_path):
    """A tree keeps its shape; a tag cannot name another folder, hide a file or be too long for a name."""
    song = tmp_path / "01.flac"
    assert Output().path(tmp_path, song, "bass", below="a/cd1") == tmp_path / "a" / "cd1" / "01" / "bass.wav"
    assert Output().path(tmp_path, song, "bass", below="") == tmp_path / "01" / "bass.wav"
    for below in ("/a", "a/../.."):
        with pytest.raises(ValueError, match=r"below must be a relative path without '\.\.', got"):
            Output().path(tmp_path, song, "bass", below=below)
    tagged = Output(filename="{artist}/{album}/{number} - {title} ({stem}).{ext}")

    def name(**tags):
        return str(tagged.path(tmp_path, song, "bass", tags=Tags(**tags)).relative_to(tmp_path))

    full = {"artist": "A\u3000B", "album": "曲", "title": "Song", "number": "3/12"}
    assert name(**full) == "A\u3000B/曲/03 - Song (bass).wav"
    assert name(**full | {"number": ""}) == "A\u3000B/曲/Song (bass).wav"
    assert name() == "unknown/unknown/unknown (bass).wav"
    odd = {"artist": "AC/DC\\", "album": "..", "title": " .a\x00\n\u2028\ud800b ", "number": "113"}
    assert name(**odd) == "AC_DC_/_./113 - _ab (bass).wav"
    ffmpeg("-f", "lavfi", "-i", "sine=d=0.1", "-metadata", "title=Ode", "-metadata", "artist=Me", song)
    assert tagged.path(tmp_path, song, "bass") == tmp_path / "Me" / "unknown" / "Ode (bass).wav"
    assert name(title="曲" * 100) == f"unknown/unknown/{'曲' * 40} (bass).wav"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"format": "aac"}, "format must be one of wav, flac, mp3, ogg, opus, m4a, got 'aac'"),
        ({"clip": "tanh"}, "clip must be one of rescale, joint, clamp, none, got 'tanh'"),
        ({"rate": 48000}, 'rate must be "model" or "keep", got 48000'),
        ({"bits": 8}, "bits must be 16, 24 or 32, got 8"),
        ({"format": "flac", "bits": 32}, "bits must be 16 or 24 for flac, got 32"),
        ({"format": "mp3", "mp3_bitrate": 100}, "mp3_bitrate must be one of 8, 16, .*, 320 kbit/s, got 100"),
        ({"filename": "{track}.{ext}"}, r"filename must hold \{stem\} and only .*, got '\{track\}.\{ext\}'"),
        (
            {"filename": "{stem}{genre}"},
            r"filename must hold \{stem\} and only \{track\}, .* \{number\}, got",
        ),
        ({"filename": "{stem"}, "filename must hold"),
        ({"filename": "{}{stem}"}, "filename must hold"),
        ({"filename": "{stem.__class__}{stem}"}, "filename must hold"),
        ({"filename": "/tmp/{stem}"}, "filename must name files below the output folder"),
        ({"filename": "../{stem}"}, "filename must name files below the output folder"),
        ({"filename": "{stem}/"}, "filename must name files below the output folder"),
    ],
)
def test_output_refuses(given, message):
    with pytest.raises(ValueError, match=message):
        Output(**given)


@pytest.mark.parametrize(
    ("given", "rate", "channels", "message"),
    [
        ({"format": "mp3"}, 96000, 2, "mp3 holds 1 or 2 channels at 8000, .* Hz, got 2 at 96000 Hz"),
        ({"format": "mp3"}, 44100, 3, "mp3 holds 1 or 2 channels at .*, got 3 at 44100 Hz"),
        (
            {"format": "mp3", "mp3_bitrate": 320},
            22050,
            2,
            "mp3_bitrate must be one of 8, .*, 160 kbit/s at 22050 Hz, got 320",
        ),
        ({"format": "flac"}, 44100, 9, "flac holds at most 8 channels and 655350 Hz, got 9 at 44100 Hz"),
    ],
)
def test_what_a_format_cannot_hold(tmp_path, given, rate, channels, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, {"a": noise(channels)}, Output(**given), rate=rate)
    assert list(tmp_path.iterdir()) == []
