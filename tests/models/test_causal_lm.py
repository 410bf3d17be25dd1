"""The decoder of every architecture against its NumPy twin: forward, gradients, caches, packed matrices."""

import dataclasses
import json
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.harness import as32, assert_within_budget, check_module, draw, signal
from support.text import ARCHITECTURES, TOKENS, WIDE
from support.text import causal_lm_config as config
from support.text import causal_lm_truths as truths
from support.text import drawn_causal_lm as drawn

from mlx_xformer.models.causal_lm.model import CausalLM, CausalLMConfig, Quantization, quantize
from mlx_xformer.nn import layers, linear
from mlx_xformer.nn.attention.core import attention
from mlx_xformer.nn.rotary import Rotary, RotaryScaling
from mlx_xformer.parity.families.causal_lm import floats
from mlx_xformer.reference import backend as twin_kernels
from mlx_xformer.reference.models.causal_lm import decoder as twin
from mlx_xformer.reference.nn import attention as twin_attention
from mlx_xformer.reference.nn import layers as twin_layers


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_and_gradients(name):
    class Bound(CausalLM):
        def __call__(self):
            return super().__call__(mx.array(TOKENS))

    own = config(name)
    check_module(Bound(own), lambda params: twin(params, own, TOKENS), gradient=False)
    short = mx.array(TOKENS[:1, :5])

    class Short(CausalLM):
        def __call__(self):
            return super().__call__(short)

    check_module(Short(own), lambda params: twin(params, own, TOKENS[:1, :5]))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("chunks", [(11,), (1,) * 11, (4, 1, 1, 5), (2, 9)])
def test_caches_change_nothing(name, chunks):
    model, params = drawn(name)
    caches = model.make_caches()
    parts = [model(mx.array(TOKENS[:, a:b]), caches=caches) for a, b in pairwise(np.cumsum([0, *chunks]).tolist())]
    assert_within_budget(mx.concatenate(parts, axis=1), *truths(params, model.config))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma 3"])
def test_a_ragged_batch(name):
    """Rows with padding on the left give what they give alone."""
    model, params = drawn(name)
    padding = [4, 0]
    caches = model.make_caches(padding=padding)
    parts = [model(mx.array(TOKENS[:, :7]), caches=caches), model(mx.array(TOKENS[:, 7:]), caches=caches)]
    whole = np.array(mx.concatenate(parts, axis=1))
    for row, first in enumerate(padding):
        own = TOKENS[row : row + 1, first:]
        assert_within_budget(whole[row : row + 1, first:], *truths(params, model.config, own))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_causality(name):
    model, params = drawn(name)
    before = np.array(model(mx.array(TOKENS)))
    changed = TOKENS.copy()
    changed[:, 6] = (changed[:, 6] + 1) % 31
    after = np.array(model(mx.array(changed)))
    if model.config.moe is None:
        assert (before[:, :6] == after[:, :6]).all()
    else:  # which tokens an expert gets together may round them otherwise
        assert_within_budget(after[:, :6], *truths(params, model.config, TOKENS[:, :6]))
    assert (np.abs(before - after).max(axis=(0, 2))[6:] > 1e-4).all()


def test_a_window_hides_what_is_behind_it():
    """Two layers of window 3 see 5 positions: what is 5 behind makes no difference, what is 4 behind does."""
    model, _ = drawn("mistral")
    changed = TOKENS.copy()
    changed[:, 2] = (changed[:, 2] + 1) % 31
    difference = np.abs(np.array(model(mx.array(TOKENS))) - np.array(model(mx.array(changed)))).max(axis=(0, 2))
    assert (difference[2:7] > 1e-6).all() and (difference[7:] == 0).all()


def test_only_the_last_positions():
    model, _ = drawn("gemma 2")
    tokens = mx.array(TOKENS)
    whole = np.array(model(tokens))
    for last in (0, 1, 3, 11, 20):
        some = np.array(model(tokens, last=last))
        assert some.shape == (2, min(last, 11), 31)
        np.testing.assert_allclose(some, whole[:, 11 - some.shape[1] :], atol=1e-6)
    assert model(tokens[:0]).shape == (0, 11, 31)


