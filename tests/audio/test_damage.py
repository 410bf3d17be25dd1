"""Recordings that are damaged, cut short, joined or that change on their way: read as ffmpeg reads them, and told."""

import struct

import numpy as np
import pytest
import soundfile
from support.ffmpeg import FLOATS, decode, differ, ffmpeg, read, song

from mlx_xformer.audio import recording as audio


def encode(folder, name, *arguments, **kind):
    """The bytes of a song in a format."""
    ffmpeg("-i", song(folder, **kind), *arguments, folder / f"made_{name}")
    return (folder / f"made_{name}").read_bytes()


def keep(folder, name, data):
    """Writes bytes into a new file."""
    (folder / name).write_bytes(data)
    return folder / name


def at_half(data, junk):
    """The bytes with others put into their middle."""
    half = len(data) // 2
    return data[:half] + junk + data[half:]


RAW_MP3 = ("-b:a", "192k", "-write_xing", "0", "-id3v2_version", "0")


@pytest.mark.parametrize("junk", [300, 5000, 70_000])
def test_junk_between_the_frames_of_an_mp3(tmp_path, junk):
    path = keep(tmp_path, "junk.mp3", at_half(encode(tmp_path, "x.mp3", *RAW_MP3), bytes(junk)))
    ours, _, _ = read(path)
    assert differ(ours, decode(path)[0]) <= FLOATS


def test_joined_mp3s(tmp_path):
    parts = [encode(tmp_path, f"{seed}.mp3", "-b:a", "192k", seed=seed) for seed in (1, 2)]
    path = keep(tmp_path, "joined.mp3", b"".join(parts))
    ours, rate, _ = read(path)
    assert ours.shape[1] > 4.2 * rate
    assert differ(ours, decode(path)[0]) <= FLOATS


CHANGES = [  # the two parts of a file: their kinds, and how they are encoded
    ("mono_stereo.mp3", {"channels": 1}, {}, RAW_MP3),
    ("stereo_mono.mp3", {}, {"channels": 1}, RAW_MP3),
    ("44_48.mp3", {}, {"rate": 48000}, RAW_MP3),
    ("mono_stereo.aac", {"channels": 1}, {}, ()),
    ("44_48.aac", {}, {"rate": 48000}, ()),
    ("48_22.aac", {"rate": 48000}, {"rate": 22050}, ()),
    ("stereo_surround.ac3", {"rate": 48000}, {"channels": 6, "rate": 48000}, ()),
]


@pytest.mark.parametrize(("name", "first", "second", "arguments"), CHANGES, ids=[row[0] for row in CHANGES])
def test_files_that_change_on_their_way(tmp_path, name, first, second, arguments):
    """All comes in the first part's rate and channels. ffmpeg loses what its resampler holds where a part ends."""
    suffix = name.rsplit(".", 1)[1]
    parts = [encode(tmp_path, f"{k}.{suffix}", *arguments, **kind) for k, kind in enumerate((first, second))]
    path = keep(tmp_path, name, b"".join(parts))
    ours, rate, _ = read(path)
    theirs, their_rate = decode(path)
    assert rate == their_rate == first.get("rate", 44100)
    assert ours.shape[0] == theirs.shape[0] == first.get("channels", 2)
    assert ours.shape[1] > 4.1 * rate
    assert abs(ours.shape[1] - theirs.shape[1]) <= 64
    n = min(ours.shape[1], theirs.shape[1])
    half = slice(2 * rate, n)
    if first.get("rate") == second.get("rate"):
        assert np.abs(ours[:, :n] - theirs[:, :n]).max() <= 4 * FLOATS
    assert np.corrcoef(ours[0, half], theirs[0, half])[0, 1] > 0.999


@pytest.mark.parametrize(("first", "second"), [({}, {}), ({}, {"rate": 48000}), ({"channels": 1}, {})])
@pytest.mark.parametrize("codec", ["libvorbis", "flac"])
def test_chained_ogg(tmp_path, codec, first, second):
    """The parts are read one after the other; FFmpeg stops at one that differs from the first."""
    parts = [encode(tmp_path, f"{k}.ogg", "-c:a", codec, **kind) for k, kind in enumerate((first, second))]
    wholes = [decode(tmp_path / f"made_{k}.ogg", channels=first.get("channels"))[0] for k in range(2)]
    ours, rate, warnings = read(keep(tmp_path, "chain.ogg", b"".join(parts)))
    length = wholes[0].shape[1]
    assert rate == 44100 and warnings == []
    assert differ(ours[:, :length], wholes[0]) <= FLOATS
    if "rate" not in second:
        assert differ(ours[:, length:], wholes[1]) <= FLOATS
    assert abs(ours.shape[1] - length - round(2.1 * rate)) <= 2


