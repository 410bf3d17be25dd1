"""State dicts of torch.nn.Transformer* and of llm_prep's models: recognised, converted, and led back bit by bit."""

import dataclasses
import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file

from mlx_xformer import parity
from mlx_xformer.converters.conversion import convert
from mlx_xformer.converters.families import CONVERTERS, transformer
from mlx_xformer.converters.families.guides import llm_prep
from mlx_xformer.models.families import load_model
from mlx_xformer.models.guides.llm_prep import AutoregressiveTransformerModel, EncoderDecoder, TransformerModel
from mlx_xformer.models.transformer import Transformer
from mlx_xformer.parity import families
from mlx_xformer.storage.checkpoint import read_checkpoint

E, HEADS, HIDDEN, I, O, L = 18, 6, 13, 5, 7, 11
KINDS = {kind.name: kind for kind in transformer.MODULES}


def drawn(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: (rng.normal(size=shape) * shape[-1] ** -0.5 if len(shape) > 1 else rng.uniform(0.2, 0.9, shape)).astype(
            np.float32
        )
        for name, shape in shapes.items()
    }


def torch_layer(start, cross):
    names = ["self_attn", *(["multihead_attn"] if cross else [])]
    shapes = {}
    for name in names:
        shapes |= {f"{start}{name}.in_proj_weight": (3 * E, E), f"{start}{name}.in_proj_bias": (3 * E,)}
        shapes |= {f"{start}{name}.out_proj.weight": (E, E), f"{start}{name}.out_proj.bias": (E,)}
    shapes |= {f"{start}linear1.weight": (HIDDEN, E), f"{start}linear1.bias": (HIDDEN,)}
    shapes |= {f"{start}linear2.weight": (E, HIDDEN), f"{start}linear2.bias": (E,)}
    for n in range(1, 4 if cross else 3):
        shapes |= {f"{start}norm{n}.weight": (E,), f"{start}norm{n}.bias": (E,)}
    return shapes


def torch_stack(start, layers, cross, norm=True):
    shapes = {}
    for index in range(layers):
        shapes |= torch_layer(f"{start}layers.{index}.", cross)
    return shapes | ({f"{start}norm.weight": (E,), f"{start}norm.bias": (E,)} if norm else {})


TORCH = {
    "torch_transformer": torch_stack("encoder.", 2, False) | torch_stack("decoder.", 3, True),
    "torch_encoder": torch_stack("", 2, False, norm=False),
    "torch_decoder": torch_stack("", 2, True),
    "torch_encoder_layer": torch_layer("", False),
    "torch_decoder_layer": torch_layer("", True),
}


def feed(start, hidden, experts=None):
    if experts is None:
        return {f"{start}layer_1.weight": (hidden, E), f"{start}layer_1.bias": (hidden,),
                f"{start}layer_2.weight": (E, hidden), f"{start}layer_2.bias": (E,)}  # fmt: skip
    shapes = {f"{start}router.weight": (experts, E), f"{start}router.bias": (experts,)}
    for one in (*(f"experts.{e}." for e in range(experts)), "overflow_expert."):
        shapes |= feed(start + one, hidden)
    return shapes


def document_layer(start, names, norms, groups, experts):
    shapes = {}
    for name in names:
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            rows = E // HEADS * groups if part in ("k_proj", "v_proj") else E
            shapes |= {f"{start}{name}.{part}.weight": (rows, E), f"{start}{name}.{part}.bias": (rows,)}
    for name in norms:
        shapes |= {f"{start}{name}.weight": (E,), f"{start}{name}.bias": (E,)}
    return shapes | feed(f"{start}ffn.", HIDDEN, experts)


def single(groups=HEADS, experts=None):
    shapes = {"input_proj.weight": (E, I), "input_proj.bias": (E,), "out_proj.weight": (O, E), "out_proj.bias": (O,)}
    for index in range(2):
        shapes |= document_layer(f"layers.{index}.", ["attn"], ["norm_1", "norm_2"], groups, experts)
    return shapes | {"pe.pe": (1, 31, E)}


