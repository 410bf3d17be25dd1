"""Layers against PyTorch and the cross-transformer against demucs, forward and gradient."""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.oracle import Oracle

from mlx_xformer.backend import activations
from mlx_xformer.converters.conversion import convert
from mlx_xformer.converters.families.htdemucs import rules
from mlx_xformer.converters.rules import Rule, apply_rules
from mlx_xformer.models.htdemucs import HTDemucsConfig
from mlx_xformer.models.htdemucs.transformer import CrossTransformer
from mlx_xformer.nn import layers, positions, spectral
from mlx_xformer.nn.attention import Attention, attention

sys.path.insert(0, str(Path(__file__).parents[1] / "oracle"))
from support.models import options

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def oracle():
    with Oracle() as child:
        yield child


def noise(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def near(theirs, ours, tolerance):
    """The largest difference, as a part of the largest value, is at most `tolerance`."""
    theirs, ours = np.asarray(theirs), np.asarray(ours)
    assert theirs.shape == ours.shape
    error = np.abs(theirs - ours).max() / np.abs(theirs).max()
    assert error <= tolerance, error


@pytest.mark.parametrize("case", ["plain", "causal", "masked"])  # PyTorch takes a mask or is_causal, not both
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
def test_attention(oracle, kv_heads, case):
    """Value and gradients; a boolean mask with a row that attends nothing gives PyTorch's zeros."""
    causal, masked = case == "causal", case == "masked"
    q, k, v = noise(2, 6, 7, 11), noise(2, kv_heads, 7, 11, seed=1), noise(2, kv_heads, 7, 13, seed=2)
    u = noise(2, 6, 7, 13, seed=3)
    inputs, given = {"query": q, "key": k, "value": v}, {}
    if masked:
        mask = np.random.default_rng(4).random((2, 1, 7, 7)) > 0.4
        mask[1, 0, 3] = False
        inputs["attn_mask"], given["mask"] = mask, mx.array(mask)
    answer = oracle.function("sdpa", inputs, cotangents=[u], is_causal=causal, enable_gqa=True)
    out, gradients = mx.vjp(
        lambda q, k, v: attention(q, k, v, causal=causal, **given), [mx.array(a) for a in (q, k, v)], [mx.array(u)]
    )
    near(answer.outputs[0], out[0], 2e-6)
    for name, gradient in zip(("query", "key", "value"), gradients, strict=True):
        near(answer.gradients[name], gradient, 1e-5)
    if masked:
        assert (np.array(out[0])[1, :, 3] == 0).all()


@pytest.mark.parametrize("embed_dim", [64, 384])
def test_multi_head_attention(oracle, embed_dim):
    """nn.MultiheadAttention across, keys as values, with biases, through the rule that splits in_proj."""
    x, source, u = noise(2, 9, embed_dim), noise(2, 12, embed_dim, seed=1), noise(2, 9, embed_dim, seed=2)
    answer = oracle.module(
        "mha",
        {"embed_dim": embed_dim, "num_heads": 8, "batch_first": True},
        {"query": x, "key": source, "value": source},
        cotangents=[u],
        need_weights=False,
    )
    assert np.abs(answer.state["in_proj_bias"]).min() > 0
    leaf = "{leaf:weight|bias}"
    table = [
        Rule(f"in_proj_{leaf}", tuple(f"{x}_proj.{leaf}" for x in "qkv")),
        Rule(f"out_proj.{leaf}", f"out_proj.{leaf}"),
    ]
    module = Attention(embed_dim, 8)
    expected = {name: value.shape for name, value in tree_flatten(module.parameters())}
    state = {name: mx.array(value) for name, value in answer.state.items()}
    module.load_weights(list(apply_rules(table, state, expected).items()))
    out, gradients = mx.vjp(lambda x: module(x, mx.array(source)), [mx.array(x)], [mx.array(u)])
    near(answer.outputs[0], out[0], 2e-6)
    near(answer.gradients["query"], gradients[0], 1e-5)


def test_gelu(oracle):
    x = np.concatenate([np.linspace(-12, 12, 1001), [0, -0.0, 1e-20, 2.7, -2.7]]).astype(np.float32)
    for name, function in (("none", activations.gelu), ("tanh", activations.gelu_tanh)):
        answer = oracle.function("gelu", {"input": x}, cotangents=[np.ones_like(x)], approximate=name)
        out, gradients = mx.vjp(function, [mx.array(x)], [mx.ones(x.shape)])
        assert np.abs(answer.outputs[0] - np.array(out[0])).max() <= 2e-6
        assert np.abs(answer.gradients["input"] - np.array(gradients[0])).max() <= 5e-6


def bare(module, answer):
    module.load_weights([(name, mx.array(value)) for name, value in answer.state.items()])
    return module


@pytest.mark.parametrize("dims", [48, 64, 96, 192, 255, 384, 512, 2048])
def test_layer_norm(oracle, dims):
    x, u = noise(3, 5, dims, scale=3) + 1, noise(3, 5, dims, seed=1)
    answer = oracle.module("layer_norm", {"normalized_shape": dims}, {"input": x}, cotangents=[u])
    module = bare(layers.LayerNorm(dims), answer)
    out, gradients = mx.vjp(module, [mx.array(x)], [mx.array(u)])
    near(answer.outputs[0], out[0], 2e-6)
    near(answer.gradients["input"], gradients[0], 1e-5)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("length", [13, 40_000])
def test_group_norm(oracle, groups, length):
    x = noise(2, 12, length, scale=3) + 1  # PyTorch's layout
    answer = oracle.module("group_norm", {"num_groups": groups, "num_channels": 12}, {"input": x})
    out = bare(layers.GroupNorm(groups, 12), answer)(mx.array(x).swapaxes(1, 2))
    near(answer.outputs[0], out.swapaxes(1, 2), 2e-6)


@pytest.mark.parametrize("length", [100, 4096, 9000])
def test_spectra(oracle, length):
    """demucs' _spec and _ispec are our transforms within the model's padding."""
    nfft, hop = 512, 128
    x = noise(2, length)
    z = oracle.function("stft", {"x": x}, nfft=nfft).outputs[0]
    frames, pad = -(-length // hop), hop // 2 * 3
    padded = spectral.reflect_pad(mx.array(x), pad, pad + frames * hop - length)
    ours = spectral.stft(padded, n_fft=nfft, hop_length=hop, center=False)[..., :-1]
    near(z.swapaxes(-1, -2), ours, 2e-6)
    whole = mx.pad(ours, [(0, 0), (2, 2), (0, 1)])
    back = spectral.istft(whole, n_fft=nfft, hop_length=hop, length=frames * hop + 2 * pad)[:, pad : pad + length]
    near(oracle.function("istft", {"z": z}, nfft=nfft, length=length).outputs[0], back, 2e-6)


def test_position_embeddings(oracle):
    """Against PyTorch in double precision, where its phases are exact."""
    for length, dim, given in [(7, 4, {}), (1344, 512, {}), (50, 48, {"shift": 13}), (50, 6, {"max_period": 77.0})]:
        theirs = oracle.function("sin_embedding", dtype="float64", length=length, dim=dim, **given).outputs[0]
        assert np.abs(theirs[:, 0] - np.array(positions.sinusoidal_1d(length, dim, **given))).max() <= 1e-6
    cape = {"length": 50, "dim": 12, "batch_size": 1, "mean_normalize": True, "augment": False}
    theirs = oracle.function("sin_embedding_cape", dtype="float64", **cape).outputs[0]
    assert np.abs(theirs[:, 0] - np.array(positions.sinusoidal_1d(50, 12, centered=True))).max() <= 1e-6
    theirs = oracle.function("sin_embedding_2d", dtype="float64", d_model=24, height=8, width=336).outputs[0]
    ours = np.array(positions.sinusoidal_2d(8, 336, 24)).transpose(2, 1, 0)
    assert np.abs(theirs[0] - ours).max() <= 1e-6


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"t_cross_first": True},
        {"t_emb": "cape"},
        {"t_emb": "scaled", "t_max_positions": 70},
        {"t_group_norm": 1},
        {"t_norm_in": False, "t_norm_in_group": 1},
        {"t_norm_first": False},
        {"t_layer_scale": False},
        {"t_gelu": False},
        {"t_weight_pos_embed": 0.4},
        {"t_max_period": 100.0},
        {"bottom_channels": 384, "t_heads": 8},
    ],
    ids=str,
)
def test_cross_transformer(oracle, change):
    """demucs.transformer.CrossTransformerEncoder alone, 5e-6 at width 64, 2e-5 at 384, of what it is in double
    precision: in single, PyTorch's own error depends on the machine."""
    config = HTDemucsConfig.from_dict(options("base") | {"bottom_channels": 64, "t_heads": 4, "t_layers": 5} | change)
    dims = config.transformer_channels
    x, xt = noise(2, dims, 5, 17), noise(2, dims, 61, seed=1)
    names = "emb norm_in norm_in_group group_norm norm_first norm_out max_period layer_scale gelu weight_pos_embed"
    kwargs = {name: getattr(config, f"t_{name}") for name in [*names.split(), "hidden_scale", "cross_first"]}
    kwargs |= {"dim": dims, "num_heads": config.t_heads, "num_layers": 5, "max_positions": config.t_max_positions}
    answer = oracle.module("crosstransformer", kwargs, {"x": x, "xt": xt}, dtype="float64")
    module = CrossTransformer(config)
    expected = {f"crosstransformer.{name}": value.shape for name, value in tree_flatten(module.parameters())}
    state = {f"crosstransformer.{name}": mx.array(value) for name, value in answer.state.items()}
    weights = apply_rules(rules(config), state, expected)
    module.load_weights([(name.removeprefix("crosstransformer."), value) for name, value in weights.items()])
    out, out_t = module(mx.array(x.transpose(0, 3, 2, 1)), mx.array(xt.swapaxes(1, 2)))
    bound = 5e-6 if dims == 64 else 2e-5
    assert np.abs(np.array(out).transpose(0, 3, 2, 1) - answer.outputs[0]).max() <= bound
    assert np.abs(np.array(out_t).swapaxes(1, 2) - answer.outputs[1]).max() <= bound


