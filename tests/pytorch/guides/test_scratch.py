"""scratch's stack and encoder-decoder against PyTorch compositions: weights by the converters' tables, forward and
gradient of every parameter and input."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.oracle import Oracle

from mlx_xformer.converters.families.guides import scratch
from mlx_xformer.converters.rules import apply_rules
from mlx_xformer.models.guides.scratch import EncoderDecoder, TransformerStack

pytestmark = pytest.mark.torch

B, L, S, E, D, H, M, HIDDEN, V = 2, 7, 11, 21, 5, 3, 13, 17, 19
STILL = {"attention_dropout": 0.0, "ffn_dropout": 0.0, "block_dropout": 0.0}
OPTIONS = {"count": 2, "width": E, "key_dim": D, "hidden": HIDDEN, "heads": H}


@pytest.fixture(scope="module")
def oracle():
    with Oracle() as child:
        yield child


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def near(theirs, ours, tolerance, scale=None):
    theirs, ours = np.asarray(theirs), np.asarray(ours)
    assert theirs.shape == ours.shape
    error = np.abs(theirs - ours).max() / (scale or np.abs(theirs).max())
    assert error <= tolerance, error


def loaded(kind, module, state, settings):
    """Our model with PyTorch's weights."""
    tensors = {name: mx.array(x) for name, x in state.items()}
    config = kind.config(settings, tensors)
    made = module(config)
    shapes = {name: x.shape for name, x in tree_flatten(made.parameters())}
    made.load_weights(list(apply_rules(kind.rules(config, tensors), tensors, shapes).items()), strict=True)
    made.eval()
    return made


def same_gradients(kind, made, theirs, ours):
    """By every parameter, under our names: within 1e-5 of the largest of all."""
    theirs = {name: mx.array(x) for name, x in theirs.items() if name not in ("x", "memory", "tokens")}
    shapes = {name: x.shape for name, x in tree_flatten(made.parameters())}
    expected = apply_rules(kind.rules(made.config, theirs), theirs, shapes)
    scale = max(float(mx.abs(x).max()) for x in expected.values())
    ours = dict(tree_flatten(ours))
    assert ours.keys() == expected.keys()
    for name, x in expected.items():
        assert mx.abs(x).max() > 0, name
        near(x, ours[name], 1e-5, scale)


@pytest.mark.parametrize("source", [None, M])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_stack(oracle, source, unbiased, causal):
    inputs = {"x": noise(B, L, E), **({"memory": noise(B, S, M, seed=1)} if source else {})}
    u = noise(B, L, E, seed=2)
    options = {**OPTIONS, "source": source, "eps": 1e-3, "unbiased": unbiased, "causal": causal}
    answer = oracle.module("scratch_stack", options, inputs, cotangents=[u])
    norms = [x for name, x in answer.state.items() if name.endswith(("gamma", "beta"))]
    assert all((x != 0).all() and (x != 1).all() for x in norms)
    settings = {
        "num_heads": H,
        "norm": "unbiased" if unbiased else "layer",
        "norm_eps": 1e-3,
        "causal": causal,
        **STILL,
    }
    made = loaded(scratch, TransformerStack, answer.state, settings)

    def call(params, *given):
        made.update(params)
        return (made(*given) * mx.array(u)).sum()

    given = [mx.array(x) for x in inputs.values()]
    near(answer.outputs[0], made(*given), 2e-6)
    gradients = mx.grad(call, argnums=range(1 + len(given)))(made.parameters(), *given)
    same_gradients(scratch, made, answer.gradients, gradients[0])
    for name, gradient in zip(inputs, gradients[1:], strict=True):
        near(answer.gradients[name], gradient, 1e-5)


@pytest.mark.parametrize("source", [None, M])
def test_encoder_decoder(oracle, source):
    """Logits with the file's buffers dropped; the loss of rows with padding and its gradients, of which the padding's
    embedding gets none."""
    tokens = np.random.default_rng(0).integers(1, V, (B, L))
    tokens[1, 4:], tokens[0, 3] = 0, 0
    inputs = {"tokens": tokens, **({"memory": noise(B, S, M, seed=1)} if source else {})}
    options = {**OPTIONS, "source": source, "eps": 1e-6, "unbiased": True, "causal": True}
    options |= {"vocab": V, "positions": 31, "padding_idx": 0}
    answer = oracle.module("scratch_model", options, inputs)
    settings = {"num_heads": H, "embed_dropout": 0.0, **STILL}
    made = loaded(scratch.ENCODER_DECODER, EncoderDecoder, answer.state, settings)
    assert made.config.max_len == 31 and made.config.stack.causal and made.config.padding_idx == 0
    given = [mx.array(x) for x in inputs.values()]
    near(answer.outputs[0], made(*given), 2e-6)

    answer = oracle.module("scratch_loss", options, inputs, cotangents=[np.float32(1)], state=answer.state)
    loss, gradient = nn.value_and_grad(made, made.loss)(*given)
    near(answer.outputs[0], loss, 2e-6)
    same_gradients(scratch.ENCODER_DECODER, made, answer.gradients, gradient)
    assert (answer.gradients["embed.weight"][0] == 0).all() and (gradient["embed"]["weight"][0] == 0).all()
