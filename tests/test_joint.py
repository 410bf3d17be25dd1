"""Projections joined into one product: the same results, no more memory, and never those of weights that are gone."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_cross_transformer import signal

from mlx_xformer.attention import Attention
from mlx_xformer.generate import generate
from mlx_xformer.joint import Joint, joined
from mlx_xformer.layers import GatedFeedForward
from mlx_xformer.linear import Linear
from mlx_xformer.models.decoder import Decoder, DecoderConfig


def layers(*sizes, bias=True):
    made = [Linear(67, size, bias=bias) for size in sizes]
    for index, layer in enumerate(made):
        layer.weight = mx.array(signal(*layer.weight.shape, seed=index).astype(np.float32))
        if bias:
            layer.bias = mx.array(signal(*layer.bias.shape, seed=9 + index).astype(np.float32))
    return made


def row(seed=3):
    return mx.array(signal(1, 67, seed=seed).astype(np.float32))


@pytest.mark.parametrize("bias", [True, False])
def test_joined_layers_are_those_on_their_own(bias):
    made = layers(31, 13, 13, bias=bias)
    before = [np.array(layer(row())) for layer in made]
    joint = joined(made, None)
    out = np.split(np.array(joint(row())), [31, 44], axis=1)
    for ours, alone, layer in zip(out, before, made, strict=True):
        np.testing.assert_allclose(ours, alone, rtol=0, atol=67 * 2**-23 * np.abs(alone).max())
        np.testing.assert_array_equal(np.array(layer(row())), alone)  # on its own it is what it was
    assert joined(made, joint) is joint


def test_what_cannot_be_joined():
    with_bias, without = layers(5, bias=True), layers(7, bias=False)
    assert joined([*with_bias, *without], None) is None
    narrow = Linear(31, 5)
    assert joined([*with_bias, narrow], None) is None
    half = layers(5)
    half[0].set_dtype(mx.bfloat16)
    assert joined([*with_bias, *half], None) is None
    packed = nn.QuantizedLinear(64, 5)
    assert joined([packed, packed], None) is None


def test_no_second_copy_is_kept():
    made = [Linear(512, 512, bias=False) for _ in range(3)]
    mx.eval([layer.parameters() for layer in made])
    before = mx.get_active_memory()
    joint = Joint(made)
    assert mx.get_active_memory() - before < 2**16
    assert joint.holds(made)


def attention():
    return Attention(67, 6, head_dim=10, num_kv_heads=2, causal=True)


@pytest.mark.parametrize("make", [attention, lambda: GatedFeedForward(67, 131)], ids=["attention", "feed forward"])
def test_new_weights_are_heard_of(make):
    module = make()
    x = row()[None]
    module.join()
    name, old = next((n, w) for n, w in tree_flatten(module.parameters()) if n in ("v_proj.weight", "up_proj.weight"))
    before = np.array(module(x))
    module.load_weights([(name, old * 3)], strict=False)
    after = np.array(module(x))
    assert np.abs(after - before).max() > 0.01 * np.abs(before).max()
    fresh = make()
    fresh.update(module.parameters())
    np.testing.assert_array_equal(after, np.array(fresh(x)))
    module.join()
    budget = 131 * 2**-23 * np.abs(after).max()
    np.testing.assert_allclose(np.array(module(x)), after, rtol=0, atol=budget)


def test_new_biases_are_heard_of():
    module = attention()
    module.join()
    before = np.array(module(row()[None]))
    module.v_proj.bias = module.v_proj.bias + 1
    np.testing.assert_allclose(
        np.array(module(row()[None])) - before,
        (np.array(module.out_proj.weight).sum(axis=1))[None, None],
        rtol=0,
        atol=1e-5,
    )


def test_gradients_are_those_of_the_layers():
    module, x = GatedFeedForward(67, 131), row()

    def loss(x):
        return mx.square(module(x)).sum()

    alone = mx.grad(loss)(x), nn.value_and_grad(module, lambda x: loss(x))(x)[1]
    module.join()
    together = mx.grad(loss)(x), nn.value_and_grad(module, lambda x: loss(x))(x)[1]
    for a, b in zip(tree_flatten(alone), tree_flatten(together), strict=True):
        assert a[0] == b[0]
        np.testing.assert_allclose(np.array(b[1]), np.array(a[1]), rtol=0, atol=1e-5 * np.abs(np.array(a[1])).max())
    assert {name for name, _ in tree_flatten(module.parameters())} == {
        f"{name}_proj.weight" for name in ("gate", "up", "down")
    }


def test_quantizing_leaves_no_floats_behind():
    module = GatedFeedForward(512, 1024)
    module.join()
    nn.quantize(module)
    module(mx.ones((1, 512)))
    mx.eval(module.parameters())
    assert module._joint is None


class Adapted(nn.Module):
    """A layer with another around it, as LoRA puts it there: it has no weight of its own."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def __call__(self, x):
        return self.linear(x) * 3


@pytest.mark.parametrize("make", [attention, lambda: GatedFeedForward(67, 131)], ids=["attention", "feed forward"])
def test_a_layer_put_in_the_place_of_one_that_was_joined_is_heard_of(make):
    module, x = make(), row()[None]
    name = "v_proj" if "v_proj" in module else "up_proj"
    before = np.array(module(x))
    module.join()
    module[name] = Adapted(module[name])
    for _ in range(2):
        bias = np.array(module.out_proj.bias) if "out_proj" in module else 0
        np.testing.assert_allclose(np.array(module(x)) - bias, 3 * (before - bias), rtol=0, atol=1e-5)
        module.join()


def test_generation_joins_and_says_the_same():
    config = DecoderConfig(vocab_size=101, embed_dim=24, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=37)
    model = Decoder(config)
    mx.eval(model.parameters())
    caches = model.make_caches()
    tokens = [3, 5, 7]
    for _ in range(9):
        logits = model(mx.array([tokens]))[0, -1]
        tokens.append(int(mx.argmax(logits).item()))
    assert all(layer.mlp._joint is None for layer in model.model.layers)
    made = [token.id for token in generate(model, tokens[:3], max_tokens=9, caches=caches)]
    assert made == tokens[3:]
    assert all(layer.mlp._joint is not None and layer.self_attn._joint is not None for layer in model.model.layers)
