"""Hot parts of HTDemucs at their official sizes: the plain MLX form against the package's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cases.common import describe_ours
from mlx_xformer import attention
from mlx_xformer.backend import activations, device, fused, norms
from mlx_xformer.nn import spectral
from mlx_xformer.nn.layers import ConvTranspose1d, DilatedConv1d

# isort: split
import mlx.nn as nn  # after mlx_xformer, which chooses the BLAS

mx = device.mx

PAIRS = {  # part: (the plain form, ours), functions below
    "gelu": ("plain_gelu", "our_gelu"),
    "glu": ("plain_glu", "our_glu"),
    "group-norm": ("plain_group_norm", "our_group_norm"),
    "attention": ("plain_attention", "our_attention"),
    "dilated-conv": ("plain_dilated_conv", "our_dilated_conv"),
    "transposed-conv": ("plain_transposed_conv", "our_transposed_conv"),
    "rewrite": ("plain_rewrite", "our_rewrite"),
    "expand": ("plain_expand", "our_expand"),
    "stft": ("plain_stft", "our_stft"),
}


def draw(*shape: int) -> Any:
    """Normal numbers, the same in every process."""
    x = mx.array(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    mx.eval(x)
    return x


def case(compute: Callable[..., Any], *inputs: Any) -> dict[str, Any]:
    """What bench/worker.py wants."""

    def run() -> None:
        mx.eval(compute(*inputs))

    return describe_ours(run)


def plain_gelu(_: Path) -> dict[str, Any]:
    return case(nn.gelu, draw(1, 85995, 48))


def our_gelu(_: Path) -> dict[str, Any]:
    return case(activations.gelu, draw(1, 85995, 48))


def plain_glu(_: Path) -> dict[str, Any]:
    return case(lambda x: nn.glu(x, axis=-1), draw(1, 85995, 96))


def our_glu(_: Path) -> dict[str, Any]:
    return case(activations.glu, draw(1, 85995, 96))


def plain_group_norm(_: Path) -> dict[str, Any]:
    return case(nn.GroupNorm(1, 96, pytorch_compatible=True), draw(1, 85995, 96))


def our_group_norm(_: Path) -> dict[str, Any]:
    weight, bias = mx.ones(96), mx.zeros(96)
    return case(lambda x: norms.normalize(x, weight, bias, axes=(1,), eps=1e-5), draw(1, 85995, 96))


def plain_attention(_: Path) -> dict[str, Any]:
    q = draw(1, 8, 2688, 64)
    return case(lambda q: mx.fast.scaled_dot_product_attention(q, q, q, scale=0.125), q)


def our_attention(_: Path) -> dict[str, Any]:
    return case(lambda q: attention(q, q, q), draw(1, 8, 2688, 64))


def plain_dilated_conv(_: Path) -> dict[str, Any]:
    return case(nn.Conv1d(48, 6, 3, padding=2, dilation=2), draw(512, 336, 48))


def our_dilated_conv(_: Path) -> dict[str, Any]:
    return case(DilatedConv1d(48, 6, 3, 2), draw(512, 336, 48))


def plain_transposed_conv(_: Path) -> dict[str, Any]:
    return case(nn.ConvTranspose1d(96, 48, 8, stride=4), draw(1, 21499, 96))


def our_transposed_conv(_: Path) -> dict[str, Any]:
    return case(ConvTranspose1d(96, 48, 8, 4), draw(1, 21499, 96))


def _rewrite(form: Callable[..., Any]) -> dict[str, Any]:
    """The outermost 3x3 rewrite of the decoder, its bias and its GLU."""
    return case(form, draw(1, 336, 512, 48), draw(96, 3, 3, 48) / 20, draw(96))


def plain_rewrite(_: Path) -> dict[str, Any]:
    return _rewrite(lambda x, weight, bias: nn.glu(mx.conv2d(x, weight, padding=1) + bias, axis=-1))


def our_rewrite(_: Path) -> dict[str, Any]:
    return _rewrite(fused.conv_glu)


def _expand(form: Callable[..., Any]) -> dict[str, Any]:
    """The second half of an outermost DConv step: 1x1 convolution, norm, GLU, scale and residual sum."""
    return case(form, draw(1, 85995, 6), draw(96, 6), draw(96), draw(96), draw(96), draw(48), draw(1, 85995, 48))


def plain_expand(_: Path) -> dict[str, Any]:
    def form(x: Any, weight: Any, bias: Any, norm_weight: Any, norm_bias: Any, scale: Any, residual: Any) -> Any:
        norm = nn.GroupNorm(1, 96, pytorch_compatible=True)
        norm.weight, norm.bias = norm_weight, norm_bias
        return residual + scale * nn.glu(norm(x @ weight.T + bias), axis=-1)

    return _expand(form)


def our_expand(_: Path) -> dict[str, Any]:
    return _expand(partial(fused.expand_norm_glu_add, eps=1e-5))


def plain_stft(_: Path) -> dict[str, Any]:
    """Frames gathered by index instead of strides."""
    window = spectral.hann_window(4096)
    index = mx.arange(333)[:, None] * 1024 + mx.arange(4096)[None]
    return case(lambda x: mx.fft.rfft(mx.take(x, index, axis=-1) * window), draw(2, 344064))


def our_stft(_: Path) -> dict[str, Any]:
    return case(lambda x: spectral.stft(x, n_fft=4096, hop_length=1024, center=False), draw(2, 344064))
