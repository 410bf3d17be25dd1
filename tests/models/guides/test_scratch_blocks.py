"""scratch's stack against its twin and its formulas, its options and what is refused."""

import dataclasses
import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.harness import check_forward, check_module, draw

from mlx_xformer.models.guides.scratch import StackConfig, TransformerBlock, TransformerStack, UnbiasedLayerNorm
from mlx_xformer.reference.models.guides import scratch as twin

B, L, S, E, D, H, M, HIDDEN = 2, 5, 7, 21, 11, 3, 13, 17
STILL = {"attention_dropout": 0.0, "ffn_dropout": 0.0, "block_dropout": 0.0}
CONFIG = StackConfig(E, D, HIDDEN, num_heads=H, enc_out_dim=M, num_stack=2, causal=True, **STILL)


def signal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def array(*shape, seed=0):
    return mx.array(signal(*shape, seed=seed).astype(np.float32))


def made(kind=TransformerBlock, seed=0, **changes):
    module = kind(dataclasses.replace(CONFIG, **changes))
    draw(module, seed)
    return module


# Against the twin and the formulas


@pytest.mark.parametrize("norm", ["layer", "unbiased"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("enc_out_dim", [None, M])
def test_stack_is_its_twin(norm, causal, enc_out_dim):
    """Outputs and the gradients of every parameter and input: all are reached."""
    config = dataclasses.replace(CONFIG, norm=norm, causal=causal, enc_out_dim=enc_out_dim)
    inputs = [signal(B, L, E)] + ([signal(B, S, M, seed=1)] if enc_out_dim else [])
    check_module(TransformerStack(config), lambda p, *x: twin.stack(p, config, *x), *inputs)


def test_block_takes_masks_and_a_bias():
    module = made(TransformerBlock, causal=False)
    params = {name: np.array(x, np.float64) for name, x in tree_flatten(module.parameters())}
    mask, memory_mask = signal(B, 1, L, L) > -1, signal(B, 1, 1, S, seed=3) > -0.7
    bias = signal(B, H, L, L, seed=4)
    given = [signal(B, L, E), signal(B, S, M, seed=1)]
    check_forward(
        lambda x, m, b: module(x, m, mask=mx.array(mask), memory_mask=mx.array(memory_mask), bias=b),
        lambda x, m, b: twin.block(
            {n: y.astype(x.dtype) for n, y in params.items()},
            module.config,
            x,
            m,
            mask=mask,
            memory_mask=memory_mask,
            bias=b,
        ),
        *given,
        bias,
    )


def test_order_of_the_steps():
    """norm_1 is of self-attention, norm_3 of cross-attention, norm_2 of the network: without its gain and bias, each
    step adds nothing but what a network makes of zeros."""
    x, memory = array(B, L, E), array(B, S, M, seed=1)
    for norm, step in (("norm_1", "self_attn"), ("norm_3", "cross_attn"), ("norm_2", "mlp")):
        silent, without = made(), made()
        silent[norm].update({"weight": mx.zeros(E), "bias": mx.zeros(E)})
        if step == "mlp":
            silent.mlp.linear1.bias, silent.mlp.linear2.bias = mx.zeros(HIDDEN), mx.zeros(E)
            without.mlp.linear2.update({"weight": mx.zeros((E, HIDDEN)), "bias": mx.zeros(E)})
        elif step == "self_attn":
            without.self_attn.out_proj.weight = mx.zeros((E, E))
        else:  # keys are of the memory: only the queries fall silent
            without.cross_attn.q_proj.weight = mx.zeros((H * D, E))
        assert mx.allclose(silent(x, memory), without(x, memory), atol=1e-6)
        assert not mx.allclose(silent(x, memory), made()(x, memory), atol=1e-3)


@pytest.mark.parametrize("memory", [None, M])
def test_parameter_count(memory):
    """S2-07: 2 D h dk + 2 D^2 + 2 D Hd + Hd + D + 4 D a block; 2240 for 24, 3, 8 and 4 heads."""
    config = StackConfig(24, 3, 8, num_heads=4, enc_out_dim=memory, num_stack=3)
    count = sum(x.size for _, x in tree_flatten(TransformerStack(config).parameters()))
    cross = 0 if memory is None else 4 * 3 * (24 + M) + 24 * M + 24 * 24 + 2 * 24
    assert count == 3 * (2240 + cross)


def test_zero_weights_change_nothing():
    module = TransformerStack(dataclasses.replace(CONFIG, block_dropout=0.5))
    for block in module.blocks:
        block.self_attn.out_proj.weight = mx.zeros((E, E))
        block.cross_attn.out_proj.weight = mx.zeros((E, E))
        block.mlp.linear2.update({"weight": mx.zeros((E, HIDDEN)), "bias": mx.zeros(E)})
    module.eval()
    x = array(B, L, E)
    assert mx.array_equal(module(x, array(B, S, M)), x)


# The traps of scratch


def test_t2_2_dropout_is_of_weights_or_named_of_scores():
    """Weights are read off values that are the identity. Dropped weights are 0 or larger by 1 / (1 - rate); dropped
    scores never make a weight 0, and rows still sum to 1."""
    rate, key = 0.4, mx.random.key(3)
    options = {"model_dim": 7, "key_dim": 5, "num_heads": 1, "enc_out_dim": None, "causal": False}
    x, outputs = mx.eye(7)[None], {}
    for legacy in (False, True):
        module = made(TransformerBlock, attention_dropout=rate, score_dropout=legacy, **options)
        module.self_attn.v_proj.weight = module.self_attn.out_proj.weight = mx.eye(7)
        given = {"mask": None, "bias": None, "cache": None}
        outputs[legacy] = module._attend(module.self_attn, x, None, key, given)[0]
        q, k = (x[0] @ form.weight.T for form in (module.self_attn.q_proj, module.self_attn.k_proj))
        scores = q @ k.T / math.sqrt(5)
        weights = mx.softmax(scores, axis=-1)
        assert mx.allclose(module.self_attn.eval()(x)[0], weights, atol=1e-6), "none in eval"
    dropped = outputs[False] == 0
    assert 0.2 < mx.mean(dropped).item() < 0.6
    assert mx.allclose(mx.where(dropped, 0, weights / (1 - rate)), outputs[False], atol=1e-6)
    kept = mx.random.bernoulli(1 - rate, (1, 1, 7, 7), key)[0, 0]
    assert mx.allclose(outputs[True], mx.softmax(scores * kept / (1 - rate), axis=-1), atol=1e-6)
    assert (outputs[True] > 0).all() and mx.allclose(mx.sum(outputs[True], axis=-1), mx.ones(7))


def test_score_dropout_reaches_both_attentions():
    module = made(attention_dropout=0.4, score_dropout=True)
    x, memory = array(B, L, E), array(B, S, M, seed=1)
    still = module.eval()(x, memory)
    module.train()
    for silent in ("self_attn", "cross_attn"):
        weight = module[silent].out_proj.weight
        module[silent].out_proj.weight = mx.zeros((E, E))
        module.eval()
        quiet = module(x, memory)
        module.train()
        assert not mx.allclose(module(x, memory, key=mx.random.key(0)), quiet, atol=1e-3)
        module[silent].out_proj.weight = weight
    assert mx.array_equal(module.eval()(x, memory), still)


def test_t2_3_unbiased_norm():
    """The deviation is unbiased and eps beside it: sqrt((d - 1) / d) times nn.LayerNorm's, 0.9789 at d = 24."""
    x = signal(3, 24) * 1.7 + 0.4
    module, theirs = UnbiasedLayerNorm(24), nn.LayerNorm(24, eps=1e-12)
    params = draw(module, 0)
    expected = (x - x.mean(-1, keepdims=True)) / (x.std(-1, ddof=1, keepdims=True) + 1e-6) * params["weight"]
    ours = module(mx.array(x.astype(np.float32)))
    assert np.abs(np.array(ours) - expected - params["bias"]).max() < 2e-6
    theirs.update({"weight": module.weight, "bias": module.bias})
    theirs = theirs(mx.array(x.astype(np.float32))) - module.bias
    assert round(math.sqrt(23 / 24), 4) == 0.9789
    assert mx.allclose(ours - module.bias, theirs * math.sqrt(23 / 24), rtol=1e-5, atol=1e-6)


def test_unbiased_norm_where_nothing_varies():
    """A row of equal numbers gives the bias, and a finite gradient."""
    module = UnbiasedLayerNorm(5)
    params = draw(module, 0)
    x = mx.full((2, 5), 1.5)
    assert np.allclose(np.array(module(x)), params["bias"])
    assert mx.isfinite(mx.grad(lambda x: module(x).sum())(x)).all()
    two = np.array(UnbiasedLayerNorm(2)(mx.array([[3.0, 5.0]])))
    assert np.allclose(two, [[-(0.5**0.5), 0.5**0.5]], atol=1e-5)
    with pytest.raises(ValueError, match=r"dims must be at least 2 .* got 1"):
        UnbiasedLayerNorm(1)


def test_t2_4_dropout_leaves_the_residual_stream_alone():
    """That of branches leaves no number at 0; "residual", by name, a tenth of all that leaves a block, and nothing in
    eval."""
    x, memory = array(3, 31, E), array(3, S, M, seed=1)
    zeros = {}
    for where in ("branches", "residual"):
        module = made(dropout_at=where, attention_dropout=0.1, ffn_dropout=0.1, block_dropout=0.1)
        zeros[where] = mx.mean(module(x, memory, key=mx.random.key(5)) == 0).item()
        module.eval()
        assert mx.array_equal(module(x, memory), made()(x, memory))
    assert zeros["branches"] == 0 and 0.07 < zeros["residual"] < 0.13


@pytest.mark.parametrize("branch", ["self_attn", "cross_attn", "mlp"])
def test_branches_are_dropped_one_by_one(branch):
    """What a branch adds is 0 at the rate, and else larger by 1 / (1 - rate)."""
    module = made(block_dropout=0.4, ffn_dropout=0.4)
    for other in {"self_attn", "cross_attn", "mlp"} - {branch}:
        if other == "mlp":
            module.mlp.linear2.update({"weight": mx.zeros((E, HIDDEN)), "bias": mx.zeros(E)})
        else:
            module[other].out_proj.weight = mx.zeros((E, E))
    x, memory = array(3, 31, E), array(3, S, M, seed=1)
    added = module(x, memory, key=mx.random.key(5)) - x
    module.eval()
    whole = module(x, memory) - x
    kept = mx.abs(added) > 1e-6
    assert 0.5 < mx.mean(kept).item() < 0.7
    assert mx.allclose(added, mx.where(kept, whole / 0.6, 0), atol=1e-5)


def test_t2_5_causal_or_not():
    """A random change (a norm hides a constant one) at position t leaves all before it bit-equal, in a causal stack
    alone."""
    x, memory = array(B, L, E), array(B, S, M, seed=1)
    for t in range(1, L):
        changed = mx.concatenate([x[:, :t], x[:, t : t + 1] + array(B, 1, E, seed=9), x[:, t + 1 :]], axis=1)
        for causal in (True, False):
            module = made(TransformerStack, causal=causal)
            before, after = module(x, memory), module(changed, memory)
            assert mx.array_equal(before[:, :t], after[:, :t]).item() is causal
            assert not mx.array_equal(before[:, t:], after[:, t:])
    lower = mx.tril(mx.ones((L, L), mx.bool_))
    assert mx.allclose(made(causal=False)(x, memory, mask=lower), made(causal=True)(x, memory), atol=1e-5)


def test_t2_6_masks():
    """One that is too small is refused in a line; a row that may attend to nothing gets 0 from attention, not NaN."""
    module, x, memory = made(causal=False), array(B, L, E), array(B, S, M, seed=1)
    with pytest.raises(ValueError, match="mask must") as error:
        module(x, memory, mask=mx.ones((L - 1, L - 1), mx.bool_))
    assert "\n" not in str(error.value)
    hidden = mx.array(np.arange(L) != 2)[:, None] & mx.ones((L, L), mx.bool_)  # position 2 sees nothing
    out = module(x, memory, mask=hidden)
    module.self_attn.out_proj.weight = mx.zeros((E, E))
    assert mx.allclose(out[:, 2], module(x, memory)[:, 2], atol=1e-6) and mx.isfinite(out).all()


def test_additive_masks():
    """S2-02: minus infinity above the diagonal is causality; where a whole row is, attention gives 0; no slice is taken
    of one that does not fit."""
    module, x, memory = made(causal=False), array(B, L, E), array(B, S, M, seed=1)
    bias = mx.where(mx.tril(mx.ones((L, L))) > 0, 0.0, -mx.inf)
    assert mx.allclose(module(x, memory, bias=bias), made(causal=True)(x, memory), atol=1e-5)
    bias[2] = -mx.inf
    out = module(x, memory, bias=bias)
    module.self_attn.out_proj.weight = mx.zeros((E, E))
    assert mx.allclose(out[:, 2], module(x, memory)[:, 2], atol=1e-6) and mx.isfinite(out).all()
    for size in (L - 1, L + 1):
        with pytest.raises(ValueError, match="bias must broadcast to"):
            module(x, memory, bias=mx.zeros((L, size)))


def test_padding_of_the_memory_is_hidden():
    module, x, memory = made(TransformerStack), array(1, L, E), array(1, S, M, seed=1)
    longer = mx.concatenate([memory, array(1, 4, M, seed=2) * 100], axis=1)
    mask = (mx.arange(S + 4) < S)[None, None, None]
    assert mx.allclose(module(x, longer, memory_mask=mask), module(x, memory), atol=1e-6)


# Dropout, refusals, configurations


def test_the_same_key_drops_the_same():
    module = TransformerStack(StackConfig(E, D, HIDDEN, num_heads=H, num_stack=2))
    x = array(B, L, E)
    one, same, other = (module(x, key=mx.random.key(n)) for n in (1, 1, 2))
    assert mx.array_equal(one, same) and not mx.array_equal(one, other)
    module.eval()
    assert mx.array_equal(module(x), module(x, key=mx.random.key(1)))


@pytest.mark.parametrize(
    ("changes", "call", "message"),
    [
        ({}, lambda m: m(array(B, L, E)), "memory must be given to a block with enc_out_dim, got none"),
        (
            {"enc_out_dim": None},
            lambda m: m(array(B, L, E), array(B, S, M)),
            r"memory must not be given to a block without enc_out_dim, got shape \(2, 7, 13\)",
        ),
        ({}, lambda m: m(array(B, L, E), array(B, S, M + 1)), "source must have 13 channels, got 14"),
        ({}, lambda m: m(array(B, L, E), array(B + 1, S, M)), "source must have the batch size of x, 2, got 3"),
        ({}, lambda m: m(array(B, L, E + 2), array(B, S, M)), "21"),
        ({}, lambda m: m(array(B, L, E), array(B, S, M), caches=[]), "caches must be one a layer, 2, got 0"),
        ({}, lambda m: m(array(B, L, E), array(B, S, M), cross_caches=[]), "cross_caches must be one a layer, 2"),
        ({"ffn_dropout": 0.1}, lambda m: m(array(B, L, E), array(B, S, M)), "needs a random key, got none"),
    ],
)
def test_calls_that_are_refused(changes, call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(TransformerStack(dataclasses.replace(CONFIG, **changes)))
    assert "\n" not in str(error.value)


def test_score_dropout_refuses_a_cache_in_training():
    from mlx_xformer.nn.cache import KVCache

    module = made(score_dropout=True, attention_dropout=0.1)
    with pytest.raises(ValueError, match="score_dropout must not be with a cache in training"):
        module(array(B, L, E), array(B, S, M), cache=KVCache(), key=mx.random.key(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 0}, "num_heads must be a whole number from 1 to 100000, got 0"),
        ({"num_heads": 2}, "model_dim must be a multiple of num_heads, 2, got 21"),
        ({"num_stack": 0}, "num_stack must be a whole number from 1 to 1000, got 0"),
        ({"model_dim": True}, "model_dim must be a whole number"),
        ({"key_dim": 1.5}, "key_dim must be a whole number"),
        ({"hidden_dim": 10**8}, "hidden_dim must be a whole number"),
        ({"enc_out_dim": 0}, "enc_out_dim must be a whole number"),
        ({"ffn_dropout": 1.0}, "ffn_dropout must be a number from 0 to below 1, got 1.0"),
        ({"block_dropout": "0.1"}, "block_dropout must be a number from 0 to below 1"),
        ({"causal": 1}, "causal must be true or false, got 1"),
        ({"norm": "rms"}, "norm must be one of layer, unbiased, got 'rms'"),
        ({"norm": []}, r"norm must be one of layer, unbiased, got \[\]"),
        ({"dropout_at": "scores"}, "dropout_at must be one of branches, residual, got 'scores'"),
        ({"norm_eps": 0}, "norm_eps must be a number above 0, got 0"),
        ({"norm": "unbiased", "model_dim": 1, "num_heads": 1}, "model_dim must be at least 2"),
        ({"colour": 1}, "the stack has no option named colour"),
    ],
)
def test_configurations_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        StackConfig.from_dict(CONFIG.to_dict() | changes)


def test_configuration_there_and_back():
    assert StackConfig.from_dict(CONFIG.to_dict()) == CONFIG
    with pytest.raises(ValueError, match="the stack must be given key_dim, hidden_dim"):
        StackConfig.from_dict({"model_dim": 3})
