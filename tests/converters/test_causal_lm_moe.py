"""Conversions of mixtures of experts: fused and packed layouts, reports, what lacks or is too much, memory."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file
from support.harness import same_tensors
from support.text import HF_SIZES as SIZES
from support.text import MEMORY_CHILD as CHILD
from support.text import assert_refused as refused
from support.text import causal_lm_config as config
from support.text import check_logits, tiny_causal_lm, write_folder
from support.text import convert_names as ours
from support.text import edit_config as edited
from support.text import read_tensors as tensors
from support.text import tensor_counts as written

from mlx_xformer import cli, parity
from mlx_xformer.converters.conversion import convert
from mlx_xformer.converters.families import causal_lm as names
from mlx_xformer.converters.families import causal_lm_moe
from mlx_xformer.converters.rules import inverse_shapes, plan
from mlx_xformer.models.causal_lm.model import CausalLM, CausalLMConfig, Quantization
from mlx_xformer.models.families import load_model, parameter_shapes
from mlx_xformer.nn.moe import MoEConfig
from mlx_xformer.storage.checkpoint import read_checkpoint, save_checkpoint

KINDS = ["mixtral", "qwen2 moe", "qwen3 moe", "olmoe"]
EXPERT = re.compile(r"(.*\.)(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight")
PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def stacked(state):
    """Tensors of Hugging Face, experts as {(layer, part): (E, O, I)}, and the others."""
    parts, others = {}, {}
    for name, x in state.items():
        if found := EXPERT.fullmatch(name):
            prefix, e, part = found.groups()
            parts.setdefault((prefix, PARTS.get(part, part)), {})[int(e)] = x
        else:
            others[name] = x
    return {key: np.stack([x[e] for e in range(len(x))]) for key, x in parts.items()}, others


def fused(state):
    """The tensors as transformers computes with them, and can save them."""
    experts, others = stacked(state)
    out = {name.replace("block_sparse_moe", "mlp"): x for name, x in others.items()}
    for prefix in {prefix for prefix, _ in experts}:
        gate, up, down = (experts[prefix, part] for part in ("gate_proj", "up_proj", "down_proj"))
        out[f"{prefix}mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        out[f"{prefix}mlp.experts.down_proj"] = down
    return out


def small(name):
    """A mixture whose rows groups of 32 divide."""
    wide = {"embed_dim": 64, "hidden_dim": 96, "head_dim": 32, "num_heads": 2, "num_kv_heads": 1, "vocab_size": 37}
    if name == "olmoe":
        wide |= {"hidden_dim": 32}
    own = config(name, **wide)
    hidden_dim = 32 if name in ("qwen2 moe", "qwen3 moe") else own.hidden_dim
    shared = 64 if own.moe.shared_dim else 0
    return dataclasses.replace(own, moe=dataclasses.replace(own.moe, hidden_dim=hidden_dim, shared_dim=shared))


# Layouts


@pytest.mark.parametrize("name", KINDS)
def test_fused_experts(tmp_path, name):
    """As transformers saves them with save_original_format=False: the same checkpoint, and the same way back."""
    own = config(name)
    state = write_folder(tmp_path / "each", own)
    write_folder(tmp_path / "fused", own, shards=3)
    for path in (tmp_path / "fused").glob("model*"):
        path.unlink()
    save_file(fused(state), tmp_path / "fused/model.safetensors", {"format": "pt"})
    for source in ("each", "fused"):
        convert(tmp_path / source, tmp_path / f"{source}-mlx")
        convert(tmp_path / f"{source}-mlx", tmp_path / f"{source}-back", to="pytorch")
        same_tensors(tensors(tmp_path / f"{source}-back"), tensors(tmp_path / source))
    same_tensors(tensors(tmp_path / "fused-mlx"), tensors(tmp_path / "each-mlx"))


def packed_by_mlx_lm(state, how):
    """mlx-lm's tensors and the float64 values that they stand for, under Hugging Face's names; how: (layer) -> bits and
    group_size, or None."""
    experts, others = stacked(state)
    block = "block_sparse_moe" if any("block_sparse_moe" in name for name in others) else "mlp"
    made, values = {}, {}

    def put(layer, x):
        options = how(layer) if x.ndim > 1 else None
        if options is None:
            made[f"{layer}.weight"] = mx.array(x)
            return x.astype(np.float64)
        parts = mx.quantize(mx.array(x), **options)
        made.update({f"{layer}.{leaf}": p for leaf, p in zip(("weight", "scales", "biases"), parts, strict=True)})
        return np.array(mx.dequantize(*parts, **options), np.float64)

    for (prefix, part), x in experts.items():
        whole = put(f"{prefix}{block}.switch_mlp.{part}", x)
        word = {ours: theirs for theirs, ours in PARTS.items()}[part] if block != "mlp" else part
        values |= {f"{prefix}{block}.experts.{e}.{word}.weight": whole[e] for e in range(len(whole))}
    for name, x in others.items():
        if name.endswith(".bias"):
            made[name], values[name] = mx.array(x), x.astype(np.float64)
        else:
            values[name] = put(name.removesuffix(".weight"), x)
    return made, values


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("routers", ["named", "as the others", "floats"])
def test_packed_by_mlx_lm(tmp_path, name, routers):
    """Stacked already; routers are packed in bits of their own, as everything else, or not at all: kept as they are.
    Packed anew they become floats."""
    own, every = small(name), {"bits": 4, "group_size": 32}
    state = write_folder(tmp_path / "hf", own)
    named = {"bits": 8, "group_size": 64}

    def how(layer):
        if not layer.endswith((".gate", "shared_expert_gate")):
            return every
        return {"named": named, "as the others": every}.get(routers)

    made, values = packed_by_mlx_lm(state, how)
    mx.save_safetensors(str(tmp_path / "hf/model.safetensors"), made, {"format": "mlx"})
    layers = {name.rpartition(".")[0] for name in made if "gate.scales" in name} if routers == "named" else ()
    assert routers != "named" or layers
    edited(tmp_path / "hf", quantization={**every, "mode": "affine", **dict.fromkeys(layers, named)})
    report = convert(tmp_path / "hf", tmp_path / "mlx")
    assert written(report) in str(report)
    params = ours(own, {n: x.astype(np.float32) for n, x in values.items()})
    check_logits(tmp_path / "mlx", params, own)
    router = load_model(tmp_path / "mlx").model.layers[0].mlp.router
    assert ("scales" in router) == (routers != "floats")
    convert(tmp_path / "hf", tmp_path / "floats", quantize=0)
    check_logits(tmp_path / "floats", params, own)
    convert(tmp_path / "floats", tmp_path / "back", to="pytorch")
    back = load_file(tmp_path / "back/model.safetensors")
    assert back.keys() == state.keys()
    assert all((back[n] == values[n].astype(np.float32)).all() for n in back)
    convert(tmp_path / "hf", tmp_path / "again", quantize=8, group_size=32)
    assert "scales" not in load_model(tmp_path / "again").model.layers[0].mlp.router
    convert(tmp_path / "mlx", tmp_path / "unpacked", to="pytorch")
    same_tensors(tensors(tmp_path / "unpacked"), tensors(tmp_path / "back"))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_quantization(tmp_path, name, bits):
    """Every expert is packed as it would be alone, routers are not; what leads back has the packed values."""
    own = small(name)
    state = write_folder(tmp_path / "hf", own, shards=2)
    report = convert(tmp_path / "hf", tmp_path / "mlx", quantize=bits, group_size=32)
    assert report.parameters == sum(x.size for x in state.values())
    checkpoint = read_checkpoint(tmp_path / "mlx")
    assert checkpoint.config["quantization"] == {"bits": bits, "group_size": 32, "layers": {}}
    experts, _ = stacked(state)
    for (prefix, part), x in experts.items():
        for e in range(own.moe.num_experts):
            alone = mx.quantize(mx.array(x[e]), group_size=32, bits=bits)
            for leaf, wanted in zip(("weight", "scales", "biases"), alone, strict=True):
                assert mx.array_equal(checkpoint.weights[f"{prefix}mlp.experts.{part}.{leaf}"][e], wanted)
    routing = {n for n in checkpoint.weights if "router" in n or "shared_expert_gate" in n}
    assert routing and all(n.endswith(".weight") and checkpoint.weights[n].dtype == mx.float32 for n in routing)
    convert(tmp_path / "mlx", tmp_path / "back", to="pytorch")
    back = load_file(tmp_path / "back/model.safetensors")
    check_logits(tmp_path / "mlx", ours(own, back), own)


def test_rows_of_experts_that_groups_do_not_divide_stay_floats(tmp_path):
    own = small("qwen3 moe")
    own = dataclasses.replace(own, moe=dataclasses.replace(own.moe, hidden_dim=29))
    write_folder(tmp_path / "hf", own)
    convert(tmp_path / "hf", tmp_path / "mlx", quantize=4, group_size=32)
    layers = read_checkpoint(tmp_path / "mlx").config["quantization"]["layers"]
    assert layers == {f"model.layers.{index}.mlp.experts.down_proj": None for index in range(2)}
    assert isinstance(load_model(tmp_path / "mlx"), CausalLM)


def test_half_precision(tmp_path):
    own = config("mixtral")
    state = write_folder(tmp_path / "hf", own)
    half = {n: mx.array(x).astype(mx.bfloat16) for n, x in state.items()}
    mx.save_safetensors(str(tmp_path / "hf/model.safetensors"), half, {"format": "pt"})
    convert(tmp_path / "hf", tmp_path / "mlx")
    convert(tmp_path / "mlx", tmp_path / "back", to="pytorch")
    same_tensors(tensors(tmp_path / "back"), half)
    assert load_model(tmp_path / "mlx")(mx.array([[3, 4, 5]])).dtype == mx.bfloat16


# The report, and what is refused


def test_the_report_names_every_tensor(tmp_path):
    """Where a matrix is stacked of many, packed, and unstacked again."""
    own = small("mixtral")
    state = write_folder(tmp_path / "hf", own)
    steps = [("hf", "plain", {}), ("hf", "packed", {"quantize": 4, "group_size": 32}),
             ("packed", "back", {"to": "pytorch"})]  # fmt: skip
    for source, out, given in steps:
        dry = convert(tmp_path / source, tmp_path / out, dry_run=True, **given)
        report = convert(tmp_path / source, tmp_path / out, **given)
        assert written(report) in str(report) and written(report) in str(dry) and report.table() == dry.table()
        assert {n for row in report.rows for n in row.sources} == mx.load(
            str(tmp_path / source / "model.safetensors")).keys()  # fmt: skip
        assert {n for row in report.rows for n in row.targets} == mx.load(
            str(tmp_path / out / "model.safetensors")).keys()  # fmt: skip
    lines = [line for line in convert(tmp_path / "hf", tmp_path / "packed", quantize=4, group_size=32).table().split(
        "\n") if "layers.1.block_sparse_moe.experts.0.w2" in line]  # fmt: skip
    sources = ", ".join(f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight (64, 96) F32" for e in range(5))
    ours = "model.layers.1.mlp.experts.down_proj"
    assert lines == [
        f"{sources} -> {ours}.weight (5, 64, 12) U32, {ours}.scales (5, 64, 3) F32, {ours}.biases (5, 64, 3) F32"
    ]
    assert len(state) == 47


@pytest.mark.parametrize("name", KINDS)
def test_experts_that_lack_or_are_too_many(tmp_path, name):
    own = config(name)
    state = write_folder(tmp_path / "hf", own)
    part = next(n for n in sorted(state) if ".experts.1." in n and state[n].shape[0] != own.embed_dim)
    last = own.moe.num_experts
    extra = part.replace(".experts.1.", f".experts.{last}.")
    wide = np.zeros((state[part].shape[0] + 1, own.embed_dim), np.float32)
    cases = [
        ({part: None}, "1 missing", f"missing: {part}"),
        ({extra: state[part]}, "1 leftover", f"leftover: {extra} meets no rule"),
        ({part: wide}, "1 misshapen", f"unlike {part} {wide.shape} for model.layers."),
        ({part: state[part].astype(np.float16)}, "1 misshapen", f"unlike {part} {state[part].shape} mlx.core.float16"),
    ]
    for change, counts, line in cases:
        save_file({n: x for n, x in (state | change).items() if x is not None}, tmp_path / "hf/model.safetensors")
        call = partial(convert, tmp_path / "hf", tmp_path / "out")
        refused(call, f"the tensors do not fit the model: {counts}\n", tmp_path / "hf", tmp_path, lines=2)
        refused(call, line, tmp_path / "hf", tmp_path, lines=2)
    every = [n for n in state if ".experts." in n]
    save_file({n: x for n, x in state.items() if n not in every}, tmp_path / "hf/model.safetensors")
    with pytest.raises(ValueError, match=r"missing: model\.layers\.0\.mlp\.experts\.down_proj\.weight"):
        convert(tmp_path / "hf", tmp_path / "out")


def test_fused_experts_that_do_not_fit(tmp_path):
    own = config("mixtral")
    state = fused(write_folder(tmp_path / "hf", own))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    for wrong, line in (
        (state[name][:, :57], f"{name} (5, 57, 23) axis 1 must have two halves for"),
        (state[name][:3], "model.layers.1.mlp.experts.gate_proj.weight must be (5, 29, 23), got (3, 29, 23)"),
    ):
        save_file(state | {name: np.ascontiguousarray(wrong)}, tmp_path / "hf/model.safetensors")
        refused(partial(convert, tmp_path / "hf", tmp_path / "out"), line, tmp_path / "hf", tmp_path, lines=3)


def test_mixtures_without_an_original():
    """What Hugging Face has no words for; a width of feed-forward networks that no layer has makes no difference."""
    own = config("mixtral")
    for changes in ({"capacity": 7}, {"bias": True}, {"z_alpha": 0.1}, {"router": "sigmoid"}, {"scale": 2.0}):
        with pytest.raises(ValueError, match="no architecture of Hugging Face has this configuration"):
            names.original(dataclasses.replace(own, moe=dataclasses.replace(own.moe, **changes)))
    values = names.original(dataclasses.replace(own, hidden_dim=7))
    assert values["intermediate_size"] == own.moe.hidden_dim and values["model_type"] == "mixtral"
    resolved = dataclasses.replace(own, moe=dataclasses.replace(own.moe, renormalize=None))
    assert names.config(names.original(resolved)) == own


@pytest.mark.parametrize(
    ("kind", "values", "wanted"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 2}, {"dense_layers": (0, 2, 4, 6)}),
        (
            "qwen2_moe",
            {"use_sliding_window": True, "max_window_layers": 3},
            {"layer_types": ("local", "global", "local", "global", "global", "global", "global")},
        ),
    ],
    ids=["qwen3_moe", "qwen2_moe"],
)
def test_keys_of_mixtures(kind, values, wanted):
    own = names.config({"model_type": kind, **SIZES, **values})
    assert {name: getattr(own, name) for name in wanted} == wanted


# Sizes


def test_a_large_mixture_is_planned_in_no_time():
    """Qwen3-30B-A3B's names: 48 layers of 128 experts."""
    own = CausalLMConfig(11, 6, 48, 1, 5, head_dim=2, qk_norm=True, moe=MoEConfig(6, 3, 128, 8, renormalize=True))
    table = names.rules(own)
    parts = [f"mlp.experts.{e}.{p}_proj.weight" for e in range(128) for p in ("gate", "up", "down")]
    every = [f"model.layers.{i}.{part}" for i in range(48) for part in [*parts, "mlp.gate.weight"]]
    moves, problems = plan(table, every)
    assert not problems and len(moves) == 48 * 4
    assert causal_lm_moe.fused_name(own) == "model.layers.0.mlp.experts.gate_up_proj"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells")
