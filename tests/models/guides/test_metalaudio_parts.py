"""What MetalAudio's guide says in tables and notes of the parts that its cross-transformer is made of."""

import mlx.core as mx
import numpy as np
import pytest
from support.harness import check_forward, check_module, draw

from mlx_xformer.backend import activations
from mlx_xformer.nn import layers
from mlx_xformer.nn.attention import attention_score_bytes
from mlx_xformer.reference import backend as twin_kernels
from mlx_xformer.reference.nn import layers as twin_layers


def signal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape) * 1.7 + 0.4


def test_memory_of_the_scores():
    mebi = 2**20
    assert [attention_score_bytes(n) // mebi for n in (256, 512, 1024, 2048)] == [2, 8, 32, 128]
    freq, time = 2688, 1344  # tokens of a segment of the released HTDemucs
    cases = [(freq, freq), (freq, time), (time, freq), (time, time)]
    assert [attention_score_bytes(q, keys=k) / mebi for q, k in cases] == [220.5, 110.25, 110.25, 55.125]
    assert attention_score_bytes(7, num_heads=3, dtype=mx.float16, batch=5, keys=11) == 5 * 3 * 7 * 11 * 2
    assert attention_score_bytes(0) == 0
    with pytest.raises(ValueError, match="num_heads must be at least 0, got -1"):
        attention_score_bytes(5, num_heads=-1)


def test_the_score_bytes_are_those_of_an_array_of_scores():
    q = mx.zeros((3, 8, 17, 5), mx.bfloat16)
    assert (q @ mx.zeros((3, 8, 5, 23), mx.bfloat16)).nbytes == attention_score_bytes(
        17, dtype=mx.bfloat16, batch=3, keys=23
    )


def test_how_far_the_tanh_form_is_from_the_exact_gelu():
    """4.73e-4 near 2.7 on both sides, and nothing at 10: not at extreme values, as MetalAudio's tests say."""
    x = np.linspace(-12, 12, 24_001)
    twin = np.abs(twin_kernels.gelu_tanh(x) - twin_kernels.gelu(x))
    ours = np.abs(np.array(activations.gelu_tanh(mx.array(x, mx.float32)) - activations.gelu(mx.array(x, mx.float32))))
    for difference in (twin, ours):
        assert abs(difference.max() - 4.73e-4) <= 1e-6 and abs(abs(x[difference.argmax()]) - 2.7) <= 0.05
        assert difference[np.abs(x) >= 10].max() <= 2e-6


@pytest.mark.parametrize("dims", [48, 64, 96, 192, 255, 384, 512])
def test_norms_see_every_channel(dims):
    """Widths that are no power of two: a change of any one channel changes the statistics of all."""
    check_module(layers.LayerNorm(dims), twin_layers.layer_norm, signal(2, 3, dims), gradient=False)
    x = mx.array(signal(1, dims).astype(np.float32))
    changed = mx.tile(x, (dims, 1)) + mx.eye(dims) * 3
    out = np.array(layers.LayerNorm(dims)(mx.concatenate([x, changed])))
    others = np.abs(out[1:] - out[0])[~np.eye(dims, dtype=bool)].reshape(dims, dims - 1)
    assert (others.max(axis=1) > 1e-4).all()


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 5, 7), (0, 7)])
def test_feed_forward_of_any_rank(shape):
    module = layers.FeedForward(7, 13, "gelu_tanh")
    params = draw(module, 3)

    def twin(x):
        cast = {n: p.astype(x.dtype) for n, p in params.items()}
        return twin_layers.feed_forward(cast, x, activation=twin_kernels.gelu_tanh)

    check_forward(module, twin, signal(*shape))