def test_which_projections_have_biases_and_which_layers_are_mixtures():
    """The twin takes the parameters that there are, so that it cannot see which there should be."""
    names = [name for name, _ in tree_flatten(drawn("qwen2")[0].parameters())]
    biases = [f"model.layers.{i}.self_attn.{part}_proj.bias" for i in range(2) for part in "qkv"]
    assert sorted(name for name in names if name.endswith("bias")) == sorted(biases)
    names = [name for name, _ in tree_flatten(drawn("qwen2 moe")[0].parameters())]
    assert {name.split(".")[2] for name in names if ".experts." in name} == {"0", "2"}


def test_caches_for_layers():
    model, _ = drawn("gemma 3")
    assert [(c.window, c.keep) for c in model.make_caches()] == [(3, 0), (None, 0)]
    assert [(c.window, c.keep) for c in model.make_caches(window=5, keep=2)] == [(3, 0), (5, 2)]
    assert [(c.window, c.keep) for c in model.make_caches(window=2, keep=1)] == [(2, 1), (2, 1)]


def test_a_smaller_window_than_the_model_s():
    """The cache's window is what is seen, as the same model with that window throughout would see."""
    model, params = drawn("llama")
    caches = model.make_caches(window=4)
    parts = [model(mx.array(TOKENS[:, a : a + 1]), caches=caches) for a in range(11)]
    assert_within_budget(mx.concatenate(parts, axis=1), *truths(params, dataclasses.replace(model.config, window=4)))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma 3"])
def test_packed_matrices_are_their_dequantised_values(name, bits):
    own = config(name, **WIDE, quantization=Quantization(bits, 32, {"model.layers.1.mlp.up_proj": None}))
    model = CausalLM(dataclasses.replace(own, quantization=None))
    draw(model, 0)
    quantize(model, own.quantization)
    shapes = {name: x.shape for name, x in mx_flat(CausalLM(own)).items()}
    assert shapes == {name: x.shape for name, x in mx_flat(model).items()}
    assert isinstance(model.model.layers[1].mlp.up_proj, linear.Linear)
    assert isinstance(model.model.embed_tokens, layers.QuantizedEmbedding)
    params = {name: x.astype(np.float64) for name, x in floats(model).items()}
    for tokens in (TOKENS, TOKENS[:1, :1]):  # many rows go another way than one
        assert_within_budget(model(mx.array(tokens)), *truths(params, own, tokens))


def mx_flat(model):
    from mlx.utils import tree_flatten

    return dict(tree_flatten(model.parameters()))


def test_rows_that_groups_do_not_divide():
    with pytest.raises(ValueError, match=r"group_size must divide the rows of model\.embed_tokens, 23, got 32"):
        CausalLM(config("llama", quantization=Quantization(4, 32)))


@pytest.mark.parametrize("heads", [(6, 6), (6, 3), (6, 2), (6, 1)])
@pytest.mark.parametrize("length", [1, 7, 300])
def test_one_query_of_grouped_heads(heads, length):
    """On a CPU the queries of a group are rows of one product."""
    H, G = heads
    q, k, v = signal(2, H, 1, 5), signal(2, G, length, 5, seed=1), signal(2, G, length, 11, seed=2)

    def plain(q, k, v):
        return twin_attention.attention(q, k, v, causal=True)

    found = attention(*map(mx.array, as32([q, k, v])), causal=True)
    assert_within_budget(found, plain(q, k, v), plain(*as32([q, k, v])))


@pytest.mark.parametrize("dims", [1, 3, 48, 1537])
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("rows", [(2, 5), (1, 1)])
def test_rms_norm(rows, dims, plus_one):
    module = layers.RMSNorm(dims, 1e-3, plus_one)
    check_module(module, lambda p, x: twin_layers.rms_norm(p, x, 1e-3, plus_one), signal(*rows, dims))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("bias", [False, True])
def test_gated_feed_forward(activation, bias):
    module, function = layers.GatedFeedForward(7, 13, activation, bias), getattr(twin_kernels, activation)
    check_module(module, lambda p, x: twin_layers.gated_feed_forward(p, x, activation=function), signal(2, 5, 7))


