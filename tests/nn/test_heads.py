"""Channels to heads and back, and repeated key/value heads, against the twin."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.harness import check_forward, check_gradient

from mlx_xformer.models.guides.ferrotorch import AttentionLayer, AttentionLayerConfig
from mlx_xformer.nn.attention import heads
from mlx_xformer.nn.attention.config import AttentionConfig
from mlx_xformer.nn.attention.core import attention
from mlx_xformer.reference.nn import attention as twin


def array(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("shape", [(5, 12), (2, 5, 12), (2, 1, 12), (1, 12), (2, 0, 12)], ids=str)
def test_to_heads_and_back(shape):
    x = array(*shape)
    check_forward(lambda x: heads.reshape_to_heads(x, 3), lambda x: twin.reshape_to_heads(x, 3), x)
    y = twin.reshape_to_heads(x, 3)
    check_forward(heads.transpose_heads_to_2d, twin.transpose_heads_to_2d, y)
    assert (heads.transpose_heads_to_2d(heads.reshape_to_heads(mx.array(x), 3)) == mx.array(x)).all()
    if x.size:
        check_gradient(lambda x: heads.reshape_to_heads(x, 3), lambda x: twin.reshape_to_heads(x, 3), x)
        check_gradient(heads.transpose_heads_to_2d, twin.transpose_heads_to_2d, y)


@pytest.mark.parametrize("group_size", [1, 2, 3])
@pytest.mark.parametrize("shape", [(2, 5, 7), (3, 2, 5, 7)], ids=str)
def test_repeat_kv(shape, group_size):
    """Heads are consecutive, and the gradient is the sum over the group."""
    x = array(*shape)
    check_forward(lambda x: heads.repeat_kv(x, group_size), lambda x: twin.repeat_kv(x, group_size), x)
    check_gradient(lambda x: heads.repeat_kv(x, group_size), lambda x: twin.repeat_kv(x, group_size), x)
    gradient = mx.grad(lambda x: heads.repeat_kv(x, group_size).sum())(mx.array(x.astype(np.float32)))
    assert (gradient == group_size).all()
    given = mx.array(x)
    assert (heads.repeat_kv(given, group_size) is given) == (group_size == 1)


def test_repeated_heads_are_what_attention_reads():
    q, k, v = (mx.array(array(2, H, 5, 7, seed=H).astype(np.float32)) for H in (6, 2, 2))
    repeated = attention(q, heads.repeat_kv(k, 3), heads.repeat_kv(v, 3))
    assert mx.abs(attention(q, k, v) - repeated).max() <= 1e-6


@pytest.mark.parametrize("group_size", [1, 2])
def test_refusals(group_size):
    with pytest.raises(ValueError, match=r"x must be \(heads, length, dim\) or .*, got shape \(5, 7\)"):
        heads.repeat_kv(mx.zeros((5, 7)), group_size)
    with pytest.raises(ValueError, match="group_size must be a whole number from 1, got 0"):
        heads.repeat_kv(mx.zeros((2, 5, 7)), 0)
    with pytest.raises(ValueError, match="num_heads must divide the channels of x, 12, got 5"):
        heads.reshape_to_heads(mx.zeros((3, 12)), 5)
    with pytest.raises(ValueError, match=r"x must be \(length, channels\) or .*, got shape \(12,\)"):
        heads.reshape_to_heads(mx.zeros(12), 3)
    with pytest.raises(ValueError, match=r"x must be \(heads, length, dim\) or .*, got shape \(3, 4\)"):
        heads.transpose_heads_to_2d(mx.zeros((3, 4)))


@pytest.mark.parametrize(("num_kv_heads", "expected"), [(None, False), (6, False), (3, True), (1, True)])
def test_is_gqa(num_kv_heads, expected):
    assert AttentionConfig(12, 6, num_kv_heads=num_kv_heads).is_gqa == expected
    assert AttentionLayer(AttentionLayerConfig(12, 6, num_kv_heads)).is_gqa == expected


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 5])
def test_forward_2d(length, causal):
    """One position takes the general path: NaN of the query reaches the result, and its weights' gradient is 0."""
    layer = AttentionLayer(AttentionLayerConfig(12, 3, causal=causal))
    x = mx.array(array(length, 12).astype(np.float32))
    assert (layer.forward_2d(x) == layer(x[None])[0]).all()
    params = {name: np.array(value) for name, value in tree_flatten(layer.parameters())}
    expected = twin.attention_layer(params, np.array(x)[None], num_heads=3, causal=causal)[0]
    assert np.abs(np.array(layer.forward_2d(x)) - expected).max() <= 1e-5
    assert mx.isnan(layer.forward_2d(mx.full((length, 12), mx.nan))).all()
    if length == 1:
        gradient = mx.grad(lambda w: layer.update({"q_proj": {"weight": w}}).forward_2d(x).sum())(layer.q_proj.weight)
        assert gradient.shape == (12, 12) and mx.abs(gradient).max() < 1e-6


def test_forward_2d_refuses():
    layer = AttentionLayer(AttentionLayerConfig(12, 6, 2))
    with pytest.raises(ValueError, match="forward_2d needs a key/value head for every query head, 6, got 2"):
        layer.forward_2d(mx.zeros((5, 12)))
    with pytest.raises(ValueError, match=r"x must be \(length, channels\), got shape \(1, 5, 12\)"):
        AttentionLayer(AttentionLayerConfig(12, 6)).forward_2d(mx.zeros((1, 5, 12)))
