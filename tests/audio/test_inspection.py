"""What headers and ends of files tell: their length, and whether anything is missing."""

import numpy as np
import pytest
import soundfile
from support.ffmpeg import ffmpeg

from mlx_xformer.audio.inspection import Measured, measure_file


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("x.wav", {"subtype": "PCM_16"}),
        ("x.wav", {"subtype": "FLOAT"}),
        ("x.wav", {"format": "RF64", "subtype": "PCM_24"}),
        ("x.flac", {}),
        ("x.mp3", {}),
        ("x.ogg", {}),
    ],
    ids=str,
)
def test_complete_and_cut_files(tmp_path, name, kind):
    """A file of any length below the whole is not complete, down to none at all."""
    path = tmp_path / name
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, (30011, 2)), 44100, **kind)
    whole = path.read_bytes()
    assert measure_file(path) == Measured(44100, 2, 30011)
    for size in (len(whole) - 1, len(whole) * 9 // 10, len(whole) // 2, 50, 25, 5, 0):
        path.write_bytes(whole[:size])
        found = measure_file(path)
        if found is not None and size == len(whole) - 1:  # padding of the last frame
            continue
        assert found is None or (name == "x.ogg" and found.samples < 30011), size


@pytest.mark.parametrize("name", ["x.m4a", "x.stem.mp4"])
@pytest.mark.parametrize("large", [False, True])
def test_complete_and_cut_mp4(tmp_path, name, large):
    """As ffmpeg writes it, with a box's size in 32 or 64 bits; a file that lacks a byte is not complete."""
    soundfile.write(tmp_path / "x.wav", np.random.default_rng(0).uniform(-0.5, 0.5, (30011, 2)), 44100)
    ffmpeg("-i", tmp_path / "x.wav", "-c:a", "aac", tmp_path / name)
    path, whole = tmp_path / name, (tmp_path / name).read_bytes()
    if large:  # ffmpeg leaves an empty box for a size of 64 bits
        at = whole.index(b"free") - 4
        size = int.from_bytes(whole[at + 8 : at + 12], "big")
        box = (1).to_bytes(4, "big") + b"mdat" + (size + 8).to_bytes(8, "big")
        whole = whole[:at] + box + whole[at + 16 :]
        path.write_bytes(whole)
    found = measure_file(path)
    assert found is not None and (found.sample_rate, found.channels) == (44100, 2) and abs(found.samples - 30011) < 1024
    for size in (len(whole) - 1, len(whole) - 400, len(whole) // 2, 30, 20, 0):
        path.write_bytes(whole[:size])
        assert measure_file(path) is None, size
    path.write_bytes(whole + b"more")
    assert measure_file(path) is None


def test_what_is_no_audio(tmp_path):
    (tmp_path / "x.wav").write_text("a letter")
    assert measure_file(tmp_path / "x.wav") is None
    assert measure_file(tmp_path / "gone.wav") is None
    assert measure_file(tmp_path) is None