def test_a_part_of_a_chained_ogg_that_cannot_be_read(tmp_path):
    """One wrong bit makes a page look like the first one of another part."""
    data = bytearray(encode(tmp_path, "x.ogg", "-c:a", "libvorbis", seconds=6))
    pages = [at for at in range(len(data)) if data[at : at + 5] == b"OggS\0"]
    data[pages[-2] + 5] |= 2
    ours, rate, warnings = read(keep(tmp_path, "y.ogg", data))
    assert 2 * rate < ours.shape[1] < 6 * rate
    assert any("a part of the file, after 0:0" in line for line in warnings), warnings


DAMAGED = {  # the arguments, and whether the decoder notices
    "x.m4a": (["-c:a", "aac"], True),
    "x.aac": ([], True),
    "x.wma": (["-c:a", "wmav2"], True),
    "x.mkv": (["-c:a", "flac"], True),
    "x.ogg": (["-c:a", "libvorbis"], True),
    "alac.m4a": (["-c:a", "alac"], False),
    "x.mp3": (["-b:a", "128k"], False),
    "x.ac3": ([], False),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_one_damaged_packet(tmp_path, name):
    """The rest is read as ffmpeg reads it, and a line says what is lost where the decoder notices it."""
    arguments, noticed = DAMAGED[name]
    data = bytearray(encode(tmp_path, name, *arguments))
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    path = keep(tmp_path, name, data)
    ours, _, warnings = read(path)
    assert differ(ours, decode(path)[0]) <= FLOATS
    assert len(warnings) == noticed
    if noticed:
        assert "sound are lost" in warnings[0]
        with pytest.raises(ValueError, match=f"{name}: .*sound are lost"):
            audio.read(path, strict=True)
        with pytest.warns(UserWarning, match=f"{name}: .*sound are lost"):
            assert differ(audio.read(path)[0], ours) == 0


@pytest.mark.parametrize("name", ["x.m4a", "x.flac", "x.wav", "x.mp3", "x.mkv"])
def test_a_download_cut_short(tmp_path, name):
    arguments = {"x.m4a": ["-c:a", "aac", "-movflags", "+faststart"], "x.mkv": ["-c:a", "aac"]}.get(name, [])
    data = encode(tmp_path, name, *arguments)
    path = keep(tmp_path, name, data[: len(data) * 2 // 3])
    ours, rate, warnings = read(path)
    theirs, _ = decode(path)
    assert 0.5 * 2.1 * rate < ours.shape[1] < 0.9 * 2.1 * rate
    assert abs(ours.shape[1] - theirs.shape[1]) <= 4608
    assert any("the file ends at 0:01." in line and "promises 0:02.1" in line for line in warnings), warnings


def test_one_wrong_byte_in_flac(tmp_path):
    data = bytearray(encode(tmp_path, "x.flac"))
    whole, _, _ = read(keep(tmp_path, "whole.flac", data))
    data[len(data) * 9 // 10] ^= 255
    path = keep(tmp_path, "byte.flac", data)
    ours, rate, warnings = read(path)
    theirs, _ = decode(path)
    assert differ(ours, theirs) == 0
    assert (ours[:, :70_000] == whole[:, :70_000]).all()
    assert len(warnings) == 1 and ("lost" in warnings[0] or "damaged between 0:01." in warnings[0])


@pytest.mark.parametrize("counted", [1, 40_000, 92_600])
def test_flac_that_counts_too_few_samples(tmp_path, counted):
    data = bytearray(encode(tmp_path, "x.flac"))
    whole, _, _ = read(keep(tmp_path, "whole.flac", data))
    data[21] &= 0xF0
    data[22:26] = struct.pack(">I", counted)
    ours, _, warnings = read(keep(tmp_path, "few.flac", data))
    assert differ(ours, whole) == 0
    assert warnings == [f"its header counts {counted} samples of {whole.shape[1]}: read to the end of the file"]


def wave(channels, samples, told, *, junk=b"", order="<", bits=16):
    """The header and samples of a WAV file whose header tells any size of the samples."""
    name = b"RIFF" if order == "<" else b"RIFX"
    size = bits // 8
    described = struct.pack(f"{order}HHIIHH", 1, channels, 44100, 44100 * channels * size, channels * size, bits)
    chunks = b"fmt " + struct.pack(f"{order}I", 16) + described + junk + b"data" + struct.pack(f"{order}I", told)
    data = samples.astype(f"{order}i{size}").tobytes()
    return name + struct.pack(f"{order}I", 36) + b"WAVE" + chunks + data


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("told", [0, 2**32 - 1])
def test_wav_of_a_recorder_that_stopped(tmp_path, told, order):
    x = np.random.default_rng(0).integers(-30000, 30000, (30_011, 2))
    junk = b"FLLR" + struct.pack(f"{order}I", 400) + bytes(400)
    path = keep(tmp_path, "x.wav", wave(2, x, told, junk=junk, order=order))
    ours, _, warnings = read(path)
    assert differ(ours, (x.T / 2**15).astype(np.float32)) == 0
    assert warnings == ["its header has no length: read to the end of the file"]


def test_wav_that_promises_more(tmp_path):
    x = np.random.default_rng(0).integers(-30000, 30000, (44_100, 2))
    ours, _, warnings = read(keep(tmp_path, "x.wav", wave(2, x, 20 * 4 * 44100)))
    assert ours.shape == (2, 44_100)
    assert warnings == ["the file ends at 0:01.0, where its header promises 0:20.0"]


def test_wav_of_more_than_4_gib(tmp_path):
    """A header of 32 bits has lost the upper ones. The file is sparse: it takes no space."""
    x = np.random.default_rng(0).integers(-30000, 30000, (1000, 2))
    samples = (2**32 + 8_000) // 4
    head = wave(2, x, 8_000)
    path = keep(tmp_path, "x.wav", head)
    with path.open("r+b") as file:
        file.truncate(len(head) - 4000 + 4 * samples)
    recording = audio.Recording.open(path)
    assert recording.samples == samples
    part = recording.cut(0, 1000 / 44100)
    assert differ(np.concatenate(list(part.blocks()), axis=1), (x.T / 2**15).astype(np.float32)) == 0


def test_the_padding_of_an_m4a_is_cut(tmp_path):
    """AAC comes in packets of 1024 samples; the last one's duration tells where the song ends."""
    path = song(tmp_path)
    ffmpeg("-i", path, "-c:a", "aac", tmp_path / "x.m4a")
    assert read(tmp_path / "x.m4a")[0].shape[1] == soundfile.info(path).frames
    # In fragments there is no edit list: the encoder's 1024 samples stay in front, as in ffmpeg.
    ffmpeg("-i", path, "-c:a", "aac", "-movflags", "frag_keyframe+empty_moov", tmp_path / "y.m4a")
    ours, _, warnings = read(tmp_path / "y.m4a")
    assert (ours.shape[1], warnings) == (soundfile.info(path).frames + 1024, [])
    assert differ(ours, decode(tmp_path / "y.m4a")[0][:, : ours.shape[1]]) <= FLOATS


SURROUND = {
    "x.flac": [],
    "x.wav": ["-c:a", "pcm_s16le"],
    "x.ac3": [],
    "x.opus": ["-mapping_family", "1"],
    "x.m4a": ["-c:a", "aac"],
    "x.ogg": ["-c:a", "libvorbis"],
}


@pytest.mark.parametrize("name", SURROUND)
def test_surround_becomes_stereo_with_its_centre(tmp_path, name):
    """By ITU-R BS.775: L + 0.71 C + 0.71 Ls, as `ffmpeg -ac 2`."""
    ffmpeg("-i", song(tmp_path, 6, 48000), *SURROUND[name], tmp_path / name)
    recording = audio.Recording.open(tmp_path / name)
    ours = np.concatenate(list(recording.convert_blocks(2, recording.sample_rate)), axis=1)
    theirs, _ = decode(tmp_path / name, channels=2)
    assert differ(ours, theirs) <= 4 * FLOATS
    whole, _ = decode(tmp_path / name)
    centre, sides = (0.5946, 0.5) if name == "x.ac3" else np.sqrt([0.5, 0.5])  # AC-3 has levels of its own
    assert differ(ours, whole[:2] + np.float32(centre) * whole[2] + np.float32(sides) * whole[4:]) <= 1e-4
    front = audio.Recording.open(tmp_path / name, downmix="front")
    assert differ(np.concatenate(list(front.convert_blocks(2, 48000)), axis=1), whole[:2]) <= FLOATS
