"""Files of HTDemucs as PyTorch writes them: each converts, and separates as the original does with its weights."""

import mlx.core as mx
import numpy as np
import pytest
from support.harness import stem_snr_db
from support.models import options
from support.oracle import Oracle

from mlx_xformer.converters.conversion import convert
from mlx_xformer.models.families import load_model

pytestmark = pytest.mark.torch

KWARGS = options("base") | {"nfft": 256, "depth": 2, "t_layers": 2, "t_heads": 2, "bottom_channels": 8}
KWARGS |= {"channels": 8, "audio_channels": 2, "segment": {"_type": "fraction", "numerator": 3, "denominator": 4}}
SETTINGS = {name: KWARGS[name] for name in ("sources", "samplerate", "t_heads")} | {"segment": "3/4"}
WITHOUT_CONFIG = {"checkpoint.th", "state.ckpt", "lightning.ckpt", "parallel.pth", "legacy_state.pth"}
FILES = [
    *("half.th", "bfloat16.pt", "double.pth", "strided.th", "parameters.th", "legacy.th", "positional.th", "numpy.th"),
    *("protocol2.th", "protocol4.th", "protocol5.th", "unknown.th", "whole.pth", "whole_parallel.pt"),
    *sorted(WITHOUT_CONFIG),
]


@pytest.fixture(scope="module")
def oracle():
    with Oracle() as child:
        yield child


@pytest.fixture(scope="module")
def written(oracle, tmp_path_factory):
    """The folder, and the original's answers."""
    folder = tmp_path_factory.mktemp("checkpoints")
    answer = oracle.call("write_checkpoints", kwargs=KWARGS, seed=3, folder=f"{folder}")
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    return folder, answer


@pytest.mark.parametrize("name", FILES)
def test_each_file_separates_as_the_original(written, tmp_path, name):
    folder, answer = written
    convert(folder / name, tmp_path / "mlx", settings=SETTINGS if name in WITHOUT_CONFIG else None)
    out = np.array(load_model(tmp_path / "mlx")(mx.array(answer["mix"])))[0]
    assert min(stem_snr_db(answer.groups["out"][name], out)) >= 90


@pytest.mark.parametrize("name", ["half.th", "bfloat16.pt", "state.ckpt"])
@pytest.mark.parametrize("by", ["bag", "signature"])
def test_demucs_loads_what_we_write(oracle, written, tmp_path, name, by):
    """`demucs --repo back -n NAME`, by the name of the bag and by the signature."""
    folder, answer = written
    convert(folder / name, tmp_path / "mlx", settings=SETTINGS if name in WITHOUT_CONFIG else None)
    convert(tmp_path / "mlx", tmp_path / "back", to="pytorch")
    stem = name.partition(".")[0]
    given = {"folder": f"{tmp_path / 'back'}", "name": "mlx" if by == "bag" else stem}
    theirs = oracle.call("read_repository", {"mix": answer["mix"]}, **given)
    (file,) = (tmp_path / "back").glob("*.th")
    assert file.name == f"{stem}-{theirs.values['sha256'][file.name][:8]}.th"
    assert theirs.values["sources"] == KWARGS["sources"]
    assert np.array_equal(theirs["out"], answer.groups["out"][name])  # the same weights in the same program
