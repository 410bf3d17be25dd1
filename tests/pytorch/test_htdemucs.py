"""HTDemucs and separate() against the original in PyTorch, at the figures that the project promises."""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.harness import pytorch_layout, snr_db, stem_snr_db, tap
from support.models import OPTIONS, options
from support.oracle import Oracle

from mlx_xformer.converters.families.htdemucs import rules
from mlx_xformer.converters.rules import apply_rules
from mlx_xformer.models.htdemucs import Bag, BagConfig, HTDemucs, HTDemucsConfig
from mlx_xformer.separation.options import Options
from mlx_xformer.separation.segments import apply_model
from mlx_xformer.separation.separator import separate

sys.path.insert(0, str(Path(__file__).parents[1] / "oracle"))
from samples import music

pytestmark = pytest.mark.torch

OFFICIAL = {
    "sources": ["drums", "bass", "other", "vocals"],
    "segment": "39/5",
    "dconv_mode": 3,
    "bottom_channels": 512,
    "t_dropout": 0.02,
    "t_sparse_attn_window": 400,
}
SIX = OFFICIAL | {"sources": ["drums", "bass", "other", "vocals", "guitar", "piano"], "bottom_channels": 0}
TINY = {"nfft": 256, "depth": 2, "t_layers": 2, "t_heads": 2, "bottom_channels": 8}
TRACK = options("base") | TINY | {"segment": "1", "sources": ["drums", "bass", "other", "vocals"]}


@pytest.fixture(scope="module")
def oracle():
    with Oracle() as child:
        yield child


def keywords(plain):
    """demucs' own keyword arguments: a segment in text is a Fraction."""
    segment = plain["segment"]
    return plain | {"segment": Fraction(segment) if isinstance(segment, str) else segment}


def converted(plain, state):
    """The MLX model of a configuration, with the original's weights through the conversion rules."""
    config = HTDemucsConfig.from_dict(plain)
    model = HTDemucs(config)
    load(model, rules(config), state)
    return model


def load(model, table, state):
    expected = {name: value.shape for name, value in tree_flatten(model.parameters())}
    weights = apply_rules(table, {name: mx.array(value) for name, value in state.items()}, expected)
    model.load_weights(list(weights.items()), strict=True)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("plain", [OFFICIAL, SIX], ids=["htdemucs", "htdemucs_6s"])
def test_official_configurations(oracle, plain, seed, record_property):
    """At least 95 dB per source; the error against double precision at most 6 times PyTorch's own in float32."""
    given = {"seed": seed, "signal_seed": seed}
    single = oracle.htdemucs(keywords(plain), **given)
    double = oracle.htdemucs(keywords(plain), **given, dtype="float64", state=False)["output"][0]
    out = np.array(converted(plain, single.state)(mx.array(single["mix"])))[0]
    theirs = single["output"][0]
    snr = stem_snr_db(theirs, out)
    own_error, error = (np.sqrt(np.square(y - double).mean(axis=(1, 2))) for y in (theirs, out))
    ratio = error / own_error
    record_property("snr_db", [round(x, 1) for x in snr])
    record_property("error_ratio", [round(float(x), 2) for x in ratio])
    print(f"\nseed {seed}: SNR {np.round(snr, 1)} dB, error over PyTorch's {np.round(ratio, 2)}", end=" ")
    print(f"PyTorch's own {np.round(stem_snr_db(double, theirs), 1)} dB")
    assert min(snr) >= 95
    assert ratio.max() <= 6


@pytest.mark.parametrize("name", OPTIONS)
def test_option(oracle, name):
    """Each option on its own: every level and every source at 90 dB or more."""
    plain = options(name)
    answer = oracle.htdemucs(keywords(plain), 5, taps=True, signal_seed=3)
    model = converted(plain, answer.state)
    taps = tap(model)
    out = np.array(model(mx.array(answer["mix"])))
    if "crosstransformer" in taps:
        taps["crosstransformer.freq"], taps["crosstransformer.time"] = taps.pop("crosstransformer")
    starts = {"normalised.freq", "normalised.time", "embedded"}  # inputs of layers, seen through their outputs
    assert set(answer.taps) - starts == set(taps)
    for level in taps:
        assert snr_db(answer.taps[level], pytorch_layout(level, taps[level])) >= 90, level
    assert min(stem_snr_db(answer["output"][0], out[0])) >= 90


