"""The documented cross-transformer against PyTorch's own parts, put together here step by step."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from support.harness import assert_within_budget
from support.oracle import Oracle

from mlx_xformer.converters.families.guides import metalaudio
from mlx_xformer.models.guides.metalaudio import CrossTransformerConfig, CrossTransformerEncoder
from mlx_xformer.nn.layers import FeedForward

pytestmark = pytest.mark.torch
B, LT, LF = 2, 7, 11


@pytest.fixture(scope="module")
def oracle():
    with Oracle() as child:
        yield child


def signal(*shape, seed=0):
    return (np.random.default_rng(seed).normal(size=shape) * 1.7 + 0.4).astype(np.float32)


class Parts:
    """PyTorch's modules in one precision, each with random weights of its own, kept under the layout's names."""

    def __init__(self, oracle, config, dtype):
        self.oracle, self.config, self.dtype, self.state = oracle, config, dtype, {}

    def module(self, name, kind, kwargs, inputs, join=".", **options):
        seed = sum(map(ord, name)) * 1009 + len(self.state)
        answer = self.oracle.module(kind, kwargs, inputs, seed, dtype=self.dtype, **options)
        self.state |= {f"{name}{join}{leaf}": value for leaf, value in answer.state.items()}
        return answer.outputs[0]

    def norm(self, name, x):
        return self.module(name, "layer_norm", {"normalized_shape": x.shape[-1]}, {"input": x})

    def attend(self, name, x, source):
        config = self.config
        kwargs = {"embed_dim": config.embed_dim, "num_heads": config.num_heads, "bias": config.attention_bias}
        inputs = {"query": x, "key": source, "value": source}
        return self.module(name, "mha", kwargs | {"batch_first": True}, inputs, need_weights=False)

    def linear(self, name, x, width):
        kwargs = {"in_features": x.shape[-1], "out_features": width, "bias": self.config.ffn_bias}
        return self.module(name, "linear", kwargs, {"input": x})

    def activate(self, x):
        if self.config.activation == "relu":
            return np.maximum(x, 0)
        form = {"gelu": "none", "gelu_tanh": "tanh"}[self.config.activation]
        return self.oracle.function("gelu", {"input": x}, dtype=self.dtype, approximate=form).outputs[0]

    def feed(self, name, x):
        hidden = self.activate(self.linear(f"{name}.linear1", x, self.config.hidden_dim))
        return self.linear(f"{name}.linear2", hidden, x.shape[-1])

    def layer(self, at, time, freq):
        """MetalAudio's six steps."""
        y = self.norm(at + "norm_time_self", time)
        time = time + self.attend(at + "self_attn_time", y, y)
        y = self.norm(at + "norm_freq_self", freq)
        freq = freq + self.attend(at + "self_attn_freq", y, y)
        y, z = self.norm(at + "norm_time_cross", time), self.norm(at + "norm_freq_cross", freq)
        time = time + self.attend(at + "cross_attn_time", y, z)
        freq = freq + self.attend(at + "cross_attn_freq", z, y)
        time = time + self.feed(at + "ffn_time", self.norm(at + "norm_time_ffn", time))
        freq = freq + self.feed(at + "ffn_freq", self.norm(at + "norm_freq_ffn", freq))
        return time, freq


def composed(oracle, config, dtype, time, freq):
    """Outputs and state dict."""
    parts = Parts(oracle, config, dtype)
    time, freq = time.astype(dtype), freq.astype(dtype)
    for index in range(config.num_layers):
        time, freq = parts.layer(f"layers.{index}.", time, freq)
    return (time, freq), parts.state


