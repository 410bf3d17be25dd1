"""Layers and stacks: causality, dropout, caches, mixtures, what they refuse. Their values and gradients are those of
parity and of test_torch_blocks."""

import dataclasses
import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.harness import draw

from mlx_xformer.nn.cache import CrossCache, KVCache
from mlx_xformer.nn.moe import MoEConfig
from mlx_xformer.nn.transformer import Layer, LayerConfig, Stack, auxiliary_loss

B, L, S, E, HEADS, HIDDEN = 2, 7, 5, 18, 6, 13
CAUSAL = {
    "multi-head": {},
    "grouped": {"num_kv_heads": 2},
    "multi-query, pre-norm": {"num_kv_heads": 1, "norm_first": True},
    "window": {"window": 3},
    "cross": {"cross": True},
    "mixture": {"moe": MoEConfig(E, HIDDEN, 5, 2)},
    "gated, rms": {"gated": True, "activation": "silu", "norm": "rms"},
}


def noise(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def stack(layers=2, **options):
    made = Stack(LayerConfig(E, HEADS, HIDDEN, **options), layers)
    draw(made, 1)
    return made


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_change_leaves_what_is_before_it_as_it_was_bit_by_bit(kind):
    """A random change: norms hide a constant one (T2.5)."""
    made, x = stack(causal=True, **CAUSAL[kind]), noise(1, L, E)
    memory = [noise(1, S, E, seed=2)] if kind == "cross" else []
    before = made(x, *memory)
    for t in range(L):
        changed = mx.array(x)
        changed[:, t] = changed[:, t] + noise(1, E, seed=t + 3)
        after = made(changed, *memory)
        assert mx.array_equal(before[:, :t], after[:, :t]), t
        assert not mx.array_equal(before[:, t], after[:, t]), t


def test_without_causality_a_change_is_seen_everywhere():
    made, x = stack(), noise(1, L, E)
    changed = mx.array(x)
    changed[:, -1] = noise(1, E, seed=4)
    assert (mx.abs(made(x) - made(changed)).max(axis=-1) > 1e-4).all()


def test_dropout_vanishes_with_its_rate_and_in_evaluation():
    config = LayerConfig(E, HEADS, HIDDEN, cross=True, dropout=1e-7)
    layer, x, memory = Layer(config), noise(B, L, E), noise(B, S, E, seed=1)
    draw(layer, 0)
    plain = Layer(dataclasses.replace(config, dropout=0.0))
    plain.update(layer.parameters())
    key = mx.random.key(1)
    assert mx.allclose(layer(x, memory, key=key), plain(x, memory), rtol=0, atol=1e-5)
    layer.config = dataclasses.replace(config, dropout=0.7)
    assert not mx.allclose(layer(x, memory, key=key), plain(x, memory), rtol=0, atol=0.1)
    assert mx.array_equal(layer.eval()(x, memory, key=key), plain.eval()(x, memory))


def test_dropout_is_a_function_of_its_key():
    made, x = stack(dropout=0.3), noise(B, L, E)
    one, two, other = (made(x, key=mx.random.key(seed)) for seed in (1, 1, 2))
    assert mx.array_equal(one, two) and not mx.array_equal(one, other)
    with pytest.raises(ValueError, match="dropout in training needs a random key, got none"):
        made(x)


def test_the_layers_of_a_stack_draw_apart():
    """Two layers that are one layer twice do not drop the same: with their own outputs fed back, theirs differ."""
    made = stack(2, dropout=0.5, norm_first=True)
    made.layers[1] = made.layers[0]
    x, key = noise(B, L, E), mx.random.key(7)
    keys = mx.random.split(key, 2)
    assert mx.array_equal(made(x, key=key), made.layers[0](made.layers[0](x, key=keys[0]), key=keys[1]))


@pytest.mark.parametrize("kind", ["relu", "mixture"])
def test_gradients_reach_every_parameter(kind):
    options = {"moe": MoEConfig(E, HIDDEN, 3, 2)} if kind == "mixture" else {}
    made, x, memory = stack(cross=True, causal=True, **options), noise(B, L, E), noise(B, S, E, seed=1)
    key_bias = "k_proj.bias"  # moves all scores of a query alike
    _, gradients = nn.value_and_grad(made, lambda x: mx.square(made(x, memory) - x).sum())(x)
    for name, gradient in tree_flatten(gradients):
        assert mx.isfinite(gradient).all(), name
        assert name.endswith(key_bias) or mx.abs(gradient).max() > 1e-6, name


def test_mixtures_tell_where_their_tokens_went():
    """S1-27: the losses of all layers are summed, and have a gradient."""
    made, x, routings = stack(3, moe=MoEConfig(E, HIDDEN, 5, 2)), noise(B, L, E), []
    made(x, routings=routings)
    assert len(routings) == 3 and all(int(routing.load.sum()) == B * L * 2 for routing in routings)
    assert abs(float(auxiliary_loss(routings)) - sum(float(r.loss) for r in routings)) < 1e-6
    assert float(auxiliary_loss([])) == 0

    def loss(x):
        found = []
        made(x, routings=found)
        return auxiliary_loss(found)

    _, gradients = nn.value_and_grad(made, loss)(x)
    flat = dict(tree_flatten(gradients))
    assert all(mx.abs(flat[f"layers.{n}.mlp.router.weight"]).max() > 1e-6 for n in range(3))


@pytest.mark.parametrize(
    ("own", "given", "expected"),
    [
        (None, {}, (None, 0)),
        (None, {"window": 5, "keep": 2}, (5, 2)),
        (3, {}, (3, 0)),
        (3, {"window": 5, "keep": 2}, (3, 0)),
        (5, {"window": 3, "keep": 1}, (3, 1)),
    ],
)
def test_windows_of_caches(own, given, expected):
    caches = stack(causal=True, window=own).make_caches(**given, slack=1, capacity=40)
    assert [(cache.window, cache.keep) for cache in caches] == [expected] * 2
    assert all(cache.slack == 1 and cache.capacity == 40 for cache in caches)


def test_a_cross_cache_never_grows_and_follows_its_memory():
    """T1.6: the last position of a source was projected anew, and appended, at every step."""
    made, x = stack(causal=True, cross=True), noise(1, L, E)
    memories = [noise(1, S, E, seed=1), noise(1, S + 2, E, seed=2)]
    cross = [CrossCache() for _ in made.layers]
    for memory in memories:
        caches = made.make_caches()
        out = [made(x[:, t : t + 1], memory, caches=caches, cross_caches=cross) for t in range(L)]
        assert [cache.length for cache in cross] == [memory.shape[1]] * 2
        assert mx.allclose(mx.concatenate(out, axis=1), made(x, memory), rtol=0, atol=1e-5)


def test_rows_of_a_cross_cache_can_be_selected():
    made, x, memory = stack(causal=True, cross=True), noise(3, L, E), noise(3, S, E, seed=1)
    cross = [CrossCache() for _ in made.layers]
    expected = made(x, memory, cross_caches=cross)
    rows = memory[mx.array([2, 0])]
    chosen = [cache.select([2, 0], rows) for cache in cross]
    assert [cache.length for cache in chosen] == [S, S] and CrossCache().select([0], memory).length == 0
    for layer in made.layers:
        layer.cross_attn.k_proj = layer.cross_attn.v_proj = None  # of no use any more
    out = made(x[mx.array([2, 0])], rows, cross_caches=chosen)
    assert mx.allclose(out, expected[mx.array([2, 0])], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 16}, "embed_dim must be a multiple of num_heads, 6, got 16"),
        ({"norm": "batch"}, "norm must be one of layer, rms, got 'batch'"),
        ({"activation": "tanh"}, "activation must be one of gelu, gelu_tanh, relu, silu, got 'tanh'"),
        ({"activation": "relu", "gated": True}, "activation must be one of .*, got 'relu'"),
        ({"hidden_dim": 0}, "hidden_dim must be a whole number from 1 to 10000000, got 0"),
        ({"norm_eps": 0.0}, "norm_eps must be a number above 0, got 0.0"),
        ({"memory_dim": 7}, "memory_dim must come with cross, got 7 alone"),
        ({"dropout": 1.0}, "dropout must be a number from 0 to below 1, got 1.0"),
        ({"dropout": "0.1"}, "dropout must be a number from 0 to below 1, got '0.1'"),
        ({"hidden_dim": "7"}, "hidden_dim must be a whole number from 1 to 10000000, got '7'"),
        ({"num_kv_heads": 4}, "num_kv_heads must divide num_heads, 6, got 4"),
        ({"window": 0}, "window must be a whole number from 1 to 100000000, got 0"),
        ({"moe": MoEConfig(17, 5, 3)}, "embed_dim of the moe must be the layer's, 18, got 17"),
    ],
)
def test_configurations_that_are_refused(options, message):
    """T4.5: divisibility is an error that python -O does not take away."""
    with pytest.raises(ValueError, match=message):
        Layer(LayerConfig(**{"embed_dim": E, "num_heads": HEADS, "hidden_dim": HIDDEN, **options}))


