"""Decoders against transformers: the folder that it saves, converted, and the folder that leads back, read by it."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from support.harness import assert_within_budget, same_tensors
from support.oracle import Oracle

from mlx_xformer.converters.conversion import convert
from mlx_xformer.converters.families.causal_lm import ABSENT, config, original
from mlx_xformer.converters.formats.source import read_source
from mlx_xformer.models.causal_lm.model import CausalLM, CausalLMConfig, auxiliary_loss
from mlx_xformer.models.families import load_model
from mlx_xformer.storage.checkpoint import read_checkpoint

pytestmark = pytest.mark.torch

COMMON = {
    "vocab_size": 31,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 29,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
GEMMA = {"sliding_window": 5, "query_pre_attn_scalar": 17}
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
MIXTURES = {
    "mixtral": {"model_type": "mixtral", "num_local_experts": 5, "router_aux_loss_coef": 0.02},
    "mixtral, windows": {"model_type": "mixtral", "num_local_experts": 3, "sliding_window": 5},
    "qwen2 moe": {
        "model_type": "qwen2_moe",
        **{"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 13, "mlp_only_layers": [1]},
        "shared_expert_intermediate_size": 17,
    },
    "qwen2 moe, windows": {
        "model_type": "qwen2_moe",
        **{"num_experts": 5, "num_experts_per_tok": 1, "moe_intermediate_size": 13, "norm_topk_prob": True},
        **{"shared_expert_intermediate_size": 11, "qkv_bias": False, "use_sliding_window": True, "sliding_window": 5},
        "max_window_layers": 2,
    },
    "qwen3 moe": {
        "model_type": "qwen3_moe",
        **{"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 13, "norm_topk_prob": True},
        **{"decoder_sparse_step": 2, "attention_bias": True},
    },
    "qwen3 moe, windows": {
        "model_type": "qwen3_moe",
        **{"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 11},
        **{"use_sliding_window": True, "sliding_window": 5},
    },
    "olmoe": {"model_type": "olmoe", "num_experts": 5, "num_experts_per_tok": 3, "head_dim": 4},
    "olmoe, biases": {
        "model_type": "olmoe",
        **{"num_experts": 3, "num_experts_per_tok": 2, "head_dim": 4, "attention_bias": True, "norm_topk_prob": True},
    },
}
MODELS = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "llama, biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 6},
    "llama 3.1": {"model_type": "llama", "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16}},
    "llama, yarn": {"model_type": "llama", "rope_parameters": YARN},
    "llama, yarn in full": {
        "model_type": "llama",
        "rope_parameters": {
            **YARN,
            "beta_fast": 8.0,
            "beta_slow": 0.5,
            "mscale": 0.9,
            "mscale_all_dim": 0.3,
            "truncate": False,
        },
    },
    "llama, linear": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    },
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", "head_dim": 4},
    "qwen2, windows": {
        "model_type": "qwen2",
        "head_dim": 4,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "attention_bias": True},
    **MIXTURES,
    "gemma 2": {"model_type": "gemma2", **GEMMA, "attn_logit_softcapping": 1.3, "final_logit_softcapping": 0.7},
    "gemma 3": {"model_type": "gemma3_text", **GEMMA, "layer_types": LAYERS},
}
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 41))


@pytest.fixture(scope="module")
def oracle():
    with Oracle() as oracle:
        yield oracle


@pytest.mark.parametrize("name", MODELS)
def test_logits(oracle, tmp_path, name):
    """Both ways: ours of their folder, and theirs of ours, whose config.json is written anew."""
    oracle.call("language_make", values={**COMMON, **MODELS[name]}, folder=str(tmp_path / "hf"), seed=1)
    given = {"positions": None, "dtypes": ["float32", "float64"]}
    theirs = oracle.call("language_logits", {"tokens": TOKENS}, folder=str(tmp_path / "hf"), **given)
    convert(tmp_path / "hf", tmp_path / "mlx")
    model = load_model(tmp_path / "mlx")
    assert isinstance(model, CausalLM)
    assert_within_budget(model(mx.array(TOKENS)), theirs["float64"], theirs["float32"])
    caches = model.make_caches()
    parts = [model(mx.array(TOKENS[:, a : a + 7]), caches=caches) for a in range(0, 41, 7)]
    assert_within_budget(mx.concatenate(parts, axis=1), theirs["float64"], theirs["float32"], "cached")

    checkpoint = read_checkpoint(tmp_path / "mlx")
    (tmp_path / "mlx/config.json").write_text(
        (tmp_path / "mlx/config.json").read_text().replace('"original": {', '"before": {')
    )
    convert(tmp_path / "mlx", tmp_path / "back", to="pytorch")
    assert original(CausalLMConfig.from_dict(checkpoint.config))
    again = oracle.call("language_logits", {"tokens": TOKENS}, folder=str(tmp_path / "back"), **given)
    assert (again["float64"] == theirs["float64"]).all() or np.abs(again["float64"] - theirs["float64"]).max() < 1e-12


@pytest.mark.parametrize("name", ["mixtral", "qwen2 moe", "qwen3 moe", "olmoe"])
def test_routing(oracle, tmp_path, name):
    """Experts fused as transformers has them: the logits of routers, their choices, and the loss. Of one layer ours is
    router_aux_loss_coef times theirs, which counts all k choices of a token too: k where all is uniform. Theirs of all
    layers is that of their tokens together, ours the sum of what each gives."""
    oracle.call("language_make", values={**COMMON, **MIXTURES[name]}, folder=str(tmp_path / "hf"), seed=1, fused=True)
    theirs = oracle.call("language_routing", {"tokens": TOKENS}, folder=str(tmp_path / "hf"))
    convert(tmp_path / "hf", tmp_path / "mlx")
    model = load_model(tmp_path / "mlx")
    assert isinstance(model, CausalLM) and model.config.moe is not None
    moe, routings = model.config.moe, []
    model(mx.array(TOKENS), routings=routings)
    assert len(routings) == len(theirs["logits"]) == len(model.model.layers) - len(model.config.dense_layers)
    for routing, logits, loss in zip(routings, theirs["logits"], theirs["each"], strict=True):
        assert np.abs(np.array(routing.logits) - logits).max() < 1e-5 * np.abs(logits).max()
        best = np.argsort(-logits, axis=-1)[:, : moe.num_experts_per_tok]
        assert (np.sort(np.array(routing.experts)) == np.sort(best)).all()
        assert routing.loss.item() == pytest.approx(moe.alpha * loss, rel=1e-5)
    share = np.mean([np.array(routing.load) / TOKENS.size for routing in routings], axis=0)
    chance = np.mean([np.array(routing.probabilities.mean(axis=0)) for routing in routings], axis=0)
    assert moe.num_experts * (share * chance).sum() == pytest.approx(theirs["all"], rel=1e-5)
    assert auxiliary_loss(routings).item() == pytest.approx(moe.alpha * theirs["each"].sum(), rel=1e-5)
    convert(tmp_path / "mlx", tmp_path / "back", to="pytorch")
    same_tensors(*(read_source(tmp_path / side / "model.safetensors").tensors for side in ("back", "hf")))


HEADS = {"gemma2": 4, "gemma3_text": 4, "mistral": 8, "mixtral": 8}


@pytest.mark.parametrize("kind", [*ABSENT])
def test_absent_keys(oracle, tmp_path, kind):
    """A config.json with nothing but sizes means what transformers writes of it in full, and gives its logits."""
    sizes = {key: COMMON[key] for key in ("vocab_size", "intermediate_size", "pad_token_id")}
    sizes |= {"hidden_size": 64, "num_hidden_layers": 7, "num_attention_heads": HEADS.get(kind, 32)}
    values = {"model_type": kind, **sizes}
    oracle.call("language_make", values=values, folder=str(tmp_path / "hf"), seed=2)
    full = json.loads((tmp_path / "hf/config.json").read_text())
    assert full.keys() >= {"rms_norm_eps", "rope_parameters", "max_position_embeddings", "num_key_value_heads"}
    assert config(values) == config(full)
    (tmp_path / "hf/config.json").write_text(json.dumps({**values, "architectures": full["architectures"]}))
    given = {"positions": None, "dtypes": ["float32", "float64"], "folder": str(tmp_path / "hf")}
    theirs = oracle.call("language_logits", {"tokens": TOKENS}, **given)
    convert(tmp_path / "hf", tmp_path / "mlx")
    model = load_model(tmp_path / "mlx")
    assert_within_budget(model(mx.array(TOKENS)), theirs["float64"], theirs["float32"])


def test_gemma_3_270m(oracle, tmp_path):
    """The tensors that gguf makes of a real model, on a text that goes beyond its window of 512 and repeats itself."""
    text = (Path(__file__).parents[2] / "LICENSE").read_text() * 3
    told = oracle.call("gemma", folder=str(tmp_path / "hf"), text=text)
    tokens = told["tokens"][:, :620]
    assert told.values["layers"].count("full_attention") == 3 and tokens.shape == (1, 620)
    positions = [0, 96, 300, 510, 511, 512, 513, 600, 619]
    given = {"positions": positions, "dtypes": ["float32"], "folder": str(tmp_path / "hf")}
    theirs = oracle.call("language_logits", {"tokens": tokens}, **given)["float32"]
    convert(tmp_path / "hf", tmp_path / "mlx")
    model = load_model(tmp_path / "mlx")
    assert isinstance(model, CausalLM) and model.config.local_rope_theta == 1e4
    whole = model.model(model.embed(mx.array(tokens)))
    caches = model.make_caches()
    parts = [model.model(model.embed(mx.array(tokens[:, a : a + 200])), caches) for a in range(0, 620, 200)]
    for name, x in {"at once": whole, "cached": mx.concatenate(parts, axis=1)}.items():
        logits = np.array(model.logits(x[:, mx.array(positions)]))
        error = np.abs(logits - theirs).max()
        print(f"\n{name}: logits to {np.abs(theirs).max():.1f}, error {error:.2g}", end=" ")
        assert error < 1e-3 and (logits.argmax(-1) == theirs.argmax(-1)).all()
    assert (theirs.argmax(-1)[0, 6:8] == tokens[0, [514, 601]]).all()  # it has noticed the repetition
