"""Mixtures whose experts are spread over two processes make what one process makes."""

import gc
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.harness import Params, as32, assert_within_budget, draw
from support.processes import BIN, free_ports, run, side_by_side
from support.text import language_model, tiny_causal_lm

from mlx_xformer.backend import device
from mlx_xformer.nn.moe import MoE, MoEConfig
from mlx_xformer.nn.moe.sharded import SpreadMoE, spread
from mlx_xformer.reference.models.causal_lm import decoder as decoder_twin
from mlx_xformer.reference.nn.moe import moe as twin

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "expert_parallel.py"


D, H, E = 23, 29, 14
TOKENS = (37, 3, 1)  # of one input after the other: by blocks, and choice by choice
KINDS = {
    "top-1": {"num_experts_per_tok": 1, "alpha": 0.1},
    "top-3": {"num_experts_per_tok": 3},
    "plain": {"num_experts_per_tok": 2, "gated": False, "activation": "relu", "bias": True, "router_bias": True},
    "sigmoid": {"num_experts_per_tok": 2, "router": "sigmoid", "selection_bias": True, "scale": 2.3},
    "groups": {"num_experts_per_tok": 3, "groups": 7, "groups_per_tok": 2},
    "dropped": {"num_experts_per_tok": 2, "capacity": 1.1},
    "overflow": {"num_experts_per_tok": 2, "capacity": 3, "overflow": "expert", "bias": True},
    "full": {"num_experts_per_tok": 2, "capacity": 0, "overflow": "expert"},
    "shared": {"num_experts_per_tok": 2, "shared_dim": 31, "shared_gate": True},
    "packed": {"num_experts_per_tok": 3, "embed_dim": 64, "hidden_dim": 96},
}
DECODER = {"embed_dim": 40, "hidden_dim": 29, "num_experts": 6, "num_experts_per_tok": 2}


def mixture_config(kind: str) -> MoEConfig:
    return MoEConfig(**{"embed_dim": D, "hidden_dim": H, "num_experts": E} | KINDS[kind])


def mixture(kind: str) -> tuple[MoE, Params]:
    """A MoE of drawn weights, and these in double precision."""
    moe = MoE(mixture_config(kind))
    params = draw(moe, seed=len(kind))
    moe.eval()
    if kind == "packed":
        nn.quantize(moe, 32, 4, class_predicate=lambda name, _: name.startswith("experts."))
        for name, layer in moe.experts.children().items():
            params[f"experts.{name}.weight"] = np.array(
                mx.dequantize(layer.weight, layer.scales, layer.biases, 32, 4), np.float64
            )
    return moe, params


def inputs(kind: str) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.normal(size=(1, T, mixture_config(kind).embed_dim)) for T in TOKENS]


def tiny_mixture() -> nn.Module:
    model = tiny_causal_lm(moe=DECODER, dense_layers=[1])
    model.eval()
    return model


def some_tokens() -> mx.array:
    return mx.array(np.random.default_rng(3).integers(0, 257, (2, 19)))


def logits(model: nn.Module) -> dict[str, mx.array]:
    """Of the tokens at once, and of the last of them by a cache."""
    caches = model.make_caches()
    parts = [model(some_tokens()[:, at], caches=caches) for at in (slice(11), slice(11, 12), slice(12, 19))]
    return {"whole": model(some_tokens()), "cached": mx.concatenate(parts, axis=1)}


def expert_bytes(model: nn.Module) -> int:
    """The bytes of a model's experts."""
    return sum(x.nbytes for name, x in tree_flatten(model.parameters()) if "experts." in name)


def write_what_a_process_makes(folder: str) -> None:
    """Writes FOLDER/RANK.npz: what every kind of mixture makes, its experts spread over the processes."""
    group = device.process_group()
    found = {}
    for kind in KINDS:
        moe, _ = mixture(kind)
        layers = nn.Sequential(moe)
        before = expert_bytes(layers)
        spread(layers, group)
        found[f"{kind}/bytes"] = mx.array([expert_bytes(layers), before])
        for i, x in enumerate(inputs(kind)):
            found[f"{kind}/{i}"], routing = layers(mx.array(x.astype(np.float32)))
            found[f"{kind}/{i}/load"], found[f"{kind}/{i}/dropped"] = routing.load, routing.dropped
    model = tiny_mixture()
    spread(model, group)
    found |= logits(model)
    mx.savez(str(Path(folder) / f"{group.rank()}.npz"), **{name.replace("/", ":"): x for name, x in found.items()})


