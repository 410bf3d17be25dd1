"""Conversions of language models: names, bits, shards, packed matrices, GGUF, there and back; and what is refused."""

import dataclasses
import json
import os
import subprocess
import sys
from functools import partial
from operator import attrgetter

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support.harness import same_tensors
from support.text import ARCHITECTURES, check_logits, state_of, write_folder
from support.text import FOLDER_TOKENS as TOKENS
from support.text import HF_SIZES as SIZES
from support.text import MEMORY_CHILD as CHILD
from support.text import assert_refused as refused
from support.text import causal_lm_config as config
from support.text import convert_names as ours
from support.text import edit_config as edited
from support.text import read_tensors as tensors
from support.text import tensor_counts as written

from mlx_xformer import cli
from mlx_xformer.converters.conversion import convert
from mlx_xformer.converters.families import causal_lm as names
from mlx_xformer.converters.families import causal_lm_gguf as gguf
from mlx_xformer.converters.layouts import Pairs
from mlx_xformer.converters.rules import apply_rules, inverse_shapes, invert
from mlx_xformer.models.causal_lm.model import CausalLM, Quantization
from mlx_xformer.models.families import load_model, parameter_shapes
from mlx_xformer.nn.moe import MoEConfig
from mlx_xformer.pretrained import loading
from mlx_xformer.storage.checkpoint import read_checkpoint

WIDE = {"embed_dim": 64, "hidden_dim": 96, "head_dim": 32, "num_heads": 2, "num_kv_heads": 1, "vocab_size": 37}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_there_and_back(tmp_path, name, dtype):
    own = config(name)
    state = write_folder(tmp_path / "hf", own, dtype=dtype, torch_dtype="float16")
    report = convert(tmp_path / "hf", tmp_path / "mlx")
    assert report.family == "causal_lm" and report.parameters == sum(x.size for x in state.values())
    checkpoint = read_checkpoint(tmp_path / "mlx")
    again = type(own).from_dict(checkpoint.config)
    assert dataclasses.replace(again, attention_scale=own.attention_scale) == own
    assert {n: x.dtype for n, x in checkpoint.weights.items()} == dict.fromkeys(
        checkpoint.weights, mx.float32 if dtype == np.float32 else mx.float16
    )
    if dtype == np.float32:
        check_logits(tmp_path / "mlx", ours(own, state), own)
    convert(tmp_path / "mlx", tmp_path / "back", to="pytorch")
    same_tensors(tensors(tmp_path / "back"), tensors(tmp_path / "hf"))
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads(
        (tmp_path / "hf/config.json").read_text()
    )
    convert(tmp_path / "back", tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "mlx/model.safetensors").read_bytes()


def test_bfloat16_keeps_its_bits(tmp_path):
    own = config("llama")
    state = {name: mx.array(x).astype(mx.bfloat16) for name, x in state_of(own).items()}
    write_folder(tmp_path / "hf", own)
    mx.save_safetensors(str(tmp_path / "hf/model.safetensors"), state, {"format": "pt"})
    convert(tmp_path / "hf", tmp_path / "mlx")
    convert(tmp_path / "mlx", tmp_path / "back", to="pytorch")
    same_tensors(tensors(tmp_path / "back"), state)
    assert load_model(tmp_path / "mlx")(mx.array(TOKENS)).dtype == mx.bfloat16
    convert(tmp_path / "hf", tmp_path / "float", dtype="float32")
    assert load_model(tmp_path / "float")(mx.array(TOKENS)).dtype == mx.float32


def test_progress(tmp_path):
    """Told before every tensor, of those that are written (three for a packed matrix), and at the end."""
    write_folder(tmp_path / "hf", config("llama", **WIDE))
    told = []
    report = convert(tmp_path / "hf", tmp_path / "mlx", quantize=8, group_size=32, progress=lambda *x: told.append(x))
    total = len(read_checkpoint(tmp_path / "mlx").weights)
    assert told == [(done, total) for done in range(total + 1)] and report.written and total > 20


@pytest.mark.parametrize("name", ["llama", "gemma 3"])
def test_shards(tmp_path, name):
    own = config(name)
    state = write_folder(tmp_path / "hf", own, shards=3)
    convert(tmp_path / "hf", tmp_path / "mlx")
    check_logits(tmp_path / "mlx", ours(own, state), own)
    convert(tmp_path / "mlx", tmp_path / "back", to="pytorch")
    same_tensors(tensors(tmp_path / "back"), {name: mx.array(x) for name, x in state.items()})


def test_ties(tmp_path):
    """The table may be under either name, or under both, where the head is dropped."""
    own = config("qwen2")
    state = write_folder(tmp_path / "hf", own)
    table = state["model.embed_tokens.weight"]
    for kind, tied in {
        "head": {n.replace("model.embed_tokens", "lm_head"): x for n, x in state.items()},
        "both": {**state, "lm_head.weight": table.copy()},
    }.items():
        write_folder(tmp_path / kind, own)
        save_file(tied, tmp_path / kind / "model.safetensors", {"format": "pt"})
        convert(tmp_path / kind, tmp_path / f"{kind}-mlx")
        check_logits(tmp_path / f"{kind}-mlx", ours(own, state), own)
        convert(tmp_path / f"{kind}-mlx", tmp_path / f"{kind}-back", to="pytorch")
        back = load_file(tmp_path / f"{kind}-back/model.safetensors")
        assert back.keys() == (tied if kind == "head" else state).keys()


