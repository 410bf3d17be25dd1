"""Encoded files, decoded by ffmpeg and by FFmpeg's libraries: lengths and places to the sample, bits, equal bytes."""

import struct
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from support.ffmpeg import decode

from mlx_xformer.audio import encode, read
from mlx_xformer.audio.encode import Encoding, encode_webm, open_encoder, quantize
from mlx_xformer.audio.sink import Sink


def tones(samples, rate, channels=2, seed=0):
    """Tones that every codec keeps."""
    rng, t = np.random.default_rng(seed), np.arange(samples) / rate
    tones = [np.sin(2 * np.pi * rng.uniform(0.01, 0.07) * rate * t + rng.uniform(0, 6)) for _ in range(5)]
    return 0.1 * np.stack([(1 - 0.3 * c) * np.sum(tones, axis=0) for c in range(channels)]).astype(np.float32)


def encoded(path, audio, rate, *, tags=None, cut=1000, **fields):
    """A file of two blocks."""
    with path.open("w+b") as file:
        sink = Sink(file, path.parent)
        encoder = open_encoder(sink, rate, len(audio), audio.shape[1], Encoding(**fields), tags)
        for block in np.split(audio, [cut], axis=1):
            encoder.write(block)
        encoder.close()
        assert sink.error is None
    return path


def length(path):
    """The samples that FFmpeg's libraries decode."""
    with av.open(str(path)) as container:
        return sum(frame.samples for frame in container.decode(audio=0))


def assert_in_place(audio, back):
    """`back` is `audio` with an error that lies 15 dB below it, and is nearer to it than if it were early or late."""
    middle = slice(len(audio[0]) // 4, -len(audio[0]) // 4)
    errors = {late: np.square(np.roll(back, -late, axis=1) - audio)[:, middle].sum() for late in (-1, 0, 1)}
    assert min(errors, key=errors.get) == 0 and errors[0] < 0.03 * np.square(audio[:, middle]).sum()


@pytest.mark.parametrize("samples", [22051, 44100])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    ("format", "rate"),
    [("flac", 44100), ("mp3", 44100), ("ogg", 44100), ("opus", 48000), ("m4a", 44100), ("ogg", 8000), ("m4a", 96000)],
)
def test_every_format_keeps_length_and_place(tmp_path, format, rate, channels, samples):
    """For ffmpeg, and for our own reader."""
    audio = tones(samples, rate, channels)
    path = encoded(tmp_path / f"x.{format}", audio, rate, format=format)
    for back, found in (decode(path), read(path)):
        assert found == rate and back.shape == audio.shape
        assert_in_place(audio, back)


@pytest.mark.parametrize("rate", [44100, 24000, 8000])
def test_mp3_is_exact_at_every_bit_rate(tmp_path, rate):
    """Also where LAME ends with a frame of padding alone: with less than 47 samples of padding before it."""
    frame = 1152 if rate >= 32000 else 576
    for number, kbps in enumerate(encode._MP3_RATES[rate]):
        for samples in (20 * frame - 1105 - number, 20 * frame - 1105 + 1, 4999 + number):
            path = encoded(tmp_path / "x.mp3", tones(samples, rate), rate, format="mp3", bitrate=kbps)
            assert length(path) == soundfile.info(path).frames == samples, (kbps, samples)


@pytest.mark.parametrize("kbps", [32, 40, 48, 320])
def test_mp3_begins_in_place_at_low_bit_rates(tmp_path, kbps):
    audio = tones(33333, 44100, 1)
    back, _ = decode(encoded(tmp_path / "x.mp3", audio, 44100, format="mp3", bitrate=kbps))
    assert back.shape == audio.shape
    assert_in_place(audio, back)


def test_the_check_of_the_mp3_tag(tmp_path):
    """The sum that LAME's tag ends with, by dividing polynomials of bits: lowest bit first, 1 + x^2 + x^15 + x^16."""
    data = encoded(tmp_path / "x.mp3", tones(20 * 1152 - 1110, 44100), 44100, format="mp3").read_bytes()
    at, start = data.index(b"Info"), data.index(b"\xff\xfb")
    remainder = int("".join(f"{byte:08b}"[::-1] for byte in data[start : at + 154]), 2) << 16
    while remainder.bit_length() > 16:
        remainder ^= 0x18005 << (remainder.bit_length() - 17)
    assert data[at + 154 : at + 156] == int(f"{remainder:016b}"[::-1], 2).to_bytes(2, "big")


@pytest.mark.parametrize("level", [0, 1], ids=["silence", "tones"])
@pytest.mark.parametrize("samples", [577, 5003, 100_003])
def test_short_and_silent_vorbis(tmp_path, samples, level):
    """FFmpeg reads 128 samples too few from a file whose sound stands in one page, so that it is split."""
    audio = level * tones(samples, 44100)
    path = encoded(tmp_path / "x.ogg", audio, 44100, format="ogg")
    assert length(path) == soundfile.info(path).frames == samples
    assert np.abs(decode(path)[0] - audio).max() < 0.02


