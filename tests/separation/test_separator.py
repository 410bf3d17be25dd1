"""separate() against the NumPy twin's apply and bag: lengths, overlaps, shifts, seeds, bags, levels."""

import dataclasses
import inspect
import random
import subprocess
import sys
import threading
from fractions import Fraction

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.harness import as32, assert_within_budget, draw, snr_db
from support.models import options

from mlx_xformer.backend.threads import clear_streams_at_thread_end
from mlx_xformer.models.htdemucs import Bag, BagConfig, HTDemucs, HTDemucsConfig, InferenceMode
from mlx_xformer.reference import separation as twin
from mlx_xformer.reference.models.htdemucs.model import htdemucs as twin_model
from mlx_xformer.separation.options import Options, transition_weight
from mlx_xformer.separation.segments import read_segment
from mlx_xformer.separation.separator import Separator, separate
from mlx_xformer.separation.track import Track
from mlx_xformer.storage.checkpoint import save_checkpoint

SEGMENT = 1024  # samples
TINY = {"nfft": 256, "depth": 2, "t_layers": 2, "segment": "128/1000", "t_heads": 2, "bottom_channels": 8}


def small(**changes):
    return HTDemucsConfig.from_dict(options("base") | TINY | changes)


def model_and_twin(seed=1, **changes):
    """A tiny model and its twin's forward (C, N) -> (S, C, N), in the precision of its input."""
    config = small(**changes)
    model = HTDemucs(config)
    double = draw(model, seed)
    params = {np.dtype(np.float64): double, np.dtype(np.float32): as32(double)}

    def forward(chunk, position_shift=0):
        return twin_model(params[chunk.dtype], config, chunk[None], position_shift=position_shift)[0]

    return model, forward


def track(length, seed=0, channels=2, gain=0.3, offset=0.0):
    t = np.arange(length) / 8000
    tones = np.stack([np.sin(2 * np.pi * (200 + 90 * c) * t) * (1 + 0.5 * np.sin(7 * t)) for c in range(channels)])
    return (gain * (tones + np.random.default_rng(seed).normal(size=tones.shape)) + offset).astype(np.float32)


def expected(forward, mix, config, *, seed=0, pad_chunks=True, **given):
    wave, center, divisor = twin.normalise(mix)
    draws = config.t_emb == "sin" and config.t_layers > 0
    out = twin.apply(
        forward,
        wave,
        sources=len(config.sources),
        samplerate=config.samplerate,
        training_samples=config.segment_samples,
        rng=random.Random(seed),
        random_shift=config.t_sin_random_shift if draws else None,
        pad_chunks=pad_chunks,
        **given,
    )
    return twin.denormalise(out, center, divisor)


def stacked(stems):
    return np.stack([np.array(v) for v in stems.values()])


def compare(mix, given, model_options=None):
    model, forward = model_and_twin(**(model_options or {}))
    config = model.config
    out = stacked(separate(model, mix, config.samplerate, **given))
    pad = config.use_train_segment
    options = {k: v for k, v in given.items() if k != "batch_size"} | {"pad_chunks": pad}
    ref64, ref32 = (expected(forward, mix.astype(dtype), config, **options) for dtype in (np.float64, np.float32))
    for stem, a, b, c in zip(config.sources, out, ref64, ref32, strict=True):
        assert_within_budget(a, b, c, stem)


@pytest.mark.parametrize("length", [2, 100, 640, SEGMENT - 1, SEGMENT, SEGMENT + 1, 3 * SEGMENT + 123])
def test_lengths(length):
    compare(track(length), {"shifts": 0})


def test_one_sample():
    """The original divides by the deviation of one sample and gives NaN; here it is the sample's own offset."""
    model, _ = model_and_twin()
    out = stacked(separate(model, np.array([[0.25], [0.25]], np.float32), 8000, shifts=0))
    assert out.shape == (3, 2, 1) and np.abs(out - 0.25).max() < 1e-6