def test_what_goes_along(tmp_path):
    write_folder(tmp_path / "hf", config("llama"))
    kept = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    for name in (*kept, "training_args.bin", "README.md"):
        (tmp_path / "hf" / name).write_text(name)
    report = convert(tmp_path / "hf", tmp_path / "mlx")
    kept += ("generation_config.json",)
    assert set(report.files) == {"config.json", "model.safetensors", *kept}
    assert {p.name for p in (tmp_path / "mlx").iterdir()} == set(report.files)
    assert json.loads((tmp_path / "mlx/generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}
    convert(tmp_path / "hf", tmp_path / "mlx")  # a checkpoint with these files is replaced
    assert convert(tmp_path / "mlx", tmp_path / "back", to="pytorch").files == (
        *report.files[:2],
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
        "chat_template.jinja",
    )
    for name in kept[:4]:
        assert (tmp_path / "back" / name).read_text() == name


def header(path):
    """The metadata of a safetensors file."""
    with safe_open(path, framework="numpy") as file:
        return file.metadata()


def test_the_metadata_of_the_tensors_goes_along(tmp_path):
    """What safetensors.save_model writes of a tie; "format" is that of what is written."""
    told = {"format": "pt", "lm_head.weight": "model.embed_tokens.weight"}
    for name, given, back in (
        ("tied", told, told),
        ("plain", None, {"format": "pt"}),
        ("mlx", {"format": "mlx"}, {"format": "pt"}),
    ):
        state = write_folder(tmp_path / name, config("qwen2"))
        save_file(state, tmp_path / name / "model.safetensors", given)
        convert(tmp_path / name, tmp_path / f"{name}-mlx")
        convert(tmp_path / f"{name}-mlx", tmp_path / f"{name}-back", to="pytorch")
        assert header(tmp_path / f"{name}-back/model.safetensors") == back
        assert header(tmp_path / f"{name}-mlx/model.safetensors") == {"format": "mlx"}


def test_tensors_that_mlx_has_saved(tmp_path):
    """Without metadata, for which MLX writes null."""
    state = write_folder(tmp_path / "hf", config("qwen2"))
    path = tmp_path / "hf/model.safetensors"
    mx.save_safetensors(str(path), {name: mx.array(x) for name, x in state.items()})
    assert b'"__metadata__":null' in path.read_bytes()
    assert convert(tmp_path / "hf", tmp_path / "mlx").parameters == sum(x.size for x in state.values())


def test_a_configuration_without_its_original(tmp_path):
    """What was edited, or has no original, leads back to a config.json that means the same."""
    for name in ARCHITECTURES:
        own = config(name)
        assert names._alike(names.config(names.original(own)), own)
    write_folder(tmp_path / "hf", config("mistral"))
    convert(tmp_path / "hf", tmp_path / "mlx")
    content = json.loads((tmp_path / "mlx/config.json").read_text())
    content["config"]["window"] = 7
    (tmp_path / "mlx/config.json").write_text(json.dumps(content))
    convert(tmp_path / "mlx", tmp_path / "back", to="pytorch")
    assert json.loads((tmp_path / "back/config.json").read_text())["sliding_window"] == 7
    with pytest.raises(ValueError, match="no architecture of Hugging Face has this configuration"):
        names.original(config("llama", qk_norm=True, attention_bias=("v",)))


_ABSENT = {"norm_eps": 1e-6, "rope_theta": 1e4, "rope_scaling": None, "attention_bias": (), "activation": "silu",
           "mlp_bias": False, "tie_embeddings": False, "window": None, "layer_types": None, "local_rope_theta": None,
           "attention_softcap": None, "logit_softcap": None, "attention_scale": None}  # fmt: skip


_GEMMA = {"tie_embeddings": True, "activation": "gelu_tanh", "window": 4096, "attention_scale": 1 / 16,
          "embed_scale": 8.0, "num_kv_heads": 4, "head_dim": 256}  # fmt: skip


ABSENT = {
    "llama": {"num_kv_heads": 32, "head_dim": 2},
    "mistral": {"num_kv_heads": 8, "head_dim": 2, "window": 4096},
    "qwen2": {"num_kv_heads": 32, "head_dim": 2, "attention_bias": ("q", "k", "v")},
    "qwen3": {"num_kv_heads": 32, "head_dim": 128, "qk_norm": True},
    "mixtral": {"num_kv_heads": 8, "head_dim": 2, "norm_eps": 1e-5, "rope_theta": 1e6, "qk_norm": False,
                "moe": MoEConfig(64, 29, 8, 2, renormalize=True, alpha=0.001), "dense_layers": ()},
    "qwen2_moe": {"num_kv_heads": 16, "head_dim": 2, "attention_bias": ("q", "k", "v"), "moe": MoEConfig(
        64, 1408, 60, 4, renormalize=False, alpha=0.001, shared_dim=5632, shared_gate=True), "dense_layers": ()},
    "qwen3_moe": {"num_kv_heads": 4, "head_dim": 2, "qk_norm": True, "dense_layers": (),
                  "moe": MoEConfig(64, 768, 128, 8, renormalize=False, alpha=0.001)},
    "olmoe": {"num_kv_heads": 32, "head_dim": 2, "norm_eps": 1e-5, "qk_norm": "whole",
              "moe": MoEConfig(64, 29, 64, 8, renormalize=False, alpha=0.01), "dense_layers": ()},
    "gemma2": {**_GEMMA, "attention_softcap": 50.0, "logit_softcap": 30.0, "layer_types": ("local", "global") * 3 +
               ("local",)},
    "gemma3_text": {**_GEMMA, "rope_theta": 1e6, "local_rope_theta": 1e4, "qk_norm": True,
                    "layer_types": ("local",) * 5 + ("global", "local")},
}  # fmt: skip


@pytest.mark.parametrize("kind", ABSENT)
def test_absent_keys(kind):
    """What transformers 5.23 takes where config.json says nothing, see test_torch_decoder."""
    own = names.config({"model_type": kind, **SIZES})
    for field, value in {**_ABSENT, **ABSENT[kind]}.items():
        assert getattr(own, field) == value, field


@pytest.mark.parametrize(
    ("kind", "values", "wanted"),
    [
        ("mistral", {"sliding_window": None}, {"window": None}),
        ("mistral", {"layer_types": ["sliding_attention"] * 7}, {"window": 4096, "layer_types": ("local",) * 7}),
        ("gemma2", {"attn_logit_softcapping": None}, {"attention_softcap": None, "logit_softcap": 30.0}),
        ("gemma2", {"final_logit_softcapping": None}, {"attention_softcap": 50.0, "logit_softcap": None}),
        ("gemma2", {"hidden_act": "silu"}, {"activation": "gelu_tanh"}),
        ("gemma2", {"rope_local_base_freq": 7.0}, {"local_rope_theta": None}),
        ("gemma3_text", {"sliding_window": None, "layer_types": ["full_attention"] * 7}, {"window": None}),
        ("gemma3_text", {"sliding_window_pattern": 7}, {"layer_types": ("local",) * 6 + ("global",)}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 7}, {"window": 4096, "layer_types": ("global",) *
                                                                         7}),
        ("llama", {"rope_scaling": {"rope_type": "default", "rope_theta": 7.0}}, {"rope_theta": 7.0}),
        ("mixtral", {"rope_parameters": {"rope_type": "default"}}, {"rope_theta": 1e6}),
        ("mixtral", {"sliding_window": 5}, {"window": 5, "layer_types": None}),
        ("mixtral", {"num_experts": 3, "num_key_value_heads": None}, {"moe.num_experts": 3, "num_kv_heads": 32}),
        ("qwen3_moe", {"num_local_experts": 9, "mlp_only_layers": None}, {"moe.num_experts": 9}),
        ("qwen3_moe", {"use_sliding_window": True, "max_window_layers": 3}, {"window": 4096, "layer_types": None}),
        ("qwen3_moe", {"num_experts": 0}, {"moe": None, "dense_layers": ()}),
        ("qwen3_moe", {"mlp_only_layers": [9, 2], "decoder_sparse_step": 2}, {"dense_layers": (0, 2, 4, 6)}),
        ("qwen2_moe", {"mlp_only_layers": [*range(7)]}, {"moe": None, "dense_layers": ()}),
        ("qwen2_moe", {"qkv_bias": False, "norm_topk_prob": True}, {"attention_bias": (), "moe.renormalize": True}),
        ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 3, "sliding_window": 6},
         {"window": 6, "layer_types": ("local", "global", "local", "global", "global", "global", "global")}),
        ("olmoe", {"clip_qkv": None, "num_key_value_heads": None, "attention_bias": True},
         {"num_kv_heads": 32, "attention_bias": ("q", "k", "v", "out")}),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, {"rope_scaling.length": 2048}),
    ],
)  # fmt: skip
def test_null_is_not_absent(kind, values, wanted):
    own = names.config({"model_type": kind, **SIZES, **values})
    for field, value in wanted.items():
        assert attrgetter(field)(own) == value, field


