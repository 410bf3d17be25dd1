"""Decoders with mixtures of experts: where tokens went, capacity, caches, packed matrices; see test_decoder too."""

import dataclasses
import json
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from support.harness import as32, assert_within_budget, draw
from support.text import TOKENS, WIDE, language_model, tiny_causal_lm
from support.text import causal_lm_config as config
from support.text import causal_lm_truths as truths
from support.text import drawn_causal_lm as drawn

from mlx_xformer.cli import main
from mlx_xformer.models.causal_lm.model import CausalLM, CausalLMConfig, Quantization, auxiliary_loss, quantize
from mlx_xformer.models.families import load_model
from mlx_xformer.nn.moe import MoE
from mlx_xformer.parity.families.causal_lm import floats
from mlx_xformer.reference.models.causal_lm import decoder as twin
from mlx_xformer.text.generation import batch_generate, generate
from mlx_xformer.text.tokenizer import Tokenizer

KINDS = ["mixtral", "qwen2 moe", "qwen3 moe", "olmoe"]


def capped(name, capacity, seed=0, **changes):
    """A model whose experts take so many tokens."""
    own = config(name)
    own = dataclasses.replace(own, moe=dataclasses.replace(own.moe, capacity=capacity, **changes))
    model = CausalLM(own)
    return model, draw(model, seed)


# Where tokens went


@pytest.mark.parametrize("name", KINDS)
def test_routings(name):
    """One for each mixture, of all tokens, with the logits of the twin; without a list the logits are the same."""
    model, params = drawn(name)
    own, routings = model.config, []
    logits = model(mx.array(TOKENS), routings=routings, last=2)
    assert (np.array(logits) == np.array(model(mx.array(TOKENS), last=2))).all()
    mixtures = [index for index in range(own.num_layers) if index not in own.dense_layers]
    assert len(routings) == len(mixtures) and [isinstance(b.mlp, MoE) for b in model.model.layers].count(True) == len(
        mixtures
    )
    expected, single = [], []
    twin(params, own, TOKENS, routings=expected)
    twin(as32(params), own, TOKENS, routings=single)
    for routing, truth, near in zip(routings, expected, single, strict=True):
        assert_within_budget(routing.logits, truth.logits, near.logits)
        assert (np.sort(np.array(routing.experts)) == np.sort(truth.experts)).all()


def test_the_loss_of_all_mixtures():
    model, _ = drawn("qwen2 moe")
    routings = []
    model(mx.array(TOKENS), routings=routings)
    total = auxiliary_loss(routings).item()
    assert total == pytest.approx(sum(routing.loss.item() for routing in routings)) and total > 0
    assert auxiliary_loss([]).item() == 0

    def loss(model):
        kept = []
        model(mx.array(TOKENS), routings=kept)
        return auxiliary_loss(kept)

    _, gradients = nn.value_and_grad(model, loss)(model)
    layers = gradients["model"]["layers"]
    for index in (0, 2):
        assert mx.abs(layers[index]["mlp"]["router"]["weight"]).max().item() > 1e-6
    assert mx.abs(layers[2]["mlp"]["experts"]["down_proj"]["weight"]).max().item() == 0  # nothing comes after it


# Capacity


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("chunks", [(11,), (1,) * 11, (4, 1, 1, 5), (2, 9)])
def test_caches_change_nothing_where_nothing_overflows(name, chunks):
    """An expert that has room for all tokens of a call; without a capacity see test_decoder."""
    model, params = capped(name, TOKENS.size)
    uncapped = dataclasses.replace(model.config, moe=dataclasses.replace(model.config.moe, capacity=None))
    caches, routings = model.make_caches(), []
    parts = [
        model(mx.array(TOKENS[:, a:b]), caches=caches, routings=routings)
        for a, b in pairwise(np.cumsum([0, *chunks]).tolist())
    ]
    assert_within_budget(mx.concatenate(parts, axis=1), *truths(params, uncapped))
    assert all(routing.dropped.item() == 0 for routing in routings)


@pytest.mark.parametrize("overflow", ["drop", "expert"])
def test_a_capacity_makes_outputs_depend_on_the_batch(overflow):
    """A row gives something else beside another, and something else token by token; what comes later changes
    nothing before it in a row of its own, as the first tokens are taken first."""
    model, _ = capped("mixtral", 1.0, overflow=overflow)
    routings = []
    beside = np.array(model(mx.array(TOKENS), routings=routings))[1]
    alone = np.array(model(mx.array(TOKENS[1:])))[0]
    assert all(routing.dropped.item() > 0 for routing in routings) and np.abs(beside - alone).max() > 1e-3
    caches = model.make_caches()
    steps = [model(mx.array(TOKENS[1:, a : a + 1]), caches=caches) for a in range(11)]
    assert np.abs(np.array(mx.concatenate(steps, axis=1))[0] - alone).max() > 1e-3
    first, _ = capped("mixtral", 3, overflow=overflow)  # a count, which the length does not change
    whole, part = np.array(first(mx.array(TOKENS[1:]))), np.array(first(mx.array(TOKENS[1:, :7])))
    np.testing.assert_allclose(whole[:, :7], part, atol=1e-5)


@pytest.mark.parametrize("overflow", ["drop", "expert"])
@pytest.mark.parametrize("capacity", [0, 3, 0.75])
def test_what_overflows_is_the_twin_s(capacity, overflow):
    model, params = capped("mixtral", capacity, overflow=overflow)
    routings, expected = [], []
    logits = model(mx.array(TOKENS), routings=routings)
    assert_within_budget(logits, *truths(params, model.config))
    twin(params, model.config, TOKENS, routings=expected)
    assert [r.dropped.item() for r in routings] == [int((~r.kept).sum()) for r in expected]