@pytest.mark.parametrize(
    "given",
    [
        {"shifts": 0, "overlap": 0.0},
        {"shifts": 0, "overlap": 0.1},
        {"shifts": 0, "overlap": 0.5},
        {"shifts": 0, "overlap": 0.8},
        {"shifts": 0, "transition_power": 2.0},
        {"shifts": 0, "segment": 0.05},
        {"shifts": 1, "seed": 3},
        {"shifts": 2, "seed": 4, "overlap": 0.3},
        {"shifts": 0, "batch_size": 3},
        {"shifts": 2, "seed": 5, "batch_size": 4},
    ],
    ids=str,
)
def test_options(given):
    compare(track(2300), given)


@pytest.mark.parametrize(
    "model_options",
    [
        {"t_sin_random_shift": 11},
        {"t_emb": "cape"},
        {"use_train_segment": False},
        {"t_layers": 0},
        {"audio_channels": 1},
    ],
    ids=str,
)
def test_models_that_draw_or_pad_differently(model_options):
    mix = track(2300, channels=model_options.get("audio_channels", 2))
    compare(mix, {"shifts": 2, "seed": 6}, model_options)
    compare(mix, {"shifts": 1, "seed": 6, "batch_size": 3}, model_options)


@pytest.mark.parametrize("level", [{"gain": 1e-4}, {"offset": 0.3}, {"gain": 8.0}], ids=str)
def test_levels(level):
    compare(track(2500, **level), {"shifts": 0})


def test_silence():
    model, _ = model_and_twin()
    out = stacked(separate(model, np.zeros((2, 1500), np.float32), 8000))
    assert np.isfinite(out).all() and np.abs(out).max() < 1e-6


def test_bag():
    """Unequal weights per source; each member draws its own shifts."""
    (a, fa), (b, fb) = model_and_twin(1), model_and_twin(2, t_layers=3)
    weights = ((1.0, 0.25, 0.0), (0.5, 1.0, 2.0))
    bag = Bag(BagConfig((a.config, b.config), weights))
    bag.models = [a, b]
    mix = track(2600)
    out = stacked(separate(bag, mix, 8000, shifts=2, seed=7))
    wave, center, divisor = twin.normalise(mix.astype(np.float64))
    common = {"sources": 3, "samplerate": 8000, "training_samples": SEGMENT, "shifts": 2, "rng": random.Random(7)}
    theirs = twin.bag([{"forward": fa}, {"forward": fb}], wave, weights=weights, **common)
    theirs = twin.denormalise(theirs, center, divisor)
    assert min(snr_db(x, y) for x, y in zip(theirs, out, strict=True)) > 105


def test_a_one_hot_bag_runs_only_the_members_that_the_stems_need():
    members = [model_and_twin(seed)[0] for seed in (1, 2, 3)]
    bag = Bag(BagConfig(tuple(m.config for m in members), tuple(map(tuple, np.eye(3).tolist()))))
    bag.models = members
    mix = track(2600)
    whole = separate(bag, mix, 8000, shifts=1, seed=7)
    seen = []
    options = {"shifts": 1, "seed": 7, "stems": ["voice"]}
    one = separate(bag, mix, 8000, **options, progress=lambda p: seen.append((p.done, p.total)))
    assert list(one) == ["voice"]
    assert (one["voice"] == whole["voice"]).all()  # the same draws, though other members are skipped
    assert seen[-1] == (len(seen), len(seen))
    members[0].update({"encoder": [{"conv": {"bias": mx.full((4,), mx.nan)}}]})
    assert (separate(bag, mix, 8000, **options)["voice"] == whole["voice"]).all()


def test_stems_are_a_selection():
    model, _ = model_and_twin()
    mix = track(1500)
    whole = separate(model, mix, 8000)
    some = separate(model, mix, 8000, stems=["rest", "drums"])
    assert list(whole) == ["drums", "voice", "rest"] and list(some) == ["drums", "rest"]
    assert all(np.allclose(some[s], whole[s], atol=1e-6) for s in some)


def test_seed_decides():
    model, _ = model_and_twin()
    mix = track(3000)
    first, again, other = (stacked(separate(model, mix, 8000, seed=s)) for s in (1, 1, 2))
    assert (first == again).all() and np.abs(first - other).max() > 1e-4


