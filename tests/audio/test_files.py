"""Audio files, read back with other readers; quantisation, permissions, what is refused."""

import os
import stat
import wave

import mlx.core as mx
import numpy as np
import pytest
import soundfile

from mlx_xformer.audio import files, read


def noise(channels=2, samples=1000, seed=0, peak=0.9):
    x = np.random.default_rng(seed).uniform(-peak, peak, (channels, samples))
    return x.astype(np.float32)


@pytest.mark.parametrize("bits", [16, 24])
def test_integer_files(tmp_path, bits):
    """The standard library reads back what the formula says: truncated towards zero."""
    x = noise()
    x[0, :4] = [1.0, -1.0, 1.7, -1.7]
    files.write(tmp_path / "x.wav", x, 22050, bits=bits)
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
    files.write(tmp_path / "x.wav", x, 48000, bits=32)
    info = soundfile.info(tmp_path / "x.wav")
    assert (info.subtype, info.samplerate, info.channels, info.frames) == ("FLOAT", 48000, 2, 1000)
    back, rate = read(tmp_path / "x.wav")
    assert rate == 48000 and back.dtype == np.float32 and (back == x).all()


def test_write_refuses(tmp_path):
    for bits in (8, 17):
        with pytest.raises(ValueError, match=f"bits must be 16, 24 or 32, got {bits}"):
            files.write(tmp_path / "x.wav", noise(), 44100, bits=bits)
    with pytest.raises(ValueError, match=r"audio must be \(channels, samples\) .*, got \(2000, 2\)"):
        files.write(tmp_path / "x.wav", noise(samples=2000).T, 44100)
    assert list(tmp_path.iterdir()) == []
    files.write(tmp_path / "x.wav", mx.array(noise()), 44100, bits=32)
    assert (read(tmp_path / "x.wav")[0] == noise()).all()


def test_files_have_the_permissions_of_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        files.write(tmp_path / "a.wav", noise(), 44100)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.wav").stat().st_mode) == 0o640


def test_check_writable(tmp_path, monkeypatch):
    files.check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is not a directory"):
        files.check_writable(tmp_path / "file" / "b")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="no permission to write in"):
        files.check_writable(tmp_path / "a")