@pytest.mark.parametrize(
    "config",
    [
        CrossTransformerConfig(15, 3, 2, 13),
        CrossTransformerConfig(15, 3, 1, 13, attention_bias=False, ffn_bias=False),
        CrossTransformerConfig(15, 5, 1, ffn_bias=False, activation="gelu"),
        CrossTransformerConfig(384, 8, 1, activation="relu"),
    ],
    ids=str,
)
def test_cross_transformer(oracle, config):
    """Through the converter's table: PyTorch in double precision is the truth, in single precision the budget."""
    time, freq = signal(B, LT, config.embed_dim), signal(B, LF, config.embed_dim, seed=1)
    ref64, state = composed(oracle, config, "float64", time, freq)
    ref32, again = composed(oracle, config, "float32", time, freq)
    assert all((state[name] == again[name]).all() for name in state) and state.keys() == again.keys()
    tensors = {name: mx.array(x) for name, x in state.items()}
    found = metalaudio.config(tensors, num_heads=config.num_heads, prefix="", activation=config.activation)
    assert found == config
    model = CrossTransformerEncoder(config)
    model.load_weights(list(metalaudio.to_mlx(tensors, config, "").items()), strict=True)
    for ours, truth, budget in zip(model(mx.array(time), mx.array(freq)), ref64, ref32, strict=True):
        assert_within_budget(ours, truth, budget)
    back = metalaudio.to_metalaudio(metalaudio.to_mlx(tensors, config, ""), config, "")
    assert all((np.array(back[name]) == state[name]).all() for name in state) and back.keys() == state.keys()


@pytest.mark.parametrize("shape", [(7,), (2, 5, 7)])
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu"])
def test_feed_forward(oracle, activation, shape):
    """linear1, activation, linear2 of PyTorch, forward and the gradients of x and every weight."""
    config = CrossTransformerConfig(7, 1, 1, 13, activation=activation)
    x, u = signal(*shape), signal(*shape, seed=1)
    parts = {kind: Parts(oracle, config, kind) for kind in ("float64", "float32")}
    ref64, ref32 = (p.feed("ffn", x.astype(kind)) for kind, p in parts.items())
    state = {name.removeprefix("ffn."): value for name, value in parts["float64"].state.items()}
    module = FeedForward(7, 13, activation)
    module.load_weights([(name, mx.array(value)) for name, value in state.items()], strict=True)
    assert_within_budget(module(mx.array(x)), ref64, ref32)
    for name, (truth, budget) in chained(oracle, config, state, x, u).items():
        assert_within_budget(gradient(module, name, x, u), truth, budget, name)


def chained(oracle, config, state, x, u):
    """PyTorch's gradients by name, in double and in single precision, from the end to the start."""

    def backward(kind):
        def linear(name, x, u):
            own = {n.removeprefix(f"{name}."): value for n, value in state.items() if n.startswith(name)}
            kwargs = dict(zip(("out_features", "in_features"), own["weight"].shape, strict=True))
            given = {"state": own, "dtype": kind, "cotangents": [u]}
            return oracle.module("linear", kwargs, {"input": x.astype(kind)}, **given)

        hidden = linear("linear1", x, np.ones((*x.shape[:-1], config.hidden_dim), kind)).outputs[0]
        second = linear("linear2", Parts(oracle, config, kind).activate(hidden), u.astype(kind))
        u_hidden = second.gradients["input"]
        if config.activation == "relu":
            u_hidden = u_hidden * (hidden > 0)
        else:
            form = {"gelu": "none", "gelu_tanh": "tanh"}[config.activation]
            given = {"cotangents": [u_hidden], "dtype": kind, "approximate": form}
            u_hidden = oracle.function("gelu", {"input": hidden}, **given).gradients["input"]
        first = linear("linear1", x, u_hidden)
        return {
            "input": first.gradients["input"],
            **{f"linear1.{leaf}": first.gradients[leaf] for leaf in ("weight", "bias")},
            **{f"linear2.{leaf}": second.gradients[leaf] for leaf in ("weight", "bias")},
        }

    double, single = backward("float64"), backward("float32")
    return {name: (double[name], single[name]) for name in double}


def gradient(module, name, x, u):
    """<out, u> differentiated by the input or by a parameter."""

    def by_input(x):
        return module(x)

    def by_parameter(value):
        layer, leaf = name.split(".")
        kept = module[layer][leaf]
        module[layer][leaf] = value
        out = module(mx.array(x))
        module[layer][leaf] = kept
        return out

    function, at = (by_input, mx.array(x)) if name == "input" else (by_parameter, None)
    at = module[name.split(".")[0]][name.split(".")[1]] if at is None else at
    return mx.vjp(function, [at], [mx.array(u)])[1][0]
