"""Audio files, read back with other readers; quantisation, permissions, what is refused."""

import errno
import gc
import os
import stat
import tempfile
import wave
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import soundfile

from mlx_xformer.audio import encode, files, read
from mlx_xformer.audio.sink import Sink


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


def test_names_of_any_length(tmp_path):
    """255 bytes is the most that a name may have: the temporary name is shorter."""
    path = tmp_path / ("曲" * 83 + "é.wav")
    assert len(os.fsencode(path.name)) == 255
    files.write(path, noise(), 44100)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(OSError, match="name too long"):
        files.write(tmp_path / ("曲" * 84 + "é.wav"), noise(), 44100)
    assert len(list(tmp_path.iterdir())) == 1


def test_names_that_are_not_utf_8(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.wav"))
    files.write(path, noise(), 44100)
    assert os.listdir(os.fsencode(tmp_path)) == [b"caf\xe9.wav"]


def test_a_file_system_without_permissions(tmp_path, monkeypatch):
    """It refuses chmod: the file is there all the same. A rename that is refused is an error, and leaves nothing."""

    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refuse)
    files.write(tmp_path / "a.wav", noise(), 44100)
    assert soundfile.info(tmp_path / "a.wav").frames == 1000
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError, match=r"b\.wav"):
        files.write(tmp_path / "b.wav", noise(), 44100)
    assert [p.name for p in tmp_path.iterdir()] == ["a.wav"]


def test_a_new_file_that_was_taken_for_a_leftover(tmp_path, monkeypatch):
    """Another process removes it before it is locked: another is made."""
    real, made = tempfile.mkstemp, []

    def make(**options):
        handle, name = real(**options)
        made.append(name)
        if len(made) < 3:
            os.unlink(name)
        return handle, name

    monkeypatch.setattr(tempfile, "mkstemp", make)
    files.write(tmp_path / "a.wav", noise(), 44100)
    assert len(made) == 3 and [p.name for p in tmp_path.iterdir()] == ["a.wav"]


class Full:
    """A file on a disk that is full."""

    closed = False

    def seek(self, *_):
        return 0

    tell = seek

    def read(self, size):
        return b""

    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("format", encode.FORMATS)
def test_the_first_error_of_a_file_is_kept(tmp_path, format, capfd):
    """No library prints or loses it, nor writes after it; the file is not what fails next."""
    sink = Sink(Full(), tmp_path)
    with suppress(*encode.get_library_errors()):
        encoder = encode.open_encoder(sink, 48000, 2, 200_000, encode.Encoding(format))
        for _ in range(3):
            encoder.write(noise(samples=60_000))
        encoder.close()
    assert sink.error.errno == errno.ENOSPC
    with suppress(NameError):
        del encoder
    gc.collect()
    assert capfd.readouterr() == ("", "")