@pytest.mark.parametrize("given", [{}, {"quantize": 4}])
def test_memory_is_that_of_a_shard_and_a_tensor(tmp_path, given):
    """The largest tensor is that of the experts of a layer, written at once."""
    own = config("mixtral", embed_dim=256, num_layers=10, vocab_size=8192)
    own = dataclasses.replace(own, hidden_dim=512, moe=MoEConfig(256, 512, 8, 2, renormalize=True))
    state = write_folder(tmp_path / "hf", own, shards=6)
    shapes = {n: x.nbytes for n, x in mx.load(str(_converted(tmp_path) / "model.safetensors")).items()}
    whole, largest = sum(x.nbytes for x in state.values()), max(shapes.values())
    shard = max(path.stat().st_size for path in (tmp_path / "hf").glob("model-*.safetensors"))
    command = [sys.executable, "-c", CHILD, tmp_path / "hf", tmp_path / "mlx", json.dumps(given)]
    environment = {**os.environ, "MLX_XFORMER_MALLOC": "0"}  # what is freed is given back
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    peak, control = map(int, done.stdout.split())
    sizes = [f"{size / 2**20:.0f}" for size in (whole, shard, largest, peak, control)]
    print("\nMiB in all, of a shard, of a tensor, to convert, to hold:", *sizes, end=" ")
    assert peak <= shard + largest < whole / 2 and control >= 0.9 * whole


