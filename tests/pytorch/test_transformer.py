"""Layers, stacks and models against PyTorch: values and gradients by every input and every parameter.

The truth is PyTorch in double precision, and the budget four times what PyTorch is off in single precision.
"""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from safetensors.numpy import save_file
from support.oracle import Oracle

from mlx_xformer.converters.conversion import convert
from mlx_xformer.converters.families import transformer
from mlx_xformer.converters.families.guides import llm_prep
from mlx_xformer.converters.rules import Rule, apply_rules
from mlx_xformer.models.families import load_model
from mlx_xformer.models.guides.llm_prep import (
    AutoregressiveTransformerModel,
    EncoderDecoder,
    FFNConfig,
    SequenceCheckpoint,
    SequenceConfig,
    TransformerModel,
)
from mlx_xformer.models.transformer import Transformer, TransformerConfig
from mlx_xformer.nn.masks import causal_mask
from mlx_xformer.nn.transformer import Layer, LayerConfig
from mlx_xformer.parity import judge

pytestmark = pytest.mark.torch
B, L, S, E, HEADS, HIDDEN = 2, 7, 5, 18, 3, 13
NORMS = [False, True]


@pytest.fixture(scope="module")
def oracle():
    with Oracle() as child:
        yield child


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def padding(batch, length, seed=3):
    """(B, L), True where there is no padding: a third of the positions, never the first."""
    mask = np.random.default_rng(seed).random((batch, length)) > 0.3
    mask[:, 0] = True
    mask[-1, -1] = False
    return mask


def check(what, ours, truth, single, scale):
    """Ours within the judge's tolerance, of which 1e-6 is a part of `scale`."""
    verdict = judge.compare(np.asarray(ours), truth, judge.value_tolerance(truth, single, scale))
    assert verdict.passed, f"{what}: {verdict.why}"


def compare(oracle, name, kwargs, inputs, module, rules, call, **options):
    """A module of the oracle with ours, which `rules` give its weights: call(module, **differentiated inputs)."""
    seed, shape = 5, oracle.module(name, kwargs, inputs, seed=5, **options).outputs[0].shape
    u = noise(*shape, seed=9)
    answers = [
        oracle.module(name, kwargs, inputs, seed=seed, cotangents=[u], dtype=dtype, **options)
        for dtype in ("float64", "float32")
    ]
    truth, single = answers
    shapes = {name: x.shape for name, x in tree_flatten(module.parameters())}

    def mapped(arrays):
        return apply_rules(rules, {name: mx.array(x.astype(np.float32)) for name, x in arrays.items()}, shapes)

    params = mapped(truth.state)
    assert all(np.abs(np.array(x)).max() > 0 for name, x in params.items() if name.endswith("bias"))
    floats = {name: mx.array(x) for name, x in inputs.items() if x.dtype == np.float32}
    names, given = list(params), list(floats)

    def form(*arrays):
        module.update(tree_unflatten(list(zip(names, arrays, strict=False))))
        return call(module, **dict(zip(given, arrays[len(names) :], strict=True)))

    primals = [*params.values(), *floats.values()]
    out, gradients = mx.vjp(form, primals, [mx.array(u)])
    check("value", out[0], truth.outputs[0], single.outputs[0], np.abs(truth.outputs[0]).max())
    largest = max(np.abs(g).max() for g in truth.gradients.values())
    theirs = []
    for answer in answers:
        own = {name: answer.gradients[name] for name in truth.state}
        theirs.append({**mapped(own), **{name: answer.gradients[name] for name in given}})
    for name, gradient in zip([*names, *given], gradients, strict=True):
        check(f"gradient by {name}", gradient, *(np.array(g[name]) for g in theirs), largest)