def pair(groups=2, experts=None):
    shapes = {
        "out_proj.weight": (O, E),
        "out_proj.bias": (O,),
        "encoder_pe.pe": (1, 31, E),
        "decoder_pe.pe": (1, 29, E),
    }
    for side in ("encoder", "decoder"):
        shapes |= {f"{side}_input_proj.weight": (E, I), f"{side}_input_proj.bias": (E,)}
    for index in range(2):
        shapes |= document_layer(f"encoder_layers.{index}.", ["attn"], ["norm_1", "norm_2"], groups, experts)
    names, norms = ["self_attention", "cross_attention"], ["layer_norm_1", "layer_norm_2", "layer_norm_3"]
    for index in range(3):
        shapes |= document_layer(f"decoder_layers.{index}.", names, norms, groups, experts)
    return shapes


MIXED = {"num_heads": HEADS, "capacity": 64, "topk": 2}
DOCUMENT = {
    "regression": (single(), {"num_heads": HEADS, "model": "regression"}, TransformerModel),
    "autoregressive, mqa": (single(1), {"num_heads": HEADS, "model": "autoregressive"}, AutoregressiveTransformerModel),
    "autoregressive, mixture": (single(2, 3), {**MIXED, "model": "autoregressive"}, AutoregressiveTransformerModel),
    "encoder-decoder": (pair(), {"num_heads": HEADS}, EncoderDecoder),
    "encoder-decoder, mixture": (pair(6, 3), MIXED, EncoderDecoder),
}


def there_and_back(tmp_path, shapes, settings):
    """(the tensors, the report, what the way back gives)"""
    tensors = drawn(shapes)
    save_file(tensors, tmp_path / "model.safetensors")
    report = convert(tmp_path / "model.safetensors", tmp_path / "ours", settings=settings)
    convert(tmp_path / "ours", tmp_path / "back", to="pytorch")
    return tensors, report, load_file(tmp_path / "back" / "model.safetensors")


def proven(folder):
    report = parity.run(folder=folder, seeds=1)
    assert not report.failed, report.table()
    return {row.name for row in report.rows}


@pytest.mark.parametrize("name", TORCH)
def test_torch(tmp_path, name):
    settings = {"num_heads": HEADS, "norm_first": True, "activation": "gelu"}
    tensors, report, back = there_and_back(tmp_path, TORCH[name], settings)
    assert back.keys() == tensors.keys() and all(np.array_equal(back[n], tensors[n]) for n in tensors)
    model = load_model(tmp_path / "ours")
    assert isinstance(model, Transformer) and model.config.norm_first and model.config.activation == "gelu"
    assert model.config.final_norm == (name in ("torch_transformer", "torch_decoder"))
    assert KINDS[name].klass in report.reason
    assert json.loads((tmp_path / "back" / "config.json").read_text())["num_heads"] == HEADS
    assert read_checkpoint(tmp_path / "ours").provenance["kind"] == name
    sides = {"encoder", "decoder"} if name == "torch_transformer" else {name.split("_")[1]}
    assert {row.split(".")[0] for row in proven(tmp_path / "ours")} == {*sides, "model"}
    packed = tensors[next(n for n in tensors if n.endswith("self_attn.in_proj_weight"))]
    ours = dict(tree_flatten(model.parameters()))
    start = next(n for n in ours if n.endswith("self_attn.q_proj.weight")).removesuffix("q_proj.weight")
    for part, rows in zip("qkv", np.split(packed, 3), strict=True):
        assert np.array_equal(np.array(ours[f"{start}{part}_proj.weight"]), rows)


@pytest.mark.parametrize("name", DOCUMENT)
def test_document_1(tmp_path, name):
    """S1-32. The tables of positions are dropped on purpose: they are computed."""
    shapes, settings, kind = DOCUMENT[name]
    tensors, report, back = there_and_back(tmp_path, shapes, settings)
    kept = {n for n in tensors if not n.endswith("pe.pe")}
    assert back.keys() == kept and all(np.array_equal(back[n], tensors[n]) for n in kept)
    model = load_model(tmp_path / "ours")
    assert isinstance(model, kind) and "llm_prep" in report.reason
    assert model.config.max_len == (29 if kind is EncoderDecoder else 31)
    named = "\n".join(map(str, report.rows))
    assert all(n in named for n in tensors.keys() - kept), "the report names what it drops"
    if "mixture" in name:
        assert model.config.ffn.use_moe and model.config.ffn.mixture().renormalizes and model.config.ffn.capacity == 64
    assert "model" in proven(tmp_path / "ours")