def test_pages_of_vorbis(tmp_path):
    """Each page has the sum that the specification defines, its number, and the stream's number."""
    data = encoded(tmp_path / "x.ogg", tones(50_000, 44100), 44100, format="ogg").read_bytes()
    pages = 0
    while data:
        magic, _, flags, _, stream, number, check, count = struct.unpack_from("<4sBBqIIIB", data)
        end = 27 + count + sum(data[27 : 27 + count])
        page, data = bytearray(data[:end]), data[end:]
        page[22:26] = bytes(4)
        value = 0
        for byte in page:
            value ^= byte << 24
            for _ in range(8):
                value = (value << 1 ^ (0x04C11DB7 if value >> 31 else 0)) & 0xFFFFFFFF
        assert (magic, stream, number, check) == (b"OggS", 1, pages, value)
        assert bool(flags & 2) == (number == 0) and bool(flags & 4) == (not data)
        pages += 1
    assert pages > 3


@pytest.mark.parametrize(("bits", "dtype", "unit"), [(16, "int16", 1), (24, "int32", 256)])
@pytest.mark.parametrize("channels", [1, 2, 3, 8])
def test_flac_is_exact(tmp_path, bits, dtype, unit, channels):
    """Every bit and channel, read by libsndfile, and the sum of all samples in the header."""
    audio = np.random.default_rng(0).uniform(-1.1, 1.1, (channels, 70_001)).astype(np.float32)
    path = encoded(tmp_path / "x.flac", audio, 192_000, format="flac", bits=bits)
    back, rate = soundfile.read(path, dtype=dtype, always_2d=True)
    assert rate == 192_000 and (quantize(audio, bits) == back.T).all()
    assert path.read_bytes()[26:42] != bytes(16)  # the MD5 sum, which decoders verify


@pytest.mark.parametrize("format", encode.FORMATS)
def test_equal_audio_makes_equal_files(tmp_path, format):
    audio = tones(30_000, 48000)
    files = [encoded(tmp_path / f"{n}", audio, 48000, format=format, cut=1000).read_bytes() for n in range(2)]
    assert files[0] == files[1]
    for secret in (b"Lavf6", b"Lavc6", b"libsndfile"):  # versions of libraries
        assert secret not in files[0]


@pytest.mark.parametrize("format", encode.FORMATS)
def test_empty_blocks(tmp_path, format):
    """Resamplers give out blocks without samples."""
    audio = tones(5003, 48000)
    path = encoded(tmp_path / "x", audio, 48000, format=format, cut=5003)
    assert decode(path)[0].shape == audio.shape


@pytest.mark.parametrize("channels", [1, 2])
def test_encode_webm(tmp_path, channels):
    audio = tones(20_000, 48000, channels)
    (tmp_path / "a.webm").write_bytes(encode_webm(audio, 64 * channels))
    found, rate = decode(tmp_path / "a.webm")
    assert rate == 48000 and found.shape == audio.shape
    assert_in_place(audio, found)
    assert encode_webm(audio, 64 * channels) == (tmp_path / "a.webm").read_bytes()
    with av.open(tmp_path / "a.webm") as container:
        assert next(container.demux(audio=0)).pts == 0  # an earlier time would be one that browsers cut off


def test_bit_rates_are_kept(tmp_path):
    """About, for the codecs whose rate varies with the sound."""
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, (2, 200_000)).astype(np.float32)
    for format, rate in (("ogg", 44100), ("opus", 48000), ("m4a", 44100)):
        sizes = [
            encoded(tmp_path / "x", noise, rate, format=format, bitrate=kbps).stat().st_size for kbps in (96, 192, 384)
        ]
        kbps = [8 * size / 1000 / (200_000 / rate) for size in sizes]
        assert kbps == pytest.approx([96, 192, 384], rel=0.35), (format, kbps)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "wav", "bitrate": 128}, "bitrate is of lossy formats, got 128 for wav"),
        ({"format": "mp3", "bitrate": 100}, "bitrate must be one of 8, 16, .*, 320 kbit/s, got 100"),
        ({"format": "mp3", "bitrate": 128, "mp3_bitrate": 64}, "bitrate and mp3_bitrate must agree, got 128 and 64"),
    ],
)
def test_encodings_that_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Encoding(**fields)


@pytest.mark.parametrize(
    ("fields", "rate", "channels", "message"),
    [
        ({"format": "ogg"}, 44100, 3, "ogg holds 1 or 2 channels, got 3 at 44100 Hz"),
        ({"format": "opus"}, 44100, 2, "opus holds 1 or 2 channels at 48000 Hz, got 2 at 44100 Hz"),
        ({"format": "m4a"}, 192000, 2, "m4a holds 1 or 2 channels at 7350, .* Hz, got 2 at 192000 Hz"),
        ({"format": "m4a", "bitrate": 200}, 8000, 2, "bitrate must be from 16 to 96 kbit/s at 8000 Hz, got 200"),
        ({"format": "opus", "bitrate": 5}, 48000, 1, "bitrate must be from 6 to 256 kbit/s at 48000 Hz, got 5"),
        ({"format": "ogg", "bitrate": 501}, 48000, 2, "bitrate must be from 64 to 500 kbit/s at 48000 Hz, got 501"),
        ({"format": "flac"}, 96001, 2, "flac holds rates above 65535 Hz in steps of 10 Hz, got 2 at 96001 Hz"),
    ],
)
def test_what_a_format_cannot_hold(fields, rate, channels, message):
    with pytest.raises(ValueError, match=message):
        Encoding(**fields).check(rate, channels)


def test_an_installation_without_an_encoder(monkeypatch, tmp_path):
    monkeypatch.setitem(encode._CODECS, "mp3", "libnothing")
    with (tmp_path / "x").open("w+b") as file, pytest.raises(ValueError, match="built without the encoder libnothing"):
        open_encoder(Sink(file, Path(tmp_path)), 44100, 2, 10, Encoding("mp3"))
