"""The cross-transformer's configuration, and what it and the module refuse."""

import dataclasses
import json

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_xformer.models.guides.metalaudio import CrossTransformerConfig, CrossTransformerEncoder, TransformerLayer

B, LT, LF, E, H, HIDDEN, N = 2, 7, 11, 15, 3, 13, 2
CONFIG = CrossTransformerConfig(E, H, N, HIDDEN)


def test_configuration():
    assert CrossTransformerConfig(E, H, N) == CrossTransformerConfig(E, H, N, 4 * E)
    assert CrossTransformerEncoder(CrossTransformerConfig(E, H, N)).layers[1].ffn_freq.linear1.weight.shape == (
        4 * E,
        E,
    )
    config = dataclasses.replace(CONFIG, activation="relu", ffn_bias=False)
    assert CrossTransformerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert CrossTransformerEncoder(config).config is config
    names = [n for n, _ in tree_flatten(CrossTransformerEncoder(config).parameters())]
    assert len(names) == N * (12 + 4 * 8 + 2 * 2) and not any("linear1.bias" in n for n in names)
    names = tree_flatten(CrossTransformerEncoder(dataclasses.replace(CONFIG, attention_bias=False)).parameters())
    assert len(names) == N * (12 + 4 * 4 + 2 * 4) and not any("_proj.bias" in n for n, _ in names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 4}, "embed_dim must be a multiple of num_heads, 4, got 15"),
        ({"num_heads": 0}, "num_heads must be a whole number from 1 to 100000, got 0"),
        ({"embed_dim": 15.0}, r"embed_dim must be a whole number from 1 to 1000000, got 15\.0"),
        ({"embed_dim": "15"}, "embed_dim must be a whole number from 1 to 1000000, got '15'"),
        ({"num_layers": True}, "num_layers must be a whole number from 1 to 1000, got True"),
        ({"num_layers": 1001}, "num_layers must be a whole number from 1 to 1000, got 1001"),
        ({"hidden_dim": -13}, "hidden_dim must be a whole number from 1 to 10000000, got -13"),
        ({"ffn_bias": 1}, "ffn_bias must be true or false, got 1"),
        ({"activation": "tanh"}, "activation must be one of gelu, gelu_tanh, relu, silu, got 'tanh'"),
        ({"activation": ["gelu"]}, r"activation must be one of .*, got \['gelu'\]"),
        ({"colour": 1}, "the cross-transformer has no option named colour"),
    ],
)
def test_configurations_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CrossTransformerConfig.from_dict(CONFIG.to_dict() | changes)


def test_what_must_be_given():
    with pytest.raises(ValueError, match="the cross-transformer must be given num_heads, num_layers"):
        CrossTransformerConfig.from_dict({"embed_dim": 15})


@pytest.mark.parametrize(
    ("time", "freq", "message"),
    [
        ((B, LT, 14), (B, LF, E), r"time must be \(B, L, 15\) or \(L, 15\), got shape \(2, 7, 14\)"),
        ((B, LT, E), (B, LF, 16), r"freq must be \(B, L, 15\) or \(L, 15\), got shape \(2, 11, 16\)"),
        ((E,), (LF, E), r"time must be .*, got shape \(15,\)"),
        ((1, B, LT, E), (1, B, LF, E), r"time must be .*, got shape \(1, 2, 7, 15\)"),
        ((B, LT, E), (3, LF, E), r"freq must have the batch axis of time, \(2,\), got \(3,\)"),
        ((B, LT, E), (LF, E), r"freq must have the batch axis of time, \(2,\), got \(\)"),
    ],
)
def test_inputs_that_do_not_fit(time, freq, message):
    for module in (CrossTransformerEncoder(CONFIG), TransformerLayer(E, H, HIDDEN)):
        with pytest.raises(ValueError, match=message):
            module(mx.zeros(time), mx.zeros(freq))


def test_a_layer_refuses_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="embed_dim must be a multiple of num_heads, 7, got 512"):
        TransformerLayer(512, 7, 2048)