@pytest.mark.parametrize(
    ("options", "arrays", "given", "message"),
    [
        ({"cross": True}, [(B, L, E)], {}, "memory must be given to a layer with cross-attention, got none"),
        ({}, [(B, L, E), (B, S, E)], {}, "memory must not be given to a layer without cross-attention"),
        ({"cross": True}, [(B, L, E), (B, S, E + 1)], {}, "source must have 18 channels, got 19"),
        ({"cross": True, "memory_dim": 7}, [(B, L, E), (B, S, E)], {}, "source must have 7 channels, got 18"),
        ({"cross": True}, [(B, L, E), (B + 1, S, E)], {}, "source must have the batch size of x, 2, got 3"),
        ({}, [(B, L, E - 1)], {}, "x must have 18 channels, got 17"),
        ({}, [(B, L, E)], {"caches": [KVCache()]}, "caches must be one a layer, 2, got 1"),
        ({"cross": True}, [(B, L, E), (B, S, E)], {"cross_caches": []}, "cross_caches must be one a layer, 2, got 0"),
        (
            {},
            [(B, L, E)],
            {"caches": [KVCache(), KVCache()]},
            "a cache must be given to causal layers only, got causal=False",
        ),
    ],
)
def test_calls_that_are_refused(options, arrays, given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        stack(**options)(*(noise(*shape) for shape in arrays), **given)


def test_a_stack_needs_a_layer():
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        Stack(LayerConfig(E, HEADS, HIDDEN), 0)


def test_scores_are_scaled():
    """T4.4: without 1 / sqrt(D) weights are too sharp, never too flat: the largest of 128 is 0.7 at D = 64."""
    layer = Layer(LayerConfig(128, 2, 5, cross=True))
    assert layer.self_attn.scale == layer.cross_attn.scale == 64**-0.5
    x = noise(1, 128, 128)
    for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
        projection.weight, projection.bias = noise(128, 128, seed=4) * 128**-0.5, mx.zeros((128,))
    layer.self_attn.k_proj.weight = noise(128, 128, seed=5) * 128**-0.5
    sharpest = float(layer.self_attn.weights(x).max(axis=-1).mean())
    layer.self_attn.config = dataclasses.replace(layer.self_attn.config, scale=1.0)
    assert sharpest < 0.15 < 0.5 < float(layer.self_attn.weights(x).max(axis=-1).mean())