@pytest.mark.parametrize(
    ("kind", "values", "reason"),
    [
        ("gemma2", {"sliding_window": None}, "sliding_window must be a number in a gemma2 with layers that slide"),
        ("mistral", {"layer_types": ["full_attention"] * 7}, "layer_types must be sliding_attention throughout"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping must be null in a llama, got 30.0"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping must be null in a gemma3_text"),
        ("gemma3_text", {"rope_local_base_freq": None}, "rope_local_base_freq must be a number in a gemma3_text"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 7.0}}, "must have full_attention and sliding_attention"),
        ("gemma2", {"hidden_activation": None}, "hidden_activation must be one of silu"),
        ("mixtral", {"num_experts": 4, "num_local_experts": 5}, "num_experts must be num_local_experts, 5, got 4"),
        ("mixtral", {"num_local_experts": None}, "num_experts must be a whole number from 1, got None"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok must be at most num_experts, 8, got 9"),
        ("mixtral", {"router_aux_loss_coef": None}, "router_aux_loss_coef must be a number from 0, got None"),
        ("mixtral", {"attention_bias": True}, "attention_bias must be false in a mixtral, got True"),
        ("mixtral", {"mlp_bias": True}, "mlp_bias must be false in a mixtral, got True"),
        ("mixtral", {"moe_intermediate_size": 5}, "keys that are not handled: moe_intermediate_size"),
        ("mixtral", {"norm_topk_prob": False}, "keys that are not handled: norm_topk_prob"),
        (
            "mixtral",
            {"layer_types": ["sliding_attention"] * 7},
            "layer_types must be full_attention throughout in a mix",
        ),
        (
            "mixtral",
            {"num_hidden_layers": 10**12},
            "num_hidden_layers must be a whole number from 1 to 1000, got 1000000",
        ),
        (
            "mixtral",
            {"num_local_experts": 10**12},
            "num_experts must be a whole number from 1 to 10000, got 1000000000000",
        ),
        (
            "gemma2",
            {"num_hidden_layers": 10**12},
            "num_hidden_layers must be a whole number from 1 to 1000, got 1000000",
        ),
        ("llama", {"num_experts": 4}, "keys that are not handled: num_experts"),
        ("qwen2_moe", {"num_local_experts": 60}, "keys that are not handled: num_local_experts"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size must be a whole number"),
        ("qwen2_moe", {"qkv_bias": 1}, "qkv_bias must be true or false, got 1"),
        ("qwen2_moe", {"num_key_value_heads": None}, "config.json must have num_key_value_heads"),
        (
            "qwen2_moe",
            {"use_sliding_window": True, "sliding_window": None},
            "sliding_window must be a number, and used",
        ),
        ("qwen2_moe", {"layer_types": ["sliding_attention"] * 7}, "sliding_window must be a number, and used"),
        ("qwen3_moe", {"moe_intermediate_size": None}, "moe_intermediate_size must be a whole number from 1, got None"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step must be a whole number from 1, got 0"),
        ("qwen3_moe", {"mlp_only_layers": [1.0]}, "mlp_only_layers must be numbers of layers"),
        ("qwen3_moe", {"norm_topk_prob": None}, "norm_topk_prob must be true or false, got None"),
        ("qwen3_moe", {"head_dim": None}, "head_dim must be a number or absent in a qwen3_moe, got null"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv must be null, got 8.0"),
        ("olmoe", {"head_dim": 4}, "head_dim must be hidden_size / num_attention_heads in an olmoe, got 4"),
        (
            "olmoe",
            {"head_dim": 10**12, "num_attention_heads": "8"},
            "head_dim must be hidden_size / num_attention_heads",
        ),
        ("olmoe", {"head_dim": "2" * 999}, r"in an olmoe, got 2{97}\.\.\.$"),
        ("olmoe", {"head_dim": 0}, "head_dim must be hidden_size / num_attention_heads in an olmoe, got 0"),
        ("olmoe", {"sliding_window": 5}, "sliding_window must be null in a olmoe, got 5"),
        ("qwen3", {"head_dim": None}, "config.json must have head_dim"),
        ("gemma2", {"query_pre_attn_scalar": None}, "config.json must have query_pre_attn_scalar"),
    ],
)
def test_nulls_that_make_no_model(kind, values, reason):
    with pytest.raises(ValueError, match=reason):
        names.config({"model_type": kind, **SIZES, **values})


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"rope_parameters": {"rope_type": "default", "foo": 1}}, "rope_parameters has keys .* not handled: foo"),
        ({"rope_parameters": {"foo": 1}}, "rope_parameters has keys that are not handled: foo"),
        ({"rope_scaling": {"type": "default", "foo": 1}}, "rope_scaling has keys that are not handled: foo"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling has keys that are not handled: factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "foo": 1}}, "rope_parameters has .* foo"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "not handled: partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {}, "foo": 1}}, "rope_parameters has keys .* not handled: foo"),
        ({"rope_parameters": {"full_attention": {"foo": 1}}}, "rope_parameters has keys .* not handled: foo"),
        ({"rope_parameters": {"sliding_attention": {"foo": 1}}}, "of sliding_attention has keys .* handled: foo"),
    ],
)
def test_unknown_keys_of_positions(values, reason):
    with pytest.raises(ValueError, match=reason):
        names.config({"model_type": "llama", **SIZES, **values})


