"""What PyTorch and demucs 4.1.0 made of small models, and of the shipped one: no PyTorch needed."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.harness import pytorch_layout, snr_db, stem_snr_db, tap

from mlx_xformer.audio import recording
from mlx_xformer.converters.families.htdemucs import config as read_config
from mlx_xformer.converters.families.htdemucs import rules
from mlx_xformer.converters.rules import apply_rules
from mlx_xformer.models.htdemucs import Bag, BagConfig, HTDemucs
from mlx_xformer.pretrained.loading import load
from mlx_xformer.separation.separator import separate

HERE = Path(__file__).parents[1]
sys.path.insert(0, str(HERE / "oracle"))
from samples import music, read_packed, thin  # noqa: E402
from samples import track as thinned  # noqa: E402

GOLDEN = HERE / "golden"
FACTS = json.loads((GOLDEN / "htdemucs_tiny.json").read_text())
ARRAYS = read_packed(GOLDEN / "htdemucs_tiny.npz")


@pytest.mark.parametrize("name", ["htdemucs_tiny", "htdemucs_mini"])
def test_files_are_as_made(name):
    facts = json.loads((GOLDEN / f"{name}.json").read_text())
    assert hashlib.sha256((GOLDEN / f"{name}.npz").read_bytes()).hexdigest() == facts["sha256"]


def golden_model(name):
    """A model with the original's weights, through the converter's metadata and rules."""
    kwargs = json.dumps(FACTS["models"][name]["kwargs"])
    config = read_config({"klass": "demucs.htdemucs.HTDemucs", "args": "[]", "kwargs": kwargs})
    start = f"{name}/state/"
    state = {k.removeprefix(start): mx.array(v) for k, v in ARRAYS.items() if k.startswith(start)}
    model = HTDemucs(config)
    expected = {k: v.shape for k, v in tree_flatten(model.parameters())}
    weights = apply_rules(rules(config), state, expected)
    model.load_weights([(k, v.astype(mx.float32)) for k, v in weights.items()], strict=True)
    return model


@pytest.mark.parametrize("name", FACTS["models"])
def test_model(name):
    """Every level and every source, 90 dB or more below PyTorch in double precision."""
    model = golden_model(name)
    taps = tap(model)
    out = np.array(model(mx.array(ARRAYS[f"{name}/mix"])))
    if "crosstransformer" in taps:
        taps["crosstransformer.freq"], taps["crosstransformer.time"] = taps.pop("crosstransformer")
    start = f"{name}/tap/"
    recorded = {k.removeprefix(start): v for k, v in ARRAYS.items() if k.startswith(start)}
    assert set(recorded) - {"normalised.freq", "normalised.time", "embedded"} == set(taps)
    for level in taps:
        assert snr_db(recorded[level], thin(pytorch_layout(level, taps[level]))) >= 90, level
    for row, expected in zip(out, ARRAYS[f"{name}/output"], strict=True):
        assert min(stem_snr_db(expected, thinned(row))) >= 90


@pytest.mark.parametrize("name", FACTS["apply"])
def test_track(name):
    """Whole tracks: lengths, overlaps, shifts, bags and levels, 85 dB or more."""
    case = FACTS["apply"][name]
    members = [golden_model(member) for member in (("small0", "small1") if case["bag"] else ("small0",))]
    model = members[0]
    if case["bag"]:
        model = Bag(BagConfig(tuple(m.config for m in members), tuple(map(tuple, case["weights"]))))
        model.models = members
    rate = members[0].config.samplerate
    mix = (music(case["length"], 2, 1, rate) * case["gain"] + case["offset"]).astype(np.float32)
    options = {k: case[k] for k in ("shifts", "overlap", "transition_power", "seed", "segment") if k in case}
    stems = separate(model, mix, rate, **options)
    out = thinned(np.stack([np.array(stem) for stem in stems.values()]))
    assert min(stem_snr_db(ARRAYS[f"apply/{name}"], out)) >= 85


@pytest.fixture(scope="module")
def mini():
    return load("htdemucs_mini")


def test_shipped_model_alone(mini):
    """The first segment of the shipped recording, 90 dB or more (a broken cross-attention still gives 53)."""
    samples, _ = recording.read(HERE.parent / "mlx_xformer" / "data" / "demo.flac")
    out = np.array(mini(mx.array(samples[None, :, : mini.config.segment_samples])))[0]
    with np.load(GOLDEN / "htdemucs_mini.npz") as golden:
        assert min(stem_snr_db(golden["forward"], out[..., ::64])) >= 90


def test_shipped_model_on_the_shipped_recording(mini):
    samples, rate = recording.read(HERE.parent / "mlx_xformer" / "data" / "demo.flac")
    stems = separate(mini, samples, rate, shifts=0)
    assert list(stems) == ["drums", "bass", "other", "vocals"]
    out = np.stack([np.array(stem) for stem in stems.values()])
    with np.load(GOLDEN / "htdemucs_mini.npz") as golden:
        assert min(stem_snr_db(golden["separator"], out[..., ::256])) >= 90