# Runs this file's write_what_a_process_makes in a process of its own.
CHILD = """
import runpy, sys
import mlx_xformer  # before MLX, whose BLAS it chooses
path, folder = sys.argv[1:]
sys.path.insert(0, path.rpartition("/nn/")[0])
runpy.run_path(path)["write_what_a_process_makes"](folder)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes wrote."""
    folder = tmp_path_factory.mktemp("spread")
    answers = side_by_side(folder, sys.executable, "-W", "error", "-c", CHILD, __file__, folder)
    assert answers == [(0, "", "")] * 2
    return [dict(np.load(folder / f"{rank}.npz")) for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_make_what_the_twin_makes(found, kind):
    config, (_, params) = mixture_config(kind), mixture(kind)
    for i, x in enumerate(inputs(kind)):
        (ref64, routing), (ref32, _) = twin(params, x, config), twin(as32(params), as32(x), config)
        for one in found:
            assert_within_budget(one[f"{kind}:{i}"], ref64, ref32, f"{x.shape}")
            assert int(one[f"{kind}:{i}:dropped"]) == (~routing.kept).sum()
            assert one[f"{kind}:{i}:load"].tolist() == np.bincount(routing.experts.ravel(), minlength=14).tolist()
        assert (found[0][f"{kind}:{i}"] == found[1][f"{kind}:{i}"]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_each_process_holds_half_of_the_experts(found, kind):
    for one in found:
        mine, whole = one[f"{kind}:bytes"].tolist()
        assert whole > 0 and 2 * mine == whole


def test_a_decoder_at_once_and_by_a_cache(found):
    model = tiny_mixture()
    params = {name: np.array(x, np.float64) for name, x in tree_flatten(model.parameters())}
    tokens = np.array(some_tokens())
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
    layers = nn.Sequential(MoE(MoEConfig(211, 223, 8, bias=True)))
    mx.eval(layers.parameters())
    expected = {name: np.array(x) for name, x in tree_flatten(layers.parameters())}
    gc.collect()  # what other tests left would be freed while this one measures
    before, held = mx.get_active_memory(), expert_bytes(layers)
    spread(layers, Seat(rank, 4))
    assert abs(before - mx.get_active_memory() - held * 3 / 4) < held / 100
    for name, x in tree_flatten(layers.parameters()):
        part = slice(2 * rank, 2 * rank + 2) if ".experts." in name else slice(None)
        assert (np.array(x) == expected[name][part]).all(), name


def test_weights_still_on_the_disk_are_never_all_in_memory(tmp_path):
    layers = nn.Sequential(*(MoE(MoEConfig(101, 103, 8)) for _ in range(5)))
    layers.save_weights(str(tmp_path / "weights.safetensors"))
    whole = expert_bytes(layers)
    layers.load_weights(str(tmp_path / "weights.safetensors"))
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    spread(layers, Seat(3, 4))
    one = whole / 5 / 3  # a tensor of a layer
    assert mx.get_peak_memory() - before < whole / 4 + 2 * one


def test_a_process_on_its_own_has_all_experts():
    moe, params = mixture("overflow")
    layers = nn.Sequential(moe)
    spread(layers, mx.distributed.init())  # outside of a launch, a group of one
    x, config = inputs("overflow")[0], mixture_config("overflow")
    y, _ = layers(mx.array(as32(x)))
    assert_within_budget(y, twin(params, x, config)[0], twin(as32(params), as32(x), config)[0])
    assert not tree_flatten(layers.trainable_parameters())


@pytest.mark.parametrize("kind", [mx.float16, mx.bfloat16])
def test_half_precisions_stay(kind):
    layers = nn.Sequential(mixture("top-3")[0])
    layers.set_dtype(kind)
    spread(layers, mx.distributed.init())
    assert layers(mx.zeros((2, 3, D), kind))[0].dtype == kind


def test_what_cannot_be_spread():
    several = nn.Sequential(*(MoE(MoEConfig(D, H, count)) for count in (8, 6, 8)))
    before = {name: x.shape for name, x in tree_flatten(several.parameters())}
    with pytest.raises(ValueError, match="num_experts must be a multiple of the number of processes, 4, got 6"):
        spread(several, Seat(1, 4))
    assert {name: x.shape for name, x in tree_flatten(several.parameters())} == before
    decoder = tiny_mixture()
    with pytest.raises(ValueError, match="model must have layers that are a MoE, got a Linear without"):
        spread(nn.Linear(3, 2), Seat(0, 2))
    spread(decoder, Seat(0, 2))
    with pytest.raises(ValueError, match="moe must have all its experts, got one that is spread already"):
        spread(decoder, Seat(0, 2))
    with pytest.raises(ValueError, match="number of processes, 3, got 14"):
        SpreadMoE(mixture("top-1")[0], Seat(0, 3))


@pytest.mark.slow
def test_the_example_says_what_one_process_says(tmp_path):
    model = language_model(tmp_path / "model", moe=DECODER)
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
    model = language_model(tmp_path / "model", moe=DECODER | {"num_experts": 7})
    answers = side_by_side(tmp_path, sys.executable, EXAMPLE, model, "hello")
    reason = "num_experts must be a multiple of the number of processes, 2, got 7"
    assert answers == [(1, "", f"expert_parallel.py: {reason}\n")] * 2