def test_no_window_and_no_caps_lead_back():
    """Where null is not what an absent key means, it is written."""
    own = config("gemma 2", attention_softcap=None, logit_softcap=None, window=None, layer_types=None)
    values = names.original(own)
    assert values.keys() >= {"sliding_window", "attn_logit_softcapping", "final_logit_softcapping"}
    assert names._alike(names.config(values), own)


def test_the_report_tells_what_was_written(tmp_path):
    own = config("llama", **WIDE)
    write_folder(tmp_path / "hf", own)
    steps = [("hf", "packed", {"quantize": 4, "group_size": 32}), ("hf", "half", {"dtype": "float16"}),
             ("packed", "back", {"to": "pytorch"})]  # fmt: skip
    for source, out, given in steps:
        dry = convert(tmp_path / source, tmp_path / out, dry_run=True, **given)
        report = convert(tmp_path / source, tmp_path / out, **given)
        assert written(report) in str(report) and written(report) in str(dry)
        assert report.table() == dry.table()
    report = convert(tmp_path / "hf", tmp_path / "packed", quantize=4, group_size=32)
    assert written(report).startswith("21 (21 F32), all accounted for, become 53 (")
    layer = "model.layers.0.self_attn.q_proj"
    line = f"{layer}.weight (64, 64) F32 -> {layer}.weight (64, 8) U32, {layer}.scales (64, 2) F32, {layer}.biases"
    assert line in report.table()


