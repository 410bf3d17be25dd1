"""Attention against formulas of its own: what holds whatever the implementation is."""

import math

import mlx.core as mx
import numpy as np
import pytest
from support.harness import check_forward, draw

from mlx_xformer.nn.attention import Attention, attention, attention_weights
from mlx_xformer.nn.masks import causal_mask
from mlx_xformer.nn.positions import sinusoidal
from mlx_xformer.nn.rotary import Rotary


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def softmax(scores):
    raised = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


def test_scaled_scores_have_unit_variance():
    """Products of D normal pairs have variance D: over sqrt(D) it is 1, whatever D. A softmax's logarithm tells it."""
    for D in (4, 64, 256):
        q, k = (mx.array(normal(1, 1, n, D, seed=D + n).astype(np.float32)) for n in (1000, 64))
        log = np.log(np.array(attention_weights(q, k), np.float64))
        assert abs((log - log.mean(axis=-1, keepdims=True)).var() - 1) < 0.2
        sharp, flat = attention_weights(q, k, scale=1.0).max(axis=-1).mean(), np.exp(log).max(axis=-1).mean()
        assert sharp > 1.5 * flat


def test_a_layer_is_the_sum_of_its_heads():
    """The sum over h of softmax(Q_h K_h^T / sqrt(D)) V_h W_h^O, by Vaswani et al. 2017."""
    module, E, H = Attention(18, 6, num_kv_heads=3), 18, 6
    params = draw(module, 3)
    D = E // H

    def heads(p, x):
        out = p["out_proj.bias"]
        for h in range(H):
            own, shared = slice(h * D, (h + 1) * D), slice(h // 2 * D, (h // 2 + 1) * D)
            q = x @ p["q_proj.weight"][own].T + p["q_proj.bias"][own]
            k, v = (x @ p[f"{n}_proj.weight"][shared].T + p[f"{n}_proj.bias"][shared] for n in "kv")
            out = out + softmax(q @ k.swapaxes(-1, -2) / math.sqrt(D)) @ v @ p["out_proj.weight"][:, own].T
        return out

    check_forward(module, lambda x: heads({n: p.astype(x.dtype) for n, p in params.items()}, x), normal(2, 7, E))


def test_query_heads_share_consecutively():
    """Two key/value heads for six: query heads 0 to 2 read the first, 3 to 5 the second; in turns is something else."""
    q, k, v = normal(1, 6, 5, 4), normal(1, 2, 7, 4, seed=1), normal(1, 2, 7, 3, seed=2)
    weights = softmax(q @ np.repeat(k, 3, axis=1).swapaxes(-1, -2) / 2)
    out = np.array(attention(*(mx.array(x.astype(np.float32)) for x in (q, k, v))))
    assert np.abs(out - weights @ np.repeat(v, 3, axis=1)).max() < 2e-6
    in_turns = softmax(q @ np.tile(k, (1, 3, 1, 1)).swapaxes(-1, -2) / 2) @ np.tile(v, (1, 3, 1, 1))
    assert np.abs(out - in_turns).max() > 0.1


@pytest.mark.parametrize("length", [5, 131])
def test_gradients_of_shared_heads_add_up(length):
    """The gradient of a shared key head is the sum of those of its copies."""
    q, k, v = (mx.array(normal(1, h, length, 4, seed=h).astype(np.float32)) for h in (6, 2, 2))
    u = mx.array(normal(1, 6, length, 4, seed=9).astype(np.float32))
    shared = mx.vjp(attention, [q, k, v], [u])[1]
    copies = mx.vjp(attention, [q, mx.repeat(k, 3, axis=1), mx.repeat(v, 3, axis=1)], [u])[1]
    assert mx.abs(shared[0] - copies[0]).max() < 1e-5
    for one, several in zip(shared[1:], copies[1:], strict=True):
        assert mx.abs(one - several.reshape(1, 2, 3, length, 4).sum(axis=2)).max() < 1e-5


@pytest.mark.parametrize("positions", [False, True])
def test_order_does_not_matter_without_positions(positions):
    """Permuted tokens give the permuted output; with rotary positions they do not."""
    module = Attention(24, 6, num_kv_heads=2, rotary=Rotary(4, 50.0) if positions else None)
    draw(module, 1)
    x, order = mx.array(normal(2, 11, 24).astype(np.float32)), mx.array(np.random.default_rng(1).permutation(11))
    difference = mx.abs(module(x[:, order]) - module(x)[:, order]).max().item()
    assert difference > 1e-2 if positions else difference < 1e-5


@pytest.mark.parametrize(("L", "S"), [(7, 7), (5, 7), (1, 7), (131, 197)])
def test_causal_is_its_mask(L, S):
    """`causal` is the mask aligned to the lower right; the other alignment is another, but for L = S."""
    q, k, v = (mx.array(normal(2, 3, n, 4, seed=n).astype(np.float32)) for n in (L, S, S))
    out = attention(q, k, v, causal=True)
    lower, upper = (
        attention(q, k, v, mask=causal_mask(L, S, alignment=side)) for side in ("lower_right", "upper_left")
    )
    assert mx.abs(out - lower).max() < 2e-6
    assert (mx.abs(out - upper).max() < 2e-6) == (L == S)
    later = mx.array(normal(2, 3, 1, 4, seed=3).astype(np.float32))
    changed = [mx.concatenate([x[:, :, :-1], later], axis=2) for x in (k, v)]
    assert (attention(q, *changed, causal=True)[:, :, :-1] == out[:, :, :-1]).all()  # to the last bit


def test_the_page_with_the_doubled_exponent():
    """The teaching page steps i by 2 and doubles it again: the table of another period, far from the right one."""
    page = np.zeros((31, 16))
    for position in range(31):
        for i in range(0, 16, 2):
            page[position, i] = math.sin(position / 10000 ** (2 * i / 16))
            page[position, i + 1] = math.cos(position / 10000 ** (2 * i / 16))
    assert np.abs(np.array(sinusoidal(31, 16, max_period=10000.0**2)) - page).max() < 1e-6
    assert np.abs(np.array(sinusoidal(31, 16)) - page).max() > 1.9
