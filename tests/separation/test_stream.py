"""Stems that are given out while the rest of the song is still being separated."""

import threading

import numpy as np
import pytest
import soundfile
from support.audio import TINY_RATE as RATE
from support.audio import write_noise
from support.models import FAST, STEMS, bag_checkpoint, checkpoint

from mlx_xformer.audio.recording import Recording
from mlx_xformer.separation.run import Cancelled
from mlx_xformer.separation.separator import Separator
from mlx_xformer.separation.stems import Output


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    weights = ((1.0, 0.5, 1.0), (0.0, 1.0, 1.0))
    return {"one": checkpoint(folder / "one", segment="1/8", **FAST), "bag": bag_checkpoint(folder / "bag", weights)}


@pytest.fixture(scope="module")
def song(tmp_path_factory):
    return write_noise(tmp_path_factory.mktemp("songs") / "song.wav", 40_003, 2 * RATE)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("one", {"shifts": 2, "batch_size": 3}),
        ("one", {"shifts": 0, "two_stems": "voice", "other_method": "minus"}),
        ("bag", {"shifts": 1, "stems": ["rest", "drums"], "batch_size": 1}),
    ],
)
def test_stretches_are_the_samples_of_the_files(models, song, tmp_path, name, given):
    separator = Separator(models[name], **given)
    made = separator.separate_file(song, tmp_path, Output(bits=32, clip="none"))
    stretches = list(separator.stream(song))
    assert len(stretches) > 3
    for stretch in stretches:
        assert list(stretch) == list(made.files) and len({x.shape for x in stretch.values()}) == 1
        assert all(x.dtype == np.float32 and x.shape[0] == 2 and x.shape[1] > 0 for x in stretch.values())
    for stem, path in made.files.items():
        whole = np.concatenate([stretch[stem] for stretch in stretches], axis=1)
        assert (whole == soundfile.read(path, dtype="float32")[0].T).all()


def test_the_first_stretch_comes_after_the_first_segments(models, song):
    """And the next segments are computed when the next stretch is asked for."""
    seen = []
    stream = Separator(models["one"], shifts=0, batch_size=1).stream(Recording.open(song), progress=seen.append)
    assert seen == []
    first = next(stream)
    assert seen[-1].done <= 2 and seen[-1].total > 20 and first["voice"].shape[1] <= RATE // 8
    done = [seen[-1].done]
    for _ in range(5):
        next(stream)
        done.append(seen[-1].done)
    assert done == list(range(done[0], done[0] + 6))


def test_errors_and_cancelling(models, song, tmp_path):
    separator = Separator(models["one"], shifts=0)
    with pytest.raises(FileNotFoundError, match=r"gone\.wav does not exist"):
        separator.stream(tmp_path / "gone.wav")
    cancel = threading.Event()
    stream = separator.stream(song, cancel=cancel)
    next(stream)
    cancel.set()
    with pytest.raises(Cancelled):
        list(stream)
    assert list(next(separator.stream(song))) == list(STEMS)
