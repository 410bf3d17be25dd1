"""Conversions of mixtures of experts: fused and packed layouts, reports, what lacks or is too much, memory."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from decoders import config, write_folder
from mlx_xformer.converters import decoder as names
from mlx_xformer.converters import mixture
from mlx_xformer.converters.convert import convert
from mlx_xformer.converters.rules import plan
from safetensors.numpy import load_file, save_file
from test_convert import same_tensors
from test_convert_decoder import CHILD, check_logits, edited, ours, refused, tensors, written

from mlx_xformer import cli
from mlx_xformer.checkpoint import load_model, read_checkpoint
from mlx_xformer.models.decoder import Decoder, DecoderConfig, Quantization
from mlx_xformer.moe import MoEConfig

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
    assert isinstance(load_model(tmp_path / "mlx"), Decoder)


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


# Sizes


def test_a_large_mixture_is_planned_in_no_time():
    """Qwen3-30B-A3B's names: 48 layers of 128 experts."""
    own = DecoderConfig(11, 6, 48, 1, 5, head_dim=2, qk_norm=True, moe=MoEConfig(6, 3, 128, 8, renormalize=True))
    table = names.rules(own)
    parts = [f"mlp.experts.{e}.{p}_proj.weight" for e in range(128) for p in ("gate", "up", "down")]
    every = [f"model.layers.{i}.{part}" for i in range(48) for part in [*parts, "mlp.gate.weight"]]
    moves, problems = plan(table, every)
    assert not problems and len(moves) == 48 * 4
    assert mixture.fused_name(own) == "model.layers.0.mlp.experts.gate_up_proj"


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
    quantization = Quantization(8, 32)
    assert load_model(tmp_path / "mlx").config.quantization == quantization