def test_the_report_of_packed_matrices(tmp_path):
    """By mlx-lm: kept, packed in other bits, or made floats."""
    own = config("llama", **WIDE)
    state = write_folder(tmp_path / "hf", own, quantization={"bits": 4, "group_size": 32})
    packed = {}
    for name, x in state.items():
        layer = name.removesuffix(".weight")
        parts = mx.quantize(mx.array(x), bits=4, group_size=32) if x.ndim > 1 else (mx.array(x),)
        packed |= {f"{layer}.{leaf}": p for leaf, p in zip(("weight", "scales", "biases"), parts, strict=False)}
    mx.save_safetensors(str(tmp_path / "hf/model.safetensors"), packed, {"format": "mlx"})
    for given in ({}, {"quantize": 8, "group_size": 32}, {"quantize": 0}):
        report = convert(tmp_path / "hf", tmp_path / "mlx", **given)
        assert written(report) in str(report), given
    assert "q_proj.scales (64, 2) F32, model.layers.0.self_attn.q_proj.biases (64, 2) F32 -> " in report.table()


@pytest.mark.parametrize("name", ["llama", "gemma 3"])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantization(tmp_path, name, bits):
    own = config(name, **WIDE)
    state = write_folder(tmp_path / "hf", own)
    report = convert(tmp_path / "hf", tmp_path / "mlx", quantize=bits, group_size=32)
    assert report.parameters == sum(x.size for x in state.values())
    checkpoint = read_checkpoint(tmp_path / "mlx")
    assert checkpoint.config["quantization"] == {"bits": bits, "group_size": 32, "layers": {}}
    for wanted, x in ours(own, state).items():
        if x.ndim == 1:
            assert (np.array(checkpoint.weights[wanted]) == x).all()
            continue
        layer = wanted.removesuffix(".weight")
        packed = mx.quantize(mx.array(x.astype(np.float32)), group_size=32, bits=bits)
        for leaf, part in zip(("weight", "scales", "biases"), packed, strict=True):
            assert mx.array_equal(checkpoint.weights[f"{layer}.{leaf}"], part), (layer, leaf)
    convert(tmp_path / "mlx", tmp_path / "back", to="pytorch")  # floats, which are the packed ones' values
    back = {n: x.astype(np.float64) for n, x in load_file(tmp_path / "back/model.safetensors").items()}
    check_logits(tmp_path / "mlx", ours(own, {n: x.astype(np.float32) for n, x in back.items()}), own)


def test_rows_that_groups_do_not_divide_stay_floats(tmp_path):
    own = config("llama", **{**WIDE, "hidden_dim": 29})
    write_folder(tmp_path / "hf", own)
    convert(tmp_path / "hf", tmp_path / "mlx", quantize=4, dtype="float16")
    checkpoint = read_checkpoint(tmp_path / "mlx")
    kept = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert checkpoint.config["quantization"]["layers"] == dict.fromkeys(kept)
    assert checkpoint.weights[f"{kept[0]}.weight"].dtype == mx.float16
    assert isinstance(load_model(tmp_path / "mlx"), CausalLM)