def test_the_original_reads_what_we_write(oracle, tmp_path):
    """Packages written as the released ones are, to MLX, back to PyTorch's layout, and loaded by demucs itself."""
    kwargs = options("base") | {"segment": {"_type": "fraction", "numerator": 1237, "denominator": 1000}}
    files = oracle.package(kwargs, tmp_path)
    first, second = (oracle.load(tmp_path / Path(files[kind]).name) for kind in ("th", "safetensors"))
    for kind in ("th", "safetensors"):
        convert(tmp_path / Path(files[kind]).name, tmp_path / kind)
        convert(tmp_path / kind, tmp_path / f"back_{kind}", to="pytorch")
        (file,) = (tmp_path / f"back_{kind}").glob("*.safetensors")
        back = oracle.load(file)
        assert first.values == second.values
        assert {name: back.values[name] for name in ("klass", "args")} == {"klass": first.values["klass"], "args": []}
        assert kwargs.items() <= back.values["kwargs"].items()  # ours names the defaults too
        assert back.state.keys() == first.state.keys()
        assert all((back.state[name] == first.state[name]).all() for name in first.state)
    ours = [mx.load(str(tmp_path / kind / "model.safetensors")) for kind in ("th", "safetensors")]
    assert all((ours[0][name] == ours[1][name]).all() and ours[0][name].dtype == mx.float16 for name in ours[0])