def test_gated_feed_forward_error():
    with pytest.raises(ValueError, match="activation must be one of silu, gelu_tanh, got 'relu'"):
        layers.GatedFeedForward(3, 5, "relu")


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda m: m(mx.array(TOKENS[0])), r"tokens must be \(batch, length\) whole numbers, got shape \(11,\)"),
        (lambda m: m(mx.array(TOKENS), caches=m.make_caches()[:1]), "caches must be one a layer, 2, got 1"),
        (lambda m: m(mx.array(TOKENS), last=-1), "last must be at least 0, got -1"),
    ],
)
def test_calls_that_are_refused(call, reason):
    model, _ = drawn("llama")
    with pytest.raises(ValueError, match=reason):
        call(model)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vocab_size": 0}, "vocab_size must be a whole number from 1"),
        ({"num_heads": True}, "num_heads must be a whole number"),
        ({"head_dim": None, "num_heads": 5}, "embed_dim must be a multiple of num_heads, 5, got 23"),
        ({"norm_eps": 0}, "norm_eps must be a number above 0, got 0"),
        ({"rope_theta": None}, "rope_theta must be a number above 0, got None"),
        ({"logit_softcap": "30"}, "logit_softcap must be a number above 0"),
        ({"qk_norm": 1}, 'qk_norm must be true, false or "whole", got 1'),
        ({"activation": "relu"}, "activation must be one of silu, gelu_tanh, got 'relu'"),
        ({"dtype": "int8"}, "dtype must be one of float32, float16, bfloat16"),
        ({"attention_bias": ("o",)}, "attention_bias must be names among q, k, v, out"),
        ({"window": 0}, "window must be a whole number from 1 to 100000000, got 0"),
        ({"window": 3, "layer_types": ("local",)}, "layer_types must be local or global for each of 2 layers"),
        ({"layer_types": ("local", "global")}, "local layers need a window, got none"),
    ],
)
def test_configurations_that_are_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        config("llama", **changes)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_plain_values_there_and_back(name):
    own = config(name, dtype="bfloat16", quantization=Quantization(4, 32, {"lm_head": None, "x": (8, 64)}))
    values = json.loads(json.dumps(own.to_dict()))
    again = CausalLMConfig.from_dict(values)
    assert again.quantization.of("lm_head") is None and tuple(again.quantization.of("x")) == (8, 64)
    assert CausalLMConfig.from_dict(json.loads(json.dumps(again.to_dict()))) == again
    assert dataclasses.replace(again, quantization=None) == dataclasses.replace(own, quantization=None)
    with pytest.raises(ValueError, match="the language model has no option named colour"):
        CausalLMConfig.from_dict(values | {"colour": 1})
    with pytest.raises(ValueError, match="the language model must be given vocab_size"):
        CausalLMConfig.from_dict({k: v for k, v in values.items() if k != "vocab_size"})


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (("ntk", 2.0), "kind must be one of linear, llama3, yarn, got 'ntk'"),
        (("linear", 0.0), "factor must be a number above 0, got 0"),
        (("llama3", 2.0), "llama3 needs a length and 0 < low < high, got None"),
        (("yarn", 2.0, 10, 4.0, 4.0), "yarn needs a length and 0 < low < high"),
    ],
)
def test_scalings_that_are_refused(given, reason):
    with pytest.raises(ValueError, match=reason):
        RotaryScaling(*given)


def test_scaling_keeps_the_near_and_slows_the_far():
    plain, scaled = Rotary(64, 5e5).rates(), Rotary(64, 5e5, scaling=RotaryScaling("llama3", 8.0, 8192)).rates()
    assert (scaled[:14] == plain[:14]).all() and np.allclose(scaled[-5:] * 8, plain[-5:])
    yarn = Rotary(64, 1e4, scaling=RotaryScaling("yarn", 4.0, 2048, 1, 32)).rates()
    plain = Rotary(64, 1e4).rates()
    assert (yarn[:8] == plain[:8]).all() and np.allclose(yarn[-5:] * 4, plain[-5:])


def test_quantization_that_is_refused():
    for given in ((7, 64), (4, 48), (4, 64, {"x": (4, 5)})):
        with pytest.raises(ValueError, match="quantization must be of"):
            Quantization(*given)