def _converted(folder):
    convert(folder / "hf", folder / "first")
    return folder / "first"


def test_the_commands(tmp_path, capsys):
    write_folder(tmp_path / "hf", small("qwen2 moe"))
    assert cli.main(["convert", str(tmp_path / "hf"), str(tmp_path / "mlx"), "--quantize", "8", "--group-size",
                     "32"]) == 0  # fmt: skip
    assert cli.main(["parity", str(tmp_path / "mlx"), "--seeds", "1"]) == 0
    assert "model.layers.2" in capsys.readouterr().out
    assert cli.main(["info", str(tmp_path / "mlx")]) == 0
    line = "layers      3 of width 64, 37 tokens, 7 experts, 3 a token, 8 bits in groups of 32"
    assert line in capsys.readouterr().out
    assert load_model(tmp_path / "mlx").config.quantization == Quantization(8, 32)


def test_a_capacity_is_proven(tmp_path):
    """What overflows is the twin's; caches are left out, since chunks overflow otherwise."""
    model = tiny_causal_lm(moe={"embed_dim": 40, "hidden_dim": 23, "num_experts": 5, "num_experts_per_tok": 2,
                              "capacity": 0.75, "overflow": "expert"}, dense_layers=[1])  # fmt: skip
    weights = dict(tree_flatten(model.parameters()))
    save_checkpoint(tmp_path / "mlx", weights, family="causal_lm", config=model.config.to_dict(), provenance={})
    report = parity.run(folder=tmp_path / "mlx", seeds=1)
    assert not report.failed, report.table()
    assert "model.layers.2" in report.table() and "cached" not in report.table()
    with pytest.raises(ValueError, match="no architecture of Hugging Face has this configuration"):
        convert(tmp_path / "mlx", tmp_path / "back", to="pytorch")