def test_packed_by_mlx_lm(tmp_path):
    """Matrices under Hugging Face's names with scales and biases beside them, single layers packed otherwise or not."""
    own = config("llama", **WIDE)
    state = write_folder(tmp_path / "hf", own)
    params = ours(own, state)
    special = {"model.layers.0.self_attn.o_proj": {"bits": 8, "group_size": 64}, "lm_head": False}
    packed = {}
    for name, x in state.items():
        layer = name.removesuffix(".weight")
        if x.ndim == 1 or layer == "lm_head":
            packed[name] = mx.array(x)
            continue
        how = special.get(layer, {"bits": 4, "group_size": 32})
        parts = mx.quantize(mx.array(x), **how)
        packed |= {f"{layer}.{leaf}": p for leaf, p in zip(("weight", "scales", "biases"), parts, strict=True)}
        params[name.replace("o_proj", "out_proj")] = np.array(mx.dequantize(*parts, **how), np.float64)
    mx.save_safetensors(str(tmp_path / "hf/model.safetensors"), packed, {"format": "mlx"})
    content = json.loads((tmp_path / "hf/config.json").read_text())
    content["quantization"] = content["quantization_config"] = {
        "bits": 4,
        "group_size": 32,
        "mode": "affine",
        **special,
    }
    (tmp_path / "hf/config.json").write_text(json.dumps(content))
    convert(tmp_path / "hf", tmp_path / "mlx")
    quantization = Quantization(4, 32, {"model.layers.0.self_attn.out_proj": (8, 64), "lm_head": None})
    assert names.config(content).quantization == quantization
    check_logits(tmp_path / "mlx", params, own)
    convert(tmp_path / "hf", tmp_path / "floats", quantize=0)
    assert read_checkpoint(tmp_path / "floats").config["quantization"] is None
    check_logits(tmp_path / "floats", params, own)


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "lm_head": "output",
    "model.norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(path, own, architecture, **more):
    """A GGUF file as llama.cpp's converter writes it, in floats."""
    state = state_of(own)
    arrays = {}
    for name, x in state.items():
        layer, _, leaf = name.rpartition(".")
        number = layer.split(".")[2] if layer.startswith("model.layers.") else None
        short = layer if number is None else layer.removeprefix(f"model.layers.{number}.")
        turned = {"self_attn.q_proj": own.num_heads, "self_attn.k_proj": own.num_kv_heads}.get(short)
        if architecture == "llama" and turned:  # halves of a head become neighbours
            half = x.shape[0] // turned // 2
            x = x.reshape(turned, 2, half, -1).swapaxes(1, 2).reshape(x.shape)
        theirs = GGUF_NAMES[short] if number is None else f"blk.{number}.{GGUF_NAMES[short]}"
        arrays[f"{theirs}.{leaf}"] = mx.array(x)
    numbers = {
        "embedding_length": own.embed_dim,
        "block_count": own.num_layers,
        "feed_forward_length": own.hidden_dim,
        "attention.head_count": own.num_heads,
        "attention.head_count_kv": own.num_kv_heads,
        "attention.key_length": own.head_dim,
        "context_length": 512,
    }
    metadata = {f"{architecture}.{key}": mx.array(value, mx.uint32) for key, value in numbers.items()}
    metadata |= {f"{architecture}.attention.layer_norm_rms_epsilon": mx.array(own.norm_eps)}
    metadata |= {f"{architecture}.rope.freq_base": mx.array(own.rope_theta), "general.architecture": architecture}
    mx.save_gguf(str(path), arrays, {**metadata, **more})
    return state


@pytest.mark.parametrize(
    ("name", "architecture"), [("llama", "llama"), ("mistral", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")]
)
def test_gguf(tmp_path, name, architecture):
    own = config(name, window=None)
    state = write_gguf(tmp_path / "model.gguf", own, architecture)
    report = convert(tmp_path / "model.gguf", tmp_path / "mlx")
    assert any("no tokenizer.json" in line for line in report.warnings)
    assert type(own).from_dict(read_checkpoint(tmp_path / "mlx").config) == dataclasses.replace(own, dtype="float32")
    check_logits(tmp_path / "mlx", ours(own, state), own)
    convert(tmp_path, tmp_path / "again") if len(list(tmp_path.glob("*.gguf"))) == 1 else None
    convert(tmp_path / "mlx", tmp_path / "hf", to="pytorch")
    same_tensors(tensors(tmp_path / "hf"), {name: mx.array(x) for name, x in state.items()})


def test_pairs_of_rows():
    x = mx.arange(24).reshape(12, 2)
    assert Pairs(2)(x)[:, 0].tolist() == [0, 4, 8, 2, 6, 10, 12, 16, 20, 14, 18, 22]
    assert mx.array_equal(Pairs(2).inverse()(Pairs(2)(x)), x)
    with pytest.raises(ValueError, match="must have an even number of rows for each of 4 heads"):
        Pairs(4)(x)
    own = config("llama")
    table = gguf.rules(own)
    shapes = parameter_shapes("causal_lm", own.to_dict())
    back = apply_rules(invert(table), {n: mx.zeros(s) for n, s in shapes.items()}, inverse_shapes(table, shapes))
    assert "blk.1.attn_q.weight" in back


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"general.architecture": "gemma3"}, "general.architecture must be one of llama, qwen2, qwen3, got gemma3"),
        ({"llama.expert_count": mx.array(8)}, "llama.expert_count must be absent, got 8: mixtures of experts are read"),
        ({"general.architecture": "qwen3moe", "qwen3moe.expert_count": mx.array(8)}, "qwen3moe.expert_count must be"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type must be none, got yarn"),
        ({"llama.rope.dimension_count": mx.array(6)}, "rope.dimension_count must be the width of a head, 10, got 6"),
    ],
)
def test_gguf_that_is_refused(tmp_path, more, reason):
    write_gguf(tmp_path / "a.gguf", config("llama"), "llama", **more)
    refused(lambda: convert(tmp_path / "a.gguf", tmp_path / "out"), reason, tmp_path / "a.gguf", tmp_path)