def test_progress_counts_every_segment():
    model, _ = model_and_twin()
    seen = []
    separate(model, track(3000), 8000, shifts=2, batch_size=2, progress=lambda p: seen.append((p.done, p.total)))
    done, total = zip(*seen, strict=True)
    assert len(set(total)) == 1 and done[-1] == total[-1] and list(done) == sorted(set(done))


def test_channels_and_rates():
    model, _ = model_and_twin()
    mono = track(1500, channels=1)
    doubled = stacked(separate(model, np.repeat(mono, 2, axis=0), 8000))
    assert (stacked(separate(model, mono, 8000)) == doubled).all()
    assert (stacked(separate(model, mono[0], 8000)) == doubled).all()
    wide = np.concatenate([track(1500), track(1500, seed=9)])
    assert (stacked(separate(model, wide, 8000)) == stacked(separate(model, wide[:2], 8000))).all()
    single, _ = model_and_twin(audio_channels=1)
    stereo = track(1500)
    assert (stacked(separate(single, stereo, 8000)) == stacked(separate(single, stereo.mean(0), 8000))).all()
    resampled = separate(model, track(3000), 16000)
    assert resampled["drums"].shape == (2, 1500)
    quarter, _ = model_and_twin(audio_channels=4)
    with pytest.raises(ValueError, match="audio must be mono or have at least 4 channels, got 2"):
        separate(quarter, stereo, 8000)


def test_input_is_left_alone():
    model, _ = model_and_twin()
    mix = track(1500)
    before = mix.copy()
    separate(model, mix, 8000)
    assert (mix == before).all()
    given = mx.array(mix)
    assert (stacked(separate(model, given, 8000)) == stacked(separate(model, mix, 8000))).all()
    assert (np.array(given) == before).all()


def test_time_only():
    model, _ = model_and_twin()
    mix = track(1500)
    full = stacked(separate(model, mix, 8000))
    assert np.abs(full - stacked(separate(model, mix, 8000, mode=InferenceMode.TIME_ONLY))).max() > 1e-2


def test_real_audio_beside_a_short_segment():
    """The last, short segment is filled with the audio before it, as far as there is some."""
    track = Track([np.arange(20, dtype=np.float32)[None]], 1, 20)
    assert np.array(read_segment(track, 16, 4, 10)).tolist() == [[13, 14, 15, 16, 17, 18, 19, 0, 0, 0]]
    assert np.array(read_segment(track, 0, 20, 25)).tolist() == [[0, 0, *range(20), 0, 0, 0]]


def test_transition_weight():
    assert transition_weight(5, 1.0).tolist() == pytest.approx([1 / 3, 2 / 3, 1, 2 / 3, 1 / 3])
    assert transition_weight(4, 2.0).tolist() == pytest.approx([0.25, 1, 1, 0.25])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"shifts": -1}, "shifts must be at least 0, got -1"),
        ({"overlap": 1.0}, "overlap must be at least 0 and below 1, got 1.0"),
        ({"overlap": -0.1}, "overlap must be at least 0 and below 1, got -0.1"),
        ({"overlap": 0.9999}, "must leave a stride of a sample or more"),
        ({"segment": 0.2}, "segment must be above 0 and at most the model's 0.128 s, got 0.2"),
        ({"segment": 0.0}, "segment must be above 0"),
        ({"transition_power": 0.5}, "transition_power must be at least 1, got 0.5"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"stems": ["voice", "flute"]}, "stems must be among drums, voice, rest, got flute"),
        ({"stems": "voice"}, "stems must be a sequence of names, got 'voice'"),
        ({"transition_power": float("nan")}, "transition_power must be at least 1, got nan"),
        ({"transition_power": 20.0}, "transition_power must leave every sample some weight, got 20"),
        ({"segment": 1e-9}, "segment must hold a sample or more, got 1e-09 s"),
        ({"segment": Fraction(9)}, "segment must be above 0 and at most the model's 0.128 s, got 9"),
        ({"audio": np.zeros((500, 2), np.float32)}, r"audio must be \(channels, samples\) .*, got \(500, 2\)"),
        ({"audio": np.zeros((2, 500), np.int16)}, "audio must be floats with full scale at 1, got int16"),
        ({"mode": "slow"}, "'slow' is not a valid InferenceMode"),
        ({"stems": []}, "stems must be among drums, voice, rest, got none"),
        ({"audio": np.zeros((2, 0))}, r"audio must be .* at least one sample .*, got \(2, 0\)"),
        ({"audio": np.zeros((1, 2, 5))}, r"audio must be \(channels, samples\)"),
        ({"audio": np.array([[0, np.nan]])}, "audio must be finite"),
        ({"audio": np.array([[0, np.inf]])}, "audio must be finite"),
        ({"sample_rate": 0}, "from_rate must be a whole number of Hz from 1 to 10000000, got 0"),
        ({"sample_rate": float("nan")}, "from_rate must be a whole number of Hz .*, got nan"),
    ],
)
def test_errors(given, message):
    model, _ = model_and_twin()
    with pytest.raises(ValueError, match=message):
        separate(**({"model": model, "audio": track(100), "sample_rate": 8000} | given))