# Released models, and what of their configuration matters

_LM = {"hidden_act": "silu", "initializer_range": 0.02, "attention_dropout": 0.0, "use_cache": True,
       "tie_word_embeddings": False, "torch_dtype": "bfloat16", "output_router_logits": False}  # fmt: skip
RELEASED = {
    "Mixtral-8x7B-v0.1": {
        **{**_LM, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "bos_token_id": 1},
        **{"eos_token_id": 2, "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768},
        **{"num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8},
        **{"num_local_experts": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "router_aux_loss_coef": 0.02},
        **{"sliding_window": None, "vocab_size": 32000, "transformers_version": "4.36.0.dev0"},
    },
    "Qwen1.5-MoE-A2.7B": {
        **{**_LM, "model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "bos_token_id": 151643},
        **{"eos_token_id": 151643, "decoder_sparse_step": 1, "hidden_size": 2048, "intermediate_size": 5632},
        **{"max_position_embeddings": 8192, "max_window_layers": 21, "moe_intermediate_size": 1408},
        **{"norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4},
        **{"num_hidden_layers": 24, "num_key_value_heads": 16, "rms_norm_eps": 1e-6, "rope_theta": 1e6},
        **{"router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 5632, "sliding_window": 32768},
        **{"use_sliding_window": False, "vocab_size": 151936},
    },
    "Qwen3-30B-A3B": {
        **{**_LM, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False},
        **{"decoder_sparse_step": 1, "head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144},
        **{"max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": []},
        **{"moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128},
        **{"num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-6},
        **{"rope_scaling": None, "rope_theta": 1e6, "router_aux_loss_coef": 0.001, "sliding_window": None},
        **{"use_sliding_window": False, "vocab_size": 151936},
    },
    "OLMoE-1B-7B-0924": {
        **{**_LM, "model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], "attention_bias": False},
        **{"clip_qkv": None, "eos_token_id": 50279, "pad_token_id": 1, "hidden_size": 2048, "intermediate_size": 1024},
        **{"max_position_embeddings": 4096, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64},
        **{"num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16, "rms_norm_eps": 1e-5},
        **{"rope_scaling": None, "rope_theta": 1e4, "router_aux_loss_coef": 0.01, "vocab_size": 50304},
    },
}
BILLIONS = {"Mixtral-8x7B-v0.1": 46.7, "Qwen1.5-MoE-A2.7B": 14.3, "Qwen3-30B-A3B": 30.5, "OLMoE-1B-7B-0924": 6.9}


@pytest.mark.parametrize("name", RELEASED)
def test_released_models(name):
    """They are understood, have as many parameters as their names tell, and their names are planned at once."""
    own = names.config(RELEASED[name])
    shapes = parameter_shapes("causal_lm", own.to_dict())
    assert round(sum(map(math.prod, shapes.values())) / 1e9, 1) == BILLIONS[name]
    start = time.process_time()
    sources = inverse_shapes(names.rules(own), shapes)
    moves, problems = plan(names.rules(own), sources)
    assert not problems and len(moves) == len(shapes) and time.process_time() - start < 2
    assert names.config(names.original(own)) == own