@pytest.mark.parametrize("case", ["plain", "padded", "causal"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", NORMS)
def test_encoder_layer(oracle, norm_first, activation, case):
    kwargs = {"d_model": E, "nhead": HEADS, "dim_feedforward": HIDDEN, "dropout": 0.0, "activation": activation}
    inputs, mask = {"src": noise(B, L, E)}, None
    if case == "padded":
        mask = padding(B, L)
        inputs["src_key_padding_mask"] = ~mask
    if case == "causal":
        inputs["src_mask"] = ~np.array(causal_mask(L, L))
    config = LayerConfig(E, HEADS, HIDDEN, activation=activation, norm_first=norm_first, causal=case == "causal")
    compare(
        oracle,
        "encoder_layer_of_torch",
        {**kwargs, "norm_first": norm_first, "batch_first": True},
        inputs,
        Layer(config),
        transformer.layer_rules("", "", cross=False),
        lambda layer, src: layer(src, mask=None if mask is None else mx.array(mask)[:, None, None]),
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", NORMS)
def test_decoder_layer(oracle, norm_first, activation, masked):
    """T4.2: an attention to a memory, a mask of what is ahead, and masks of padding on both sides."""
    kwargs = {"d_model": E, "nhead": HEADS, "dim_feedforward": HIDDEN, "dropout": 0.0, "activation": activation}
    inputs = {"tgt": noise(B, L, E), "memory": noise(B, S, E, seed=1), "tgt_mask": ~np.array(causal_mask(L, L))}
    given = {}
    if masked:
        own, theirs = padding(B, L), padding(B, S)
        inputs |= {"tgt_key_padding_mask": ~own, "memory_key_padding_mask": ~theirs}
        given = {"mask": mx.array(own)[:, None, None], "memory_mask": mx.array(theirs)[:, None, None]}
    config = LayerConfig(E, HEADS, HIDDEN, activation=activation, norm_first=norm_first, causal=True, cross=True)
    compare(
        oracle,
        "decoder_layer_of_torch",
        {**kwargs, "norm_first": norm_first, "batch_first": True},
        inputs,
        Layer(config),
        transformer.layer_rules("", "", cross=True),
        lambda layer, tgt, memory: layer(tgt, memory, **given),
    )


@pytest.mark.parametrize("norm_first", NORMS)
def test_transformer(oracle, norm_first):
    """nn.Transformer, with its norms after both stacks."""
    config = TransformerConfig(None, None, E, HEADS, 2, 3, HIDDEN, "gelu", norm_first, final_norm=True, dropout=0.0)
    kwargs = {"d_model": E, "nhead": HEADS, "num_encoder_layers": 2, "num_decoder_layers": 3, "dropout": 0.0}
    kwargs |= {"dim_feedforward": HIDDEN, "activation": "gelu", "batch_first": True, "norm_first": norm_first}
    seen = padding(B, S)
    inputs = {"src": noise(B, S, E), "tgt": noise(B, L, E, seed=1), "tgt_mask": ~np.array(causal_mask(L, L))}
    inputs |= {"src_key_padding_mask": ~seen, "memory_key_padding_mask": ~seen}
    compare(
        oracle,
        "transformer",
        kwargs,
        inputs,
        Transformer(config),
        transformer.MODULES[0].rules(config, {}),
        lambda model, src, tgt: model(src, tgt, source_mask=mx.array(seen)),
    )


def test_vaswani(oracle):
    """T4.6: what the page leaves out: embeddings times sqrt(E), positions, post-norm stacks, masks, a tied head."""
    V = 11
    config = TransformerConfig(V, None, E, HEADS, 2, 3, HIDDEN, dropout=0.0)
    rng = np.random.default_rng(2)
    source, target, seen, own = rng.integers(0, V, (B, S)), rng.integers(0, V, (B, L)), padding(B, S), padding(B, L)
    inputs = {"source": source, "target": target, "source_padding": ~seen, "target_padding": ~own}
    table = [Rule("embed.weight", "embed.weight")]
    for side in ("encoder", "decoder"):
        table += transformer.stack_rules(f"transformer.{side}.", f"{side}.", cross=side == "decoder")
    masks = {"source_mask": mx.array(seen), "target_mask": mx.array(own)}
    kwargs = {"vocab_size": V, "embed_dim": E, "num_heads": HEADS, "layers": [2, 3], "hidden": HIDDEN}
    compare(
        oracle,
        "vaswani",
        kwargs,
        inputs,
        Transformer(config),
        table,
        lambda model: model(mx.array(source), mx.array(target), **masks),
    )


TYPES = {"mha": 6, "gqa": 2, "mqa": 1}
I, O = 5, 11


def sequence_config(attention_type, **options):
    groups = 2 if attention_type == "gqa" else None
    return SequenceConfig(
        I, O, E, 2, 6, attention_type=attention_type, num_kv_heads=groups, ffn=FFNConfig(E, HIDDEN), **options
    )


def sizes(attention_type):
    return {"embed_dim": E, "heads": 6, "kv_heads": TYPES[attention_type], "hidden": HIDDEN}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("attention_type", TYPES)
def test_regression(oracle, attention_type, padded):
    config, mask = sequence_config(attention_type), padding(3, L)
    inputs = {"x": noise(3, L, I), **({"mask": mask} if padded else {})}
    compare(
        oracle,
        "sequence",
        {"input_dim": I, "output_dim": O, "num_layers": 2, "causal": False, "window": None, **sizes(attention_type)},
        inputs,
        TransformerModel(config),
        llm_prep.rules(SequenceCheckpoint("regression", config), {}),
        lambda model, x: model(x, mask=mx.array(mask) if padded else None),
    )


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("attention_type", TYPES)
def test_autoregressive(oracle, attention_type, window):
    config = sequence_config(attention_type, window=window)
    compare(
        oracle,
        "sequence",
        {"input_dim": I, "output_dim": O, "num_layers": 2, "causal": True, "window": window, **sizes(attention_type)},
        {"x": noise(B, L, I)},
        AutoregressiveTransformerModel(config),
        llm_prep.rules(SequenceCheckpoint("autoregressive", config), {}),
        lambda model, x: model(x),
    )


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("attention_type", TYPES)
def test_encoder_decoder(oracle, attention_type, padded):
    config, mask = sequence_config(attention_type, num_decoder_layers=3), padding(B, S)
    inputs = {"source": noise(B, S, I), "target": noise(B, L, I, seed=1), **({"source_mask": mask} if padded else {})}
    compare(
        oracle,
        "pair",
        {"input_dim": I, "output_dim": O, "num_layers": 2, "num_decoder_layers": 3, **sizes(attention_type)},
        inputs,
        EncoderDecoder(config),
        llm_prep.rules(SequenceCheckpoint("encoder_decoder", config), {}),
        lambda model, source, target: model(source, target, source_mask=mx.array(mask) if padded else None),
    )


def test_a_state_dict_of_pytorch_converts_and_runs(oracle, tmp_path):
    """From nn.Transformer's own file to the same values."""
    kwargs = {"d_model": E, "nhead": HEADS, "num_encoder_layers": 2, "num_decoder_layers": 3, "dropout": 0.0}
    kwargs |= {"dim_feedforward": HIDDEN, "activation": "gelu", "batch_first": True}
    inputs = {"src": noise(B, S, E), "tgt": noise(B, L, E, seed=1), "tgt_mask": ~np.array(causal_mask(L, L))}
    truth, single = (oracle.module("transformer", kwargs, inputs, dtype=dtype) for dtype in ("float64", "float32"))
    save_file(truth.state, tmp_path / "transformer.safetensors")
    settings = {"num_heads": HEADS, "activation": "gelu"}
    convert(tmp_path / "transformer.safetensors", tmp_path / "ours", settings=settings)
    out = load_model(tmp_path / "ours")(mx.array(inputs["src"]), mx.array(inputs["tgt"]))
    check("value", out, truth.outputs[0], single.outputs[0], np.abs(truth.outputs[0]).max())


def moments(rows):
    """(mean, its standard error) of every element over the rows, and those of the sum of squared deviations."""
    rows = rows.reshape(len(rows), -1).astype(np.float64)
    spread = np.square(rows - rows.mean(axis=0)).sum(axis=1)
    return [(x.mean(axis=0), x.std(axis=0) / len(rows) ** 0.5) for x in (rows, spread)]


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("norm_first", NORMS)
def test_dropout_stands_where_pytorch_has_it(oracle, norm_first, cross):
    """The same moments of many independent draws, within 5 standard errors: the outputs' means and their spread."""
    N, rate, width = 20_000, 0.25, 6
    x, memory = noise(1, 3, width), noise(1, 4, width, seed=1)
    kwargs = {"d_model": width, "nhead": 2, "dim_feedforward": 5, "dropout": rate, "batch_first": True}
    repeated = [np.repeat(x, N, axis=0), np.repeat(memory, N, axis=0)]
    side = "decoder" if cross else "encoder"
    inputs = dict(zip(("tgt", "memory"), repeated, strict=True)) if cross else {"src": repeated[0]}
    answer = oracle.module(f"{side}_layer_in_training", {**kwargs, "norm_first": norm_first}, inputs, seed=1)
    layer = Layer(LayerConfig(width, 2, 5, norm_first=norm_first, cross=cross, dropout=rate))
    shapes = {name: value.shape for name, value in tree_flatten(layer.parameters())}
    state = {name: mx.array(value) for name, value in answer.state.items()}
    table = transformer.layer_rules("", "", cross=cross)
    layer.load_weights(list(apply_rules(table, state, shapes).items()))
    given = [mx.array(y) for y in repeated[: 1 + cross]]
    ours = np.array(layer(*given, key=mx.random.key(3)))
    for what, a, b in zip(("mean", "spread"), moments(ours), moments(answer.outputs[0]), strict=True):
        error = np.abs(a[0] - b[0]) / np.hypot(a[1], b[1])
        assert error.max() <= 5, f"{what}: {error.max():.1f} standard errors"