def track(length, gain=1.0, offset=0.0):
    return (gain * music(length, 2, 7, TRACK["samplerate"]) + offset).astype(np.float32)


def compare_track(oracle, mix, plain=TRACK, seed=11, **given):
    """separate() on a track against apply_model inside demucs.api's normalisation: 85 dB or more per source."""
    answer = oracle.apply(keywords(plain), 2, mix, random_seed=seed, **given)
    model = converted(plain, answer.state)
    stems = separate(model, mix, plain["samplerate"], seed=seed, **given)
    out = np.stack([np.array(stem) for stem in stems.values()])
    assert min(stem_snr_db(answer["output"], out)) >= 85


LENGTHS = {"5000": 5000, "30000": 30000, "a segment": 8000, "a segment and 1": 8001, "3 segments and 123": 24123}


@pytest.mark.parametrize("overlap", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
def test_track_lengths(oracle, length, overlap):
    compare_track(oracle, track(length), shifts=0, overlap=overlap)


@pytest.mark.parametrize("shifts", [1, 2])
@pytest.mark.parametrize("length", [5000, 24123])
def test_track_shifts(oracle, length, shifts):
    compare_track(oracle, track(length), shifts=shifts)


@pytest.mark.parametrize(
    "given", [{"transition_power": 2.0}, {"segment": 0.4}, {"segment": 0.4, "overlap": 0.5}], ids=str
)
def test_track_options(oracle, given):
    compare_track(oracle, track(24123), shifts=0, **given)


def test_track_quiet(oracle):
    """-70 dBFS."""
    compare_track(oracle, track(24123, gain=10 ** (-70 / 20) / np.sqrt(np.square(track(24123)).mean())), shifts=0)


def test_track_offset(oracle):
    compare_track(oracle, track(24123, offset=0.3), shifts=0)


@pytest.mark.parametrize(
    "change",
    [{"t_sin_random_shift": 50}, {"t_emb": "cape"}, {"t_layers": 0}, {"use_train_segment": False}, {"segment": 1}],
    ids=str,
)
def test_track_models_that_draw_or_pad_differently(oracle, change):
    compare_track(oracle, track(24123), TRACK | change, shifts=2)


@pytest.mark.parametrize("bag_segment", [None, 0.5])
@pytest.mark.parametrize("shifts", [0, 2])
def test_track_bag(oracle, shifts, bag_segment):
    """Members of different depth, unequal weights per source, a shift of its own for each."""
    plain = [TRACK, TRACK | {"t_layers": 3}]
    weights = [[1.0, 0.25, 0.0, 2.0], [0.5, 1.0, 3.0, 0.0]]
    mix = track(13000)
    bag = {"weights": weights, "bag_segment": bag_segment}
    answer = oracle.apply([keywords(p) for p in plain], [2, 3], mix, random_seed=4, shifts=shifts, **bag)
    members = tuple(HTDemucsConfig.from_dict(p) for p in plain)
    config = BagConfig(members, tuple(map(tuple, weights)), bag_segment)
    model = Bag(config)
    load(model, rules(config), answer.state)
    stems = separate(model, mix, 8000, shifts=shifts, seed=4)
    assert min(stem_snr_db(answer["output"], np.stack([np.array(s) for s in stems.values()]))) >= 85


def test_apply_model_without_levelling(oracle):
    mix = track(13000, offset=0.1)
    answer = oracle.apply(keywords(TRACK), 2, mix, random_seed=9, shifts=2, normalise=False)
    out = apply_model(converted(TRACK, answer.state), mx.array(mix), Options(shifts=2, seed=9))
    assert min(stem_snr_db(answer["output"], np.array(out))) >= 85