def test_no_gguf(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"nothing of the kind")
    refused(lambda: convert(tmp_path / "a.gguf", tmp_path / "out"), "MLX cannot read it", tmp_path / "a.gguf", tmp_path)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"colour": "blue"}, "config.json has keys that are not handled: colour"),
        (
            {"model_type": "mamba"},
            "gemma3_text, mixtral, qwen2_moe, qwen3_moe, olmoe, bert, t5, whisper, got mamba",
        ),
        ({"hidden_act": "relu"}, "hidden_act must be one of silu"),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
            "rope_type must be one of default, linear, llama3",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling must have a factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "x": 1}}, "rope_scaling has keys that are not handled: x"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1, got 0.5"),
        ({"hidden_size": None}, "config.json must have hidden_size"),
        ({"hidden_size": "23"}, "hidden_size must be a number above 0, got 23"),
        ({"num_attention_heads": 10**7}, "num_heads must be a whole number from 1"),
        ({"sliding_window": 7}, "sliding_window must be null in a llama"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization must be of bits and group_size"),
        ({"rope_parameters": 3}, "rope_parameters must be an object"),
    ],
)
def test_configurations_that_are_refused(tmp_path, values, reason):
    write_folder(tmp_path / "hf", config("llama"))
    edited(tmp_path / "hf", **values)
    refused(lambda: convert(tmp_path / "hf", tmp_path / "out"), reason, tmp_path / "hf", tmp_path)


def test_tensors_that_do_not_fit(tmp_path):
    own = config("llama")
    state = write_folder(tmp_path / "hf", own)
    gone = state.pop("model.layers.1.mlp.up_proj.weight")
    state["model.layers.1.mlp.up_proj.wait"] = gone
    state["model.norm.weight"] = np.zeros(3, np.float32)
    save_file(state, tmp_path / "hf/model.safetensors")
    with pytest.raises(ValueError) as error:
        convert(tmp_path / "hf", tmp_path / "out")
    for line in (
        "the tensors do not fit the model: 1 leftover, 1 misshapen, 1 missing",
        "leftover: model.layers.1.mlp.up_proj.wait meets no rule",
        "missing: model.layers.1.mlp.up_proj.weight (29, 23)",
        "misshapen: model.norm.weight must be (23,), got (3,)",
    ):
        assert line in str(error.value)
    assert not (tmp_path / "out").exists()


def test_shards_that_are_not_whole(tmp_path):
    hf = tmp_path / "hf"
    write_folder(hf, config("llama"), shards=3)
    shard, index = sorted(hf.glob("model-*"))[1], hf / "model.safetensors.index.json"
    content, listed = shard.read_bytes(), index.read_text()
    shard.write_bytes(content[:-7])
    refused(lambda: convert(hf, tmp_path / "out"), "not a whole safetensors file", shard, tmp_path)
    shard.unlink()
    refused(lambda: convert(hf, tmp_path / "out"), "no such file, though model.safetensors.index.json lists it", shard,
            tmp_path)  # fmt: skip
    shard.write_bytes(content)
    for wrong, reason in (
        ("{", "not JSON"),
        ("{}", "must have a weight_map"),
        (listed.replace(shard.name, "../x"), "must be a plain name"),
        (listed.replace("model.norm", "model.worn"), "lists model.worn.weight, which no shard holds"),
    ):
        index.write_text(wrong)
        refused(lambda: convert(hf, tmp_path / "out"), reason, index, tmp_path)
    index.unlink()
    refused(lambda: convert(hf, tmp_path / "out"), "holds neither model.safetensors nor", hf, tmp_path)


def test_a_truncated_file(tmp_path):
    write_folder(tmp_path / "hf", config("llama"))
    path = tmp_path / "hf/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(lambda: convert(tmp_path / "hf", tmp_path / "out"), "not a whole safetensors file", path, tmp_path)


