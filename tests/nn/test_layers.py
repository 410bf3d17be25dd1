"""Norms, feed-forward networks and convolutions against the NumPy twin, forward and gradient."""

from functools import partial

import numpy as np
import pytest
from support.harness import check_forward, check_module, draw

from mlx_xformer.backend import norms
from mlx_xformer.nn import layers
from mlx_xformer.reference import backend as twin_kernels
from mlx_xformer.reference.nn import layers as twin


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
