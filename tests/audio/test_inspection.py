"""What headers and ends of files tell: their length, and whether anything is missing."""

import numpy as np
import pytest
import soundfile

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


def test_what_is_no_audio(tmp_path):
    (tmp_path / "x.wav").write_text("a letter")
    assert measure_file(tmp_path / "x.wav") is None
    assert measure_file(tmp_path / "gone.wav") is None
    assert measure_file(tmp_path) is None