def test_the_wrong_folder(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text("[]")
    (tmp_path / "empty").mkdir()
    reason = (
        "holds neither a bag (.yaml), a model file (.safetensors, .th, .pt, .pth, .ckpt, .bin, .npz) nor a "
        "language model (config.json with a model_type beside .safetensors, or one .gguf)"
    )
    for folder in (tmp_path / "hf", tmp_path / "empty"):
        for given in ({}, {"quantize": 8}):
            refused(partial(convert, folder, tmp_path / "out", **given), reason, folder, tmp_path)
    write_folder(tmp_path / "hf", config("llama"))
    with pytest.raises(ValueError, match="family must be htdemucs, got causal_lm"):
        convert(tmp_path / "hf", tmp_path / "out", family="htdemucs")
    convert(tmp_path / "hf", tmp_path / "mlx", family="causal_lm")
    for given in ({}, {"quantize": 8}, {"dtype": "float16"}):
        again = partial(convert, tmp_path / "mlx", tmp_path / "out", **given)
        refused(again, "this is a checkpoint already", tmp_path / "mlx", tmp_path)
    refused(lambda: convert(tmp_path / "mlx", tmp_path / "hf", to="pytorch"), "must be new or empty", tmp_path / "hf",
            tmp_path)  # fmt: skip


JUNK = [None, -1, 0, 7, 1e30, float("nan"), 0.5, "x", "", [], [1], {}, {"a": 1}, True, ["sliding_attention"]]


@pytest.mark.parametrize("name", ["llama 3.1", "qwen2, yarn", "gemma 3", "mixtral", "qwen2 moe", "olmoe"])
def test_values_of_any_kind(tmp_path, name):
    """Every key with every sort of junk, also one level down: a model whose tensors do not fit, or one line."""
    own = config(name)
    write_folder(tmp_path / "hf", own, quantization={"bits": 4, "group_size": 64, "lm_head": False})
    values = json.loads((tmp_path / "hf/config.json").read_text())
    values["rope_parameters"] = {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_type": "default"}}
    cases = [{**values, key: junk} for key in values for junk in JUNK]
    for outer in ("rope_scaling", "quantization", "rope_parameters"):
        inner = values.get(outer) or {}
        cases += [{**values, outer: {**inner, key: junk}} for key in [*inner, "type", "factor"] for junk in JUNK]
    for case in cases:
        (tmp_path / "hf/config.json").write_text(json.dumps(case))
        try:
            convert(tmp_path / "hf", tmp_path / "out", dry_run=True)
        except (ValueError, OSError) as error:
            lines = str(error).splitlines()
            assert lines[0].startswith(str(tmp_path / "hf")) and len(lines[0]) < 500, error
            assert len(lines) == 1 or "the tensors do not fit the model" in lines[0], error


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"quantize": 3}, "quantize must be 4, 8, or 0 for floats, got 3"),
        ({"group_size": 48}, "group_size must be 32, 64 or 128, got 48"),
        ({"dtype": "int8"}, "dtype must be one of float32, float16, bfloat16, got 'int8'"),
        ({"quantize": 4, "to": "pytorch"}, 'must not be given with to="pytorch"'),
    ],
)
def test_wishes_that_are_refused(tmp_path, given, reason):
    write_folder(tmp_path / "hf", config("llama"))
    with pytest.raises(ValueError, match=reason):
        convert(tmp_path / "hf", tmp_path / "out", **given)


def test_the_command(tmp_path, capsys):
    write_folder(tmp_path / "hf", config("llama", **WIDE))
    arguments = ["convert", str(tmp_path / "hf"), str(tmp_path / "mlx"), "--quantize", "8", "--group-size", "32"]
    assert cli.main([*arguments, "--dry-run"]) == 0 and not (tmp_path / "mlx").exists()
    assert cli.main(arguments) == 0 and "family      causal_lm" in capsys.readouterr().out
    assert cli.main(["parity", str(tmp_path / "mlx"), "--seeds", "1"]) == 0
    assert "model.layers.1" in capsys.readouterr().out
    assert cli.main(["info", str(tmp_path / "mlx")]) == 0
    assert "layers      2 of width 64, 37 tokens, 8 bits in groups of 32" in capsys.readouterr().out
    edited(tmp_path / "hf", colour=1)
    assert cli.main(["convert", str(tmp_path / "hf"), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_load_converts_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_XFORMER_CACHE", str(tmp_path / "cache"))
    own = config("gemma 3")
    write_folder(tmp_path / "hf", own)
    first = loading.resolve(tmp_path / "hf")
    assert first.is_relative_to(tmp_path / "cache") and isinstance(loading.load(tmp_path / "hf"), CausalLM)
    stamp = (first / "config.json").stat().st_mtime_ns
    assert loading.resolve(tmp_path / "hf") == first and (first / "config.json").stat().st_mtime_ns == stamp
    (tmp_path / "hf/tokenizer.json").write_text("{}")
    assert (loading.resolve(tmp_path / "hf") / "tokenizer.json").exists()
    write_gguf(tmp_path / "a.gguf", config("llama"), "llama")
    assert isinstance(loading.load(tmp_path / "a.gguf"), CausalLM)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells")
@pytest.mark.parametrize("given", [{}, {"quantize": 4}, {"dtype": "float16"}])
def test_memory_is_that_of_a_shard_and_a_tensor(tmp_path, given):
    """Eight shards: what a conversion takes is less than the largest of them and the largest tensor; all of them take
    what they hold, so the measure works."""
    own = config("llama", **{**WIDE, "vocab_size": 16384, "embed_dim": 512, "hidden_dim": 2048, "num_layers": 12})
    state = write_folder(tmp_path / "hf", own, shards=8)
    whole, largest = sum(x.nbytes for x in state.values()), max(x.nbytes for x in state.values())
    shard = max(path.stat().st_size for path in (tmp_path / "hf").glob("model-*.safetensors"))
    command = [sys.executable, "-c", CHILD, tmp_path / "hf", tmp_path / "mlx", json.dumps(given)]
    environment = {**os.environ, "MLX_XFORMER_MALLOC": "0"}  # what is freed is given back
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    peak, control = map(int, done.stdout.split())
    sizes = [f"{size / 2**20:.0f}" for size in (whole, shard, largest, peak, control)]
    print("\nMiB in all, of a shard, of a tensor, to convert, to hold:", *sizes, end=" ")
    assert peak <= shard + largest < whole / 2 and control >= 0.9 * whole
