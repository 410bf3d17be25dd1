"""Mixtures whose experts are spread over two processes make what one process makes."""

import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support import spread_mixtures as cases
from support.harness import as32, assert_within_budget
from support.language import language_model
from support.processes import BIN, free_ports, run, side_by_side

from mlx_xformer.nn.moe.layer import MoE, MoEConfig
from mlx_xformer.nn.moe.sharded import SpreadMoE, spread
from mlx_xformer.reference.models.causal_lm import decoder as decoder_twin
from mlx_xformer.reference.nn.moe import moe as twin

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "expert_parallel.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes wrote."""
    folder = tmp_path_factory.mktemp("spread")
    answers = side_by_side(folder, sys.executable, "-W", "error", cases.__file__, folder)
    assert answers == [(0, "", "")] * 2
    return [dict(np.load(folder / f"{rank}.npz")) for rank in range(2)]


@pytest.mark.parametrize("kind", cases.KINDS)
def test_two_processes_make_what_the_twin_makes(found, kind):
    config, (_, params) = cases.config(kind), cases.mixture(kind)
    for i, x in enumerate(cases.inputs(kind)):
        (ref64, routing), (ref32, _) = twin(params, x, config), twin(as32(params), as32(x), config)
        for one in found:
            assert_within_budget(one[f"{kind}:{i}"], ref64, ref32, f"{x.shape}")
            assert int(one[f"{kind}:{i}:dropped"]) == (~routing.kept).sum()
            assert one[f"{kind}:{i}:load"].tolist() == np.bincount(routing.experts.ravel(), minlength=14).tolist()
        assert (found[0][f"{kind}:{i}"] == found[1][f"{kind}:{i}"]).all()


@pytest.mark.parametrize("kind", cases.KINDS)
def test_each_process_holds_half_of_the_experts(found, kind):
    for one in found:
        mine, whole = one[f"{kind}:bytes"].tolist()
        assert whole > 0 and 2 * mine == whole


def test_a_decoder_at_once_and_by_a_cache(found):
    model = cases.decoder()
    params = {name: np.array(x, np.float64) for name, x in tree_flatten(model.parameters())}
    tokens = np.array(cases.tokens())
    ref64, ref32 = (decoder_twin(p, model.config, tokens) for p in (params, as32(params)))
    for one in found:
        assert_within_budget(one["whole"], ref64, ref32)
        assert_within_budget(one["cached"], ref64, ref32)


class Seat:
    """A process of several, of which nothing is asked but who it is."""

    def __init__(self, rank, size):
        self.rank, self.size = lambda: rank, lambda: size


@pytest.mark.parametrize("rank", range(4))
def test_the_others_experts_are_freed(rank):
    layers = nn.Sequential(MoE(MoEConfig(101, 103, 8, bias=True)))
    mx.eval(layers.parameters())
    expected = {name: np.array(x) for name, x in tree_flatten(layers.parameters())}
    before, held = mx.get_active_memory(), cases.held(layers)
    spread(layers, Seat(rank, 4))
    assert abs(before - mx.get_active_memory() - held * 3 / 4) < held / 100
    for name, x in tree_flatten(layers.parameters()):
        part = slice(2 * rank, 2 * rank + 2) if ".experts." in name else slice(None)
        assert (np.array(x) == expected[name][part]).all(), name


def test_weights_still_on_the_disk_are_never_all_in_memory(tmp_path):
    layers = nn.Sequential(*(MoE(MoEConfig(101, 103, 8)) for _ in range(5)))
    layers.save_weights(str(tmp_path / "weights.safetensors"))
    whole = cases.held(layers)
    layers.load_weights(str(tmp_path / "weights.safetensors"))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    spread(layers, Seat(3, 4))
    one = whole / 5 / 3  # a tensor of a layer
    assert mx.get_peak_memory() - before < whole / 4 + 2 * one


def test_a_process_on_its_own_has_all_experts():
    moe, params = cases.mixture("overflow")
    layers = nn.Sequential(moe)
    spread(layers, mx.distributed.init())  # outside of a launch, a group of one
    x, config = cases.inputs("overflow")[0], cases.config("overflow")
    y, _ = layers(mx.array(as32(x)))
    assert_within_budget(y, twin(params, x, config)[0], twin(as32(params), as32(x), config)[0])
    assert not tree_flatten(layers.trainable_parameters())


@pytest.mark.parametrize("kind", [mx.float16, mx.bfloat16])
def test_half_precisions_stay(kind):
    layers = nn.Sequential(cases.mixture("top-3")[0])
    layers.set_dtype(kind)
    spread(layers, mx.distributed.init())
    assert layers(mx.zeros((2, 3, cases.D), kind))[0].dtype == kind


def test_what_cannot_be_spread():
    several = nn.Sequential(*(MoE(MoEConfig(cases.D, cases.H, count)) for count in (8, 6, 8)))
    before = {name: x.shape for name, x in tree_flatten(several.parameters())}
    with pytest.raises(ValueError, match="num_experts must be a multiple of the number of processes, 4, got 6"):
        spread(several, Seat(1, 4))
    assert {name: x.shape for name, x in tree_flatten(several.parameters())} == before
    decoder = cases.decoder()
    with pytest.raises(ValueError, match="model must have layers that are a MoE, got a Linear without"):
        spread(nn.Linear(3, 2), Seat(0, 2))
    spread(decoder, Seat(0, 2))
    with pytest.raises(ValueError, match="moe must have all its experts, got one that is spread already"):
        spread(decoder, Seat(0, 2))
    with pytest.raises(ValueError, match="number of processes, 3, got 14"):
        SpreadMoE(cases.mixture("top-1")[0], Seat(0, 3))


def test_the_example_says_what_one_process_says(tmp_path):
    model = language_model(tmp_path / "model", moe=cases.DECODER)
    alone = run(([sys.executable, EXAMPLE, model, "hello"], {}))[0]
    head = [BIN / "mlx.launch", "-n", 2, "--backend", "ring", "--starting-port", free_ports()[0], "--"]
    launched = run(([*head, sys.executable, EXAMPLE, model, "hello"], {}))[0]
    assert alone[0] == 0 and len(alone[1]) > 20, alone
    assert launched == alone


def test_the_example_says_what_it_takes():
    code, out, err = run(([sys.executable, EXAMPLE, "--help"], {}))[0]
    assert code == 0 and "MODEL PROMPT" in out and "mlx.launch -n 2" in out, err
    code, _, err = run(([sys.executable, EXAMPLE, "model"], {}))[0]
    assert code == 2 and "Traceback" not in err and "required: PROMPT" in err


def test_the_example_says_in_a_line_what_cannot_be(tmp_path):
    model = language_model(tmp_path / "model", moe=cases.DECODER | {"num_experts": 7})
    answers = side_by_side(tmp_path, sys.executable, EXAMPLE, model, "hello")
    reason = "num_experts must be a multiple of the number of processes, 2, got 7"
    assert answers == [(1, "", f"expert_parallel.py: {reason}\n")] * 2