def test_every_kind_knows_its_own_alone():
    files = {**TORCH, **{name: shapes for name, (shapes, _, _) in DOCUMENT.items()}}
    for name, shapes in files.items():
        tensors = {n: mx.zeros(shape) for n, shape in shapes.items()}
        found = [one.name for one in CONVERTERS if one.detect is not None and one.detect(tensors)]
        ours = [kind for kind in found if kind in KINDS or kind == "llm_prep"]
        assert ours == [name if name in KINDS else "llm_prep"], name
    assert llm_prep.detect({}) is None and all(kind.detect({}) is None for kind in KINDS.values())


@pytest.mark.parametrize(
    ("shapes", "settings", "message"),
    [
        (TORCH["torch_encoder"], {}, "num_heads must be set, as the shapes do not tell it"),
        (TORCH["torch_encoder"], {"num_heads": 5}, "embed_dim must be a multiple of num_heads, 5, got 18"),
        (TORCH["torch_encoder"], {"num_heads": 6, "heads": 1}, "settings must be among num_heads, .*, got heads"),
        (TORCH["torch_encoder"], {"num_heads": 6, "activation": "tanh"}, "activation must be one of"),
        (
            torch_stack("encoder.", 1, False) | torch_stack("decoder.", 1, True, norm=False),
            {"num_heads": 6},
            "encoder.norm and decoder.norm must be there both or not at all",
        ),
        (
            {n: s for n, s in TORCH["torch_encoder"].items() if n != "layers.1.norm2.bias"},
            {"num_heads": 6},
            "missing: encoder.layers.1.norm3.bias",
        ),
        (
            single(),
            {"num_heads": 6},
            "model must be set to regression or autoregressive, as their tensors are the same",
        ),
        (single(), {"model": "regression"}, "num_heads must be set"),
        (single(), {"model": "encoder_decoder", "num_heads": 6}, "model must be set to regression or autoregressive"),
        (single(2, 3), {"model": "regression", "num_heads": 6}, "capacity, topk must be set for a model with mixtures"),
        (single(), {"model": "regression", **MIXED}, "capacity, topk must not be set for a model without mixtures"),
        (
            single(),
            {"model": "regression", "num_heads": 6, "max_len": 32},
            "max_len must be set to at most .*, 31, got 32",
        ),
        (
            {n: s for n, s in single().items() if n != "pe.pe"},
            {"model": "regression", "num_heads": 6},
            "max_len must be set to at most .*, None, got None",
        ),
        ({**pair(), "decoder_input_proj.weight": (E, I + 1)}, {"num_heads": 6}, "decoder_input_proj.weight must be"),
        (
            {**single(), "layers.0.attn.mask": (3, 3)},
            {"model": "regression", "num_heads": 6},
            "layers.0.attn.mask meets no",
        ),
        (
            {**single(), "out_proj.weight": ()},
            {"model": "regression", "num_heads": 6},
            "out_proj.weight must have 2 axes",
        ),
        (
            {**single(), "input_proj.weight": (E,)},
            {"model": "regression", "num_heads": 6},
            r"must have 2 axes, .* \(\d+,\)",
        ),
        (
            {"self_attn.in_proj_weight": (9, 3), "linear1.weight": ()},
            {"num_heads": 3},
            "linear1.weight must have 2 axes",
        ),
    ],
)
def test_what_is_refused(tmp_path, shapes, settings, message):
    save_file(drawn(shapes), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "model.safetensors", tmp_path / "ours", settings=settings)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("name", "side", "change"),
    [
        ("encoder-decoder", "decoder", {"window": 2}),
        ("encoder-decoder", "encoder", {"causal": True}),
        ("regression", "stack", {"norm_first": True}),
        ("autoregressive, mqa", "stack", {"causal": False}),
    ],
)
def test_the_proof_of_a_folder_names_the_layer_that_is_wrong(tmp_path, monkeypatch, name, side, change):
    shapes, settings, _ = DOCUMENT[name]
    save_file(drawn(shapes), tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "ours", settings=settings)
    model = load_model(tmp_path / "ours")
    layer = model[side].layers[1]
    own = dataclasses.replace(layer.self_attn.config, **{n: x for n, x in change.items() if n != "norm_first"})
    layer.self_attn.config, layer.config = own, dataclasses.replace(layer.config, **change)
    monkeypatch.setattr(families, "load_model", lambda folder: model)
    failed = {row.name for row in parity.run(folder=tmp_path / "ours", seeds=1).rows if row.failed}
    assert failed - {"model.cached"} == {f"{side}.layers.1", "model"}
