"""The recovered fixture of MetalAudio: what PyTorch 2.8 made of attention, with all intermediates, of a feed-forward
network, a layer norm and an encoder layer, within 2e-6."""

import json

import mlx.core as mx
import numpy as np
import pytest
from support.harness import data_folder

from mlx_xformer.backend import activations
from mlx_xformer.converters.rules import Rule, apply_rules
from mlx_xformer.nn import layers
from mlx_xformer.nn.attention import Attention, attention

pytestmark = pytest.mark.real
BOUND = 2e-6
_LEAF = "{leaf:weight|bias}"
MHA = [
    Rule("in_proj_" + _LEAF, tuple(f"{x}_proj.{_LEAF}" for x in "qkv")),
    Rule("out_proj." + _LEAF, "out_proj." + _LEAF),
]


@pytest.fixture(scope="module")
def facts():
    return json.loads((data_folder() / "golden" / "metalaudio_transformer_reference.json").read_text())


def array(values):
    return mx.array(np.array(values, np.float32))


def near(ours, theirs):
    ours, theirs = np.array(ours, np.float64), np.array(theirs, np.float64)
    assert ours.shape == theirs.shape and np.abs(theirs).max() > 1e-2
    assert np.abs(ours - theirs).max() <= BOUND


def give(module, tensors, table=None):
    """The module with the fixture's tensors, strictly."""
    weights = {name: array(x) for name, x in tensors.items()}
    if table:
        E = weights["out_proj.bias"].size
        shapes = {
            f"{x}_proj.{leaf}": (E, E) if leaf == "weight" else (E,) for x in "qkv" for leaf in ("weight", "bias")
        }
        weights = apply_rules(table, weights, shapes | {"out_proj.weight": (E, E), "out_proj.bias": (E,)})
    module.load_weights(list(weights.items()), strict=True)
    return module


def multi_head(weights):
    return give(Attention(64, 8), {name.replace("out_proj_", "out_proj."): x for name, x in weights.items()}, MHA)


def heads(x):
    """(L, 64) -> (1, 8, L, 8)"""
    return mx.unflatten(x, -1, (8, 8)).swapaxes(0, 1)[None]


def merged(x):
    """(1, 8, L, 8) -> (L, 64)"""
    return mx.flatten(x[0].swapaxes(0, 1), 1, 2)


def test_self_attention(facts):
    """The module, and each step of it."""
    fact = facts["attention"]["self_attention"]
    module, x = multi_head(facts["attention"]["weights"]), array(fact["input"])
    near(module(x), fact["output"])
    near(module(x), fact["manual_output"])
    q, k, v = (getattr(module, f"{name}_proj")(x) for name in "qkv")
    for name, y in zip("qkv", (q, k, v), strict=True):
        near(y, fact[f"{name}_proj"])
        near(heads(y)[0].swapaxes(0, 1), fact[f"{name}_heads"])
    scores = heads(q) @ heads(k).swapaxes(-1, -2) * 8**-0.5
    near(scores[0], fact["attn_scores"])
    # The weights are what attention makes of the unit vectors as values.
    near(attention(heads(q), heads(k), mx.broadcast_to(mx.eye(16), (1, 8, 16, 16)))[0], fact["attn_weights"])
    context = attention(heads(q), heads(k), heads(v))
    near(context[0], fact["context"])
    near(merged(context), fact["context_reshaped"])
    near(module.out_proj(merged(context)), fact["output"])


def test_cross_attention_whose_values_are_not_its_keys(facts):
    fact, module = facts["attention"]["cross_attention"], multi_head(facts["attention"]["weights"])
    query, key, value = (array(fact[name]) for name in ("query", "key", "value"))
    q, k, v = heads(module.q_proj(query)), heads(module.k_proj(key)), heads(module.v_proj(value))
    near(module.out_proj(merged(attention(q, k, v))), fact["output"])
    near(module(query, key, value_source=value), fact["output"])
    keys_as_values = module(query, key)  # all that MetalAudio's own interface can say
    assert np.abs(np.array(keys_as_values) - np.array(fact["output"])).max() > 0.1


def test_feed_forward(facts):
    fact = facts["feedforward"]
    weights = {name.replace("_", ".", 1): x for name, x in fact["weights"].items()}
    x = array(fact["input"])
    near(give(layers.FeedForward(64, 256, "gelu"), weights)(x), fact["output"])
    tanh = np.array(give(layers.FeedForward(64, 256, "gelu_tanh"), weights)(x))
    assert 1e-5 <= np.abs(tanh - np.array(fact["output"])).max() <= 1e-3  # close, and not the same


def test_layer_norm(facts):
    fact = facts["layernorm"]
    module = give(layers.LayerNorm(64), {"weight": fact["weights"]["gamma"], "bias": fact["weights"]["beta"]})
    near(module(array(fact["input"])), fact["output"])


def test_gelu(facts):
    near(activations.gelu(array(facts["gelu"]["input"])), facts["gelu"]["output"])


def test_encoder_layer(facts):
    """PyTorch's nn.TransformerEncoderLayer, norms first, from our parts."""
    fact = facts["transformer_layer"]
    own = fact["weights"]

    def part(prefix, names=None):
        return {n.removeprefix(prefix): x for n, x in own.items() if n.startswith(names or prefix)}

    attend = give(Attention(64, 8), part("self_attn."), MHA)
    feed = give(layers.FeedForward(64, 256, "gelu"), part("", "linear"))
    norm1, norm2 = (give(layers.LayerNorm(64), part(f"norm{n}.")) for n in (1, 2))
    x = array(fact["input"])
    x = x + attend(norm1(x))
    near(x + feed(norm2(x)), fact["output"])