def test_stems_may_be_read_in_another_thread():
    model, _ = model_and_twin()
    stems = {}

    def work():
        clear_streams_at_thread_end()
        stems.update(separate(model, mx.array(track(1500)), 8000))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert (stacked(stems) == stacked(separate(model, track(1500), 8000))).all()


BAG = """
import sys, threading
import mlx_xformer
import mlx.core as mx, mlx.utils, numpy as np
from mlx_xformer import clear_streams_at_thread_end, load, separate
audio = np.random.default_rng(0).normal(size=(2, 900)).astype(np.float32)
bags, stems = [], {}

def run(work):
    def whole():
        clear_streams_at_thread_end()
        work()
    thread = threading.Thread(target=whole)
    thread.start()
    return thread

before = mx.get_active_memory()
run(lambda: bags.append(load(sys.argv[1]))).join()
threads = [run(lambda i=i: stems.update({i: separate(bags[0], audio, 8000, stems=["voice"])})) for i in range(3)]
for thread in threads:
    thread.join()
size = sum(x.nbytes for member in bags[0].models for _, x in mlx.utils.tree_flatten(member.parameters()))
assert mx.get_active_memory() - before < 0.6 * size
expected = separate(load(sys.argv[1]), audio, 8000, stems=["voice"])
assert all((stems[i]["voice"] == expected["voice"]).all() for i in range(3))
print("equal", end="")
"""


def test_a_bag_of_one_thread_runs_in_others(tmp_path):
    """Three at once, which need one member of two: the other is not read."""
    config = model_and_twin()[0].config
    bag = Bag(BagConfig((config, config), ((1.0, 0.0, 1.0), (0.0, 1.0, 1.0))))
    weights = dict(tree_flatten(bag.parameters()))
    facts = {"family": "htdemucs_bag", "config": bag.config.to_dict(), "provenance": {}}
    save_checkpoint(tmp_path / "bag", weights, **facts)
    command = [sys.executable, "-c", BAG, str(tmp_path / "bag")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stdout) == (0, "equal"), ended.stderr[-2000:]


def test_what_may_be_given():
    """Stems as any iterable, the mode by its value, audio as MLX's half precision."""
    model, _ = model_and_twin()
    mix = mx.array(track(1500)).astype(mx.bfloat16)
    a = separate(model, mix, 8000, stems=(s for s in ["rest"]), mode="full")
    b = separate(model, mix.astype(mx.float32), 8000, stems=["rest"])
    assert list(a) == ["rest"] and (a["rest"] == b["rest"]).all()


def test_segment_may_be_a_fraction():
    model, _ = model_and_twin()
    mix = track(1500)
    a = stacked(separate(model, mix, 8000, segment=Fraction(1, 20)))
    assert (a == stacked(separate(model, mix, 8000, segment=0.05))).all()


def test_options_have_one_set_of_defaults():
    """Separator, separate() and Options list the same options with the same defaults."""
    listed = {field.name: field.default for field in dataclasses.fields(Options)}
    for function in (Separator, separate):
        parameters = inspect.signature(function).parameters.values()
        assert all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters)
        given = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        assert {name: given[name] for name in given if name not in ("progress", "cancel")} == listed
