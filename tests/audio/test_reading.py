"""Recordings from standard input, parts of them, several sound streams, and files that hold something else."""

import io
import os

import numpy as np
import pytest
import soundfile
from support.ffmpeg import FLOATS, decode, differ, ffmpeg, read, song

from mlx_xformer.audio.frames import to_array
from mlx_xformer.audio.recording import Recording


def whole(recording):
    return np.concatenate(list(recording.blocks()), axis=1)


@pytest.mark.parametrize(("name", "arguments"), [("x.wav", []), ("x.m4a", ["-c:a", "aac"]), ("x.ogg", [])])
def test_standard_input(tmp_path, name, arguments):
    """It is read twice, and by two readers at once."""
    ffmpeg("-i", song(tmp_path), *arguments, tmp_path / name)
    recording = Recording.spool(io.BytesIO((tmp_path / name).read_bytes()))
    for one, other in zip(recording.blocks(), recording.blocks(), strict=True):
        assert (one == other).all()
    assert differ(whole(recording), decode(tmp_path / name)[0]) <= FLOATS
    with pytest.raises(ValueError, match=r"^standard input is empty$"):
        Recording.spool(io.BytesIO())
    with pytest.raises(ValueError, match=r"^standard input cannot be read as audio"):
        Recording.spool(io.BytesIO(b"no song" * 1000))


@pytest.mark.parametrize("name", ["x.wav", "x.mp3"])
@pytest.mark.parametrize(("start", "end"), [(0, 0.5), (0.3, 1.7), (1.6, None), (0.7, 60)])
def test_a_part_of_a_recording(tmp_path, name, start, end):
    ffmpeg("-i", song(tmp_path), tmp_path / name)
    recording = Recording.open(tmp_path / name)
    part = recording.cut(start, end)
    expected = whole(recording)[:, round(start * 44100) : None if end is None else round(end * 44100)]
    assert differ(whole(part), expected) == 0
    assert part.samples in (None, expected.shape[1])


def test_parts_that_are_not_there(tmp_path):
    recordings = []
    for name in ("x.wav", "x.mp3"):
        ffmpeg("-i", song(tmp_path), tmp_path / name)
        recordings.append(Recording.open(tmp_path / name))
    for start, end in ((-1, 2), (1, 1), (2, 1)):
        with pytest.raises(ValueError, match=f"start must be at least 0 and before end, got {start} and {end} s"):
            recordings[0].cut(start, end)
    with pytest.raises(ValueError, match=r"start must be before the end .*, got 3 s of 2\.1 s"):
        recordings[0].cut(3)
    with pytest.raises(ValueError, match=r"start must be before the end .*, got 3 s of 2\.1 s"):
        whole(recordings[1].cut(3))


def test_sound_streams_of_a_film(tmp_path):
    tracks = [song(tmp_path, seed=seed) for seed in (1, 2)]
    inputs = [argument for track in tracks for argument in ("-i", track)]
    ffmpeg(*inputs, "-map", "0:a", "-map", "1:a", "-c:a", "flac", tmp_path / "film.mkv")
    for stream in (0, 1):
        ours = whole(Recording.open(tmp_path / "film.mkv", stream=stream))
        assert differ(ours, decode(tmp_path / "film.mkv", stream=stream)[0]) == 0
    with pytest.raises(ValueError, match=r"stream must be below 2, the audio streams of .*film\.mkv, got 2"):
        Recording.open(tmp_path / "film.mkv", stream=2)


def test_dts_in_a_wav_file(tmp_path):
    """As on a DTS compact disc: what the header calls 16-bit samples is compressed."""
    ffmpeg("-i", song(tmp_path), "-c:a", "dca", "-strict", "-2", "-b:a", "1411k", tmp_path / "x.dts")
    data = np.frombuffer((tmp_path / "x.dts").read_bytes(), np.uint8)
    soundfile.write(tmp_path / "x.wav", data[: data.size // 4 * 4].view(np.int16).reshape(-1, 2), 44100)
    assert differ(read(tmp_path / "x.wav")[0], decode(tmp_path / "x.wav")[0]) <= FLOATS


def test_unsigned_samples():
    import av

    frame = av.AudioFrame.from_ndarray(np.array([[0, 128, 255, 64]], np.uint8), "u8", "stereo")
    frame.sample_rate = 8000
    assert to_array(frame).tolist() == [[-1.0, 127 / 128], [0.0, -0.5]]


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    with pytest.raises(ValueError, match=r'pipe\.wav is a pipe, .*; "-" reads standard input'):
        Recording.open(tmp_path / "pipe.wav")
    with pytest.raises(ValueError, match="/dev/null is not a regular file"):
        Recording.open("/dev/null")
    (tmp_path / "text.mp3").write_bytes(b"not a song\n" * 1000)
    with pytest.raises(ValueError, match=r"text\.mp3 cannot be read as audio: it is damaged, incomplete or"):
        Recording.open(tmp_path / "text.mp3")
