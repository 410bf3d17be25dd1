"""Norms, feed-forward networks and convolutions against the NumPy twin, forward and gradient."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.harness import check_forward, check_module, draw

from mlx_xformer.backend import norms
from mlx_xformer.nn import layers
from mlx_xformer.reference import backend as twin_kernels
from mlx_xformer.reference.nn import layers as twin
from mlx_xformer.reference.nn import positions as twin_positions


def signal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape) * 1.7 + 0.4


@pytest.mark.parametrize("dims", [3, 48, 255, 1537])
def test_layer_norm(dims):
    check_module(layers.LayerNorm(dims), twin.layer_norm, signal(2, 5, dims))


@pytest.mark.parametrize("dims", [3, 48])
def test_layer_norm_on_cuda(monkeypatch, dims):
    """There MLX's kernel has wrong gradients for odd widths: these take our form, run here."""
    called = []
    monkeypatch.setattr("mlx_xformer.backend.dispatch.HAS_CUDA", True)
    normalize = norms.normalize
    monkeypatch.setattr(norms, "normalize", lambda *x, **given: called.append(dims) or normalize(*x, **given))
    check_module(layers.LayerNorm(dims), twin.layer_norm, signal(2, 5, dims))
    assert bool(called) == (dims == 3)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("axes", [None, (1,)])
def test_group_norm(groups, axes):

    class Bound(layers.GroupNorm):
        def __call__(self, x):
            return super().__call__(x, axes)

    check_module(Bound(groups, 6), lambda p, x: twin.group_norm(p, x, num_groups=groups, axes=axes), signal(2, 7, 5, 6))


def test_group_norm_of_a_long_waveform():
    module = layers.GroupNorm(1, 5)
    params = draw(module, 1)
    check_forward(
        module,
        lambda x: twin.group_norm({k: v.astype(x.dtype) for k, v in params.items()}, x, num_groups=1),
        signal(1, 85_995, 5),
    )


def test_group_norm_error():
    with pytest.raises(ValueError, match="num_groups must divide dims, 6, got 4"):
        layers.GroupNorm(4, 6)


def test_layer_scale():
    check_module(layers.LayerScale(7), twin.layer_scale, signal(2, 5, 7))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_feed_forward(activation):
    module, function = layers.FeedForward(7, 13, activation), getattr(twin_kernels, activation)
    check_module(module, lambda p, x: twin.feed_forward(p, x, activation=function), signal(2, 5, 7))


def test_feed_forward_error():
    with pytest.raises(ValueError, match="activation must be one of gelu, gelu_tanh, relu, silu, got 'tanh'"):
        layers.FeedForward(3, 5, "tanh")


@pytest.mark.parametrize("dilation", [1, 2, 5])
@pytest.mark.parametrize("length", [1, 3, 17])
def test_dilated_convolution(length, dilation):
    module = layers.DilatedConv1d(5, 2, 3, dilation)
    check_module(module, lambda p, x: twin.conv1d(p, x, padding=dilation, dilation=dilation), signal(2, length, 5))


def test_dilated_convolution_of_each_frequency_row():
    module = layers.DilatedConv1d(5, 2, 3, 2)

    def rows(p, x):
        return np.stack([twin.conv1d(p, x[:, :, f], padding=2, dilation=2) for f in range(x.shape[2])], axis=2)

    check_module(module, rows, signal(2, 11, 3, 5))


def test_dilated_convolution_error():
    with pytest.raises(ValueError, match="kernel_size must be odd, got 4"):
        layers.DilatedConv1d(3, 3, 4, 1)


@pytest.mark.parametrize(("kernel", "stride"), [(8, 4), (4, 2), (7, 3), (2, 5), (1, 1), (4, 4)])
def test_transposed_convolution(kernel, stride):
    module = layers.ConvTranspose1d(5, 3, kernel, stride)
    # A stride beyond the kernel leaves gaps that only the bias fills.
    check_module(module, lambda p, x: twin.conv_transpose1d(p, x, stride=stride), signal(2, 11, 5))


@pytest.mark.parametrize("eps", [0.0, -1e-5, float("nan"), "1e-5", True])
@pytest.mark.parametrize(
    "make", [layers.LayerNorm, layers.RMSNorm, layers.WholeRMSNorm, partial(layers.GroupNorm, 2)], ids=str
)
def test_norms_refuse_an_eps_that_gives_nan(make, eps):
    with pytest.raises(ValueError, match=f"eps must be a number above 0, got {eps!r}"):
        make(8, eps)


@pytest.mark.parametrize(("groups", "dims"), [(4, 0), (0, 4), (4, 8.0), ("2", 8), (2, -8)])
def test_group_norm_refuses_sizes(groups, dims):
    with pytest.raises(ValueError, match=r"(num_groups|dims) must be a whole number from 1, got"):
        layers.GroupNorm(groups, dims)
    if groups == 4:
        with pytest.raises(ValueError, match="dims must be a whole number from 1, got"):
            layers.LayerNorm(dims)


@pytest.mark.parametrize("dims", [1, 7, 8])
def test_positional_encoding(dims):
    """Rows get the same positions, positions different ones; the table is the twin's, from any offset."""
    x = signal(3, 5, dims)
    layer = layers.PositionalEncoding(dims, max_len=12)
    for offset in (0, 7):
        table = twin_positions.sinusoidal(5, dims, offset=offset)
        check_forward(partial(layer, offset=offset), lambda x, t=table: x + t.astype(x.dtype), x)
    zero = layer(mx.zeros((3, 5, dims)))
    assert (zero == zero[:1]).all() and (mx.abs(zero[0, 1:] - zero[0, :-1]).max(axis=-1) > 0).all()
    assert (layer(mx.zeros((5, dims))) == zero[0]).all() and not tree_flatten(layer.parameters())
    assert layer(mx.zeros((2, 5, dims), mx.float16)).dtype == mx.float16


def test_positional_encoding_drops_in_training_only():
    layer = layers.PositionalEncoding(8, dropout=0.5)
    x = mx.full((4, 9, 8), 3.0)
    key = mx.random.key(3)
    out, plain = layer(x, key=key), layer.eval()(x)
    assert (layer(x, key=key) == plain).all()
    assert 0.3 < (out == 0).mean().item() < 0.7 and mx.where(out == 0, 0, mx.abs(out - 2 * plain)).max() <= 1e-5
    with pytest.raises(ValueError, match="dropout in training needs a random key, got none"):
        layer.train()(x)


@pytest.mark.parametrize(
    ("shape", "given", "message"),
    [
        ((2, 13, 8), {}, "positions must be from 0 to 11, got 13 of them from 0 on"),
        ((2, 5, 8), {"offset": 8}, "positions must be from 0 to 11, got 5 of them from 8 on"),
        ((2, 5, 8), {"offset": -1}, "positions must be from 0 to 11, got 5 of them from -1 on"),
        ((2, 5, 7), {}, r"x must be \(B, L, 8\) or \(L, 8\), got shape \(2, 5, 7\)"),
    ],
)
def test_positional_encoding_refuses(shape, given, message):
    with pytest.raises(ValueError, match=message):
        layers.PositionalEncoding(8, max_len=12)(mx.zeros(shape), **given)