# Generation


def test_generation(tmp_path, capsys):
    """Token by token, with a draft, in a batch and by the command: what a pass over all tokens says comes next."""
    moe = {"embed_dim": 40, "hidden_dim": 23, "num_experts": 5, "num_experts_per_tok": 2, "renormalize": True}
    model, prompt = tiny_causal_lm(moe=moe), list(b"hello")
    expected = list(prompt)
    for _ in range(20):
        expected.append(int(model(mx.array([expected]), last=1)[0, -1].argmax().item()))
    assert [token.id for token in generate(model, prompt, max_tokens=20)] == expected[5:]
    drafted = generate(model, prompt, max_tokens=20, draft=model, caches=model.make_caches(slack=4))
    assert [token.id for token in drafted] == expected[5:]
    assert batch_generate(model, [prompt, prompt[2:]], max_tokens=20)[0] == expected[5:]
    folder = language_model(tmp_path / "mlx", moe=moe)
    assert main(["generate", str(folder), "hello", "--max-tokens", "20", "--json"]) == 0
    tokenizer = Tokenizer(folder)
    steps = generate(load_model(folder), tokenizer.encode("hello"), max_tokens=20, tokenizer=tokenizer)
    assert json.loads(capsys.readouterr().out)["text"] == "".join(token.text for token in steps)


# Packed matrices


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", KINDS)
def test_packed_experts_are_their_dequantised_values(name, bits):
    """Routers stay floats, unless they are named."""
    changes = {**WIDE, "head_dim": 64 if name == "olmoe" else 32, "num_heads": 2 if name != "olmoe" else 1}
    own = config(name, **{**changes, "embed_dim": 64})
    own = dataclasses.replace(own, moe=dataclasses.replace(
        own.moe, hidden_dim=32, shared_dim=96 if own.moe.shared_dim else 0))  # fmt: skip
    for layers in ({}, {"model.layers.0.mlp.router": (8, 64), "model.layers.0.mlp.experts.up_proj": None}):
        quantization = Quantization(bits, 32, layers)
        model = CausalLM(own)
        draw(model, 0)
        quantize(model, quantization)
        mixture = model.model.layers[0].mlp
        assert ("scales" in mixture.router) == bool(layers) and ("scales" in mixture.experts.up_proj) != bool(layers)
        assert "scales" in mixture.experts.down_proj
        assert mixture.experts.down_proj.scales.shape == (own.moe.num_experts, 64, 1)
        if own.moe.shared_gate:
            assert "scales" in mixture.shared_expert.gate_proj and "scales" not in mixture.shared_expert_gate
        shapes = [
            {n: x.shape for n, x in nn.utils.tree_flatten(m.parameters())}
            for m in (model, CausalLM(dataclasses.replace(own, quantization=quantization)))
        ]
        assert shapes[0] == shapes[1]
        params = {n: x.astype(np.float64) for n, x in floats(model).items()}
        for tokens in (TOKENS, TOKENS[:1, :1]):  # many rows go another way than one
            assert_within_budget(model(mx.array(tokens)), *truths(params, own, tokens))


# What is refused


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dense_layers": (2,)}, "dense_layers must be different numbers below num_layers, 2, got"),
        ({"dense_layers": (1, 1)}, r"dense_layers must be different numbers below num_layers, 2, got \(1, 1\)"),
        ({"dense_layers": 1}, "dense_layers must be different numbers below num_layers, 2, got 1"),
        ({"dense_layers": None}, "dense_layers must be different numbers below num_layers, 2, got None"),
        ({"dense_layers": (True,)}, "dense_layers must be different numbers"),
        ({"dense_layers": (0,), "moe": None}, r"dense_layers must be empty without a moe, got \(0,\)"),
        ({"embed_dim": 29}, "embed_dim of the moe must be the model's, 29, got 23"),
        ({"moe": {"hidden_dim": 3}}, "moe must be a MoEConfig, got a dict"),
        ({"qk_norm": "each"}, "qk_norm must be true, false or \"whole\", got 'each'"),
        ({"qk_norm": "whole", "norm_plus_one": True}, 'norm_plus_one must be false with qk_norm "whole", got true'),
    ],
)
def test_configurations_that_are_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        dataclasses.replace(config("mixtral"), **changes)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("num_experts", 10**5, "num_experts must be a whole number from 1 to 10000, got 100000"),
        ("hidden_dim", 10**8, "hidden_dim must be a whole number from 1 to 10000000, got 100000000"),
        ("shared_dim", 10**8, "shared_dim must be a whole number from 0 to 10000000, got 100000000"),
    ],
)
def test_sizes_beyond_any_model(name, value, reason):
    own = config("mixtral")
    with pytest.raises(ValueError, match=reason):
        dataclasses.replace(own, moe=dataclasses.replace(own.moe, **{name: value}))


def test_plain_values_of_a_mixture():
    values = json.loads(json.dumps(config("qwen2 moe").to_dict()))
    assert CausalLMConfig.from_dict(values) == config("qwen2 moe")
    for change, reason in (
        ({"colour": 1}, "moe has no option named colour"),
        ({"num_experts": None}, "num_experts must be a whole number from 1 to 10000, got None"),
        ({"num_experts_per_tok": 8}, "num_experts_per_tok must be at most num_experts, 7, got 8"),
    ):
        with pytest.raises(ValueError, match=reason):
            CausalLMConfig.from_dict({**values, "moe": {**values["moe"], **change}})
    with pytest.raises(ValueError, match="moe must be given hidden_dim"):
        CausalLMConfig.from_dict({**values, "moe": {n: x for n, x in values["moe"].items() if n != "hidden_dim"}})
