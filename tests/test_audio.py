"""Audio files, read back with another reader; levels, quantisation, faults."""

import os
import stat
import wave

import mlx.core as mx
import numpy as np
import pytest
import soundfile

from mlx_xformer import audio


def noise(channels=2, samples=1000, seed=0, peak=0.9):
    x = np.random.default_rng(seed).uniform(-peak, peak, (channels, samples))
    return x.astype(np.float32)


@pytest.mark.parametrize("bits", [16, 24])
def test_integer_files(tmp_path, bits):
    """The standard library reads back what the formula says: truncated towards zero."""
    x = noise()
    x[0, :4] = [1.0, -1.0, 1.7, -1.7]
    audio.write(tmp_path / "x.wav", x, 22050, bits=bits)
    with wave.open(str(tmp_path / "x.wav")) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (2, 22050, 1000)
        assert file.getsampwidth() == bits // 8
        raw = np.frombuffer(file.readframes(1000), np.uint8).reshape(-1, bits // 8)
    padded = np.concatenate([np.zeros((len(raw), 4 - bits // 8), np.uint8), raw], axis=1)
    samples = (padded.reshape(-1).view("<i4") >> (32 - bits)).reshape(-1, 2).T
    full = np.float32(2 ** (bits - 1) - 1)
    assert (samples == np.trunc(np.clip(x, -1, 1) * full).astype(int)).all()


def test_float_files_keep_every_bit(tmp_path):
    x = noise(peak=3)
    audio.write(tmp_path / "x.wav", x, 48000, bits=32)
    info = soundfile.info(tmp_path / "x.wav")
    assert (info.subtype, info.samplerate, info.channels, info.frames) == ("FLOAT", 48000, 2, 1000)
    back, rate = audio.read(tmp_path / "x.wav")
    assert rate == 48000 and back.dtype == np.float32 and (back == x).all()


def test_clipping():
    x = noise(peak=2)
    peak = np.abs(x).max()
    assert np.allclose(audio.prevent_clipping(x, "rescale"), x / (1.01 * peak), rtol=1e-6)
    quiet = x / 10
    assert (audio.prevent_clipping(quiet, "rescale") == quiet).all()
    assert (audio.prevent_clipping(x, "clamp") == np.clip(x, -0.99, 0.99)).all()
    assert audio.prevent_clipping(x, "none") is x
    with pytest.raises(ValueError, match='clip must be "rescale", "clamp" or "none", got \'tanh\''):
        audio.prevent_clipping(x, "tanh")


def test_channels():
    x = noise(4)
    assert audio.convert_channels(x, 4) is x
    assert (audio.convert_channels(x, 2) == x[:2]).all()
    assert np.allclose(audio.convert_channels(x, 1), x.mean(0, keepdims=True))
    assert (audio.convert_channels(x[:1], 3) == np.concatenate([x[:1]] * 3)).all()
    with pytest.raises(ValueError, match="audio must be mono or have at least 3 channels, got 2"):
        audio.convert_channels(x[:2], 3)


def test_resampling_keeps_a_tone():
    t48, t44 = np.arange(48000) / 48000, np.arange(44100) / 44100
    tone = np.sin(2 * np.pi * 997 * t48)[None].astype(np.float32)
    out = audio.resample(tone, 48000, 44100)
    assert out.shape == (1, 44100)
    assert np.abs(out[0, 2000:-2000] - np.sin(2 * np.pi * 997 * t44)[2000:-2000]).max() < 1e-4
    assert audio.resample(tone, 48000, 48000) is tone
    for rate in (0, -1, 10**9, 44100.5, float("nan"), "44100"):
        with pytest.raises(ValueError, match=r"to_rate must be a whole number of Hz from 1 to 10000000, got "):
            audio.resample(tone, 48000, rate)


def test_reading_what_is_not_audio(tmp_path):
    cases = {
        "text.wav": (b"this is no audio\n" * 50, "cannot be read as audio"),
        "empty.wav": (b"", "cannot be read as audio"),
        "no_name": (b"text", "cannot be read as audio"),
        "data.raw": (b"1234" * 10, "cannot be read as audio"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} {message}"):
            audio.read(tmp_path / name)
    soundfile.write(tmp_path / "none.wav", np.zeros((0, 2)), 44100)
    with pytest.raises(ValueError, match="holds no samples"):
        audio.read(tmp_path / "none.wav")
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan]), 44100, subtype="FLOAT")
    with pytest.raises(ValueError, match="holds NaN or infinite samples"):
        audio.read(tmp_path / "nan.wav")
    with pytest.raises(FileNotFoundError, match=r"gone\.wav does not exist"):
        audio.read(tmp_path / "gone.wav")
    with pytest.raises(IsADirectoryError, match="is a directory, not an audio file"):
        audio.read(tmp_path)


def test_length_that_the_header_does_not_tell(tmp_path):
    """As a FLAC file written to a pipe: the 36 bits of the total are 0."""
    x = noise(samples=5000)
    soundfile.write(tmp_path / "x.flac", x.T, 44100)
    raw = bytearray((tmp_path / "x.flac").read_bytes())
    raw[21] &= 0xF0
    raw[22:26] = bytes(4)
    (tmp_path / "piped.flac").write_bytes(raw)
    with pytest.raises(ValueError, match=r"header does not tell its length \(convert it first, with ffmpeg"):
        audio.read(tmp_path / "piped.flac")


def test_a_format_that_is_not_read_says_how_to_convert(tmp_path):
    (tmp_path / "x.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(100))
    with pytest.raises(ValueError, match=r"convert it first, with ffmpeg -i IN OUT\.wav"):
        audio.read(tmp_path / "x.m4a")


def test_write_refuses(tmp_path):
    for bits in (8, 17):
        with pytest.raises(ValueError, match=f"bits must be 16, 24 or 32, got {bits}"):
            audio.write(tmp_path / "x.wav", noise(), 44100, bits=bits)
    with pytest.raises(ValueError, match=r"audio must be \(channels, samples\) .*, got \(2000, 2\)"):
        audio.write(tmp_path / "x.wav", noise(samples=2000).T, 44100)
    assert list(tmp_path.iterdir()) == []
    audio.write(tmp_path / "x.wav", mx.array(noise()), 44100, bits=32)
    assert (audio.read(tmp_path / "x.wav")[0] == noise()).all()


def test_files_are_whole_or_not_there(tmp_path, monkeypatch):
    """The second file fails: neither it, nor the first, nor a temporary file, nor a folder is left."""
    out = tmp_path / "new" / "deep"
    (tmp_path / "old").mkdir()
    real, calls = soundfile.write, []

    def failing(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise soundfile.LibsndfileError(2)
        return real(*args, **options)

    monkeypatch.setattr(soundfile, "write", failing)
    with pytest.raises(OSError, match=r"could not write .*b\.wav"):
        audio.write_all({out / "a.wav": noise(), out / "b.wav": noise()}, 44100)
    assert len(calls) == 2 and sorted(p.name for p in tmp_path.rglob("*")) == ["old"]


def test_an_older_file_survives_a_failure(tmp_path, monkeypatch):
    audio.write(tmp_path / "a.wav", noise(seed=1), 44100)
    before = (tmp_path / "a.wav").read_bytes()

    def failing(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(soundfile, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        audio.write(tmp_path / "a.wav", noise(seed=2), 44100)
    assert [p.name for p in tmp_path.iterdir()] == ["a.wav"] and (tmp_path / "a.wav").read_bytes() == before


def test_files_have_the_permissions_of_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        audio.write(tmp_path / "a.wav", noise(), 44100)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.wav").stat().st_mode) == 0o640


def test_check_writable(tmp_path, monkeypatch):
    audio.check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is not a directory"):
        audio.check_writable(tmp_path / "file" / "b")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="no permission to write in"):
        audio.check_writable(tmp_path / "a")
