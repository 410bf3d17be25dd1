"""The convolutional layers of HTDemucs, channels-last. Sources: demucs/hdemucs.py and demucs/demucs.py.

The waveform branch is (B, T, C); the spectrogram branch is (B, T, F, C), frames before frequencies, so that its
convolutions over frequency are one-dimensional ones with B * T as batch, and its tokens are a reshape away.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ...backend import activations, dispatch, fused
from ...nn.layers import ConvTranspose1d, DilatedConv1d, GroupNorm, LayerScale
from .config import HTDemucsConfig, Level


class DConvBranch(nn.Module):
    """One residual step of DConv: dilated convolution, norm, GELU, 1x1 convolution, norm, GLU, LayerScale."""

    def __init__(self, channels: int, hidden: int, dilation: int, init: float):
        super().__init__()
        self.conv = DilatedConv1d(channels, hidden, 3, dilation)
        self.norm1 = GroupNorm(1, hidden)
        self.expand = nn.Linear(hidden, 2 * channels)
        self.norm2 = GroupNorm(1, 2 * channels)
        self.layer_scale = LayerScale(channels, init)

    def __call__(self, x: mx.array) -> mx.array:
        """Returns x (B, T, ..., C) with the residual branch added."""
        norm1, norm2 = self.norm1, self.norm2
        y = fused.norm_gelu(self.conv(x), norm1.weight, norm1.bias, axes=(1,), eps=norm1.eps)
        return fused.expand_norm_glu_add(
            y,
            self.expand.weight,
            self.expand.bias,
            norm2.weight,
            norm2.bias,
            self.layer_scale.scale,
            x,
            eps=norm2.eps,
        )


class DConv(nn.Module):
    """Residual dilated convolutions over time; every frequency row is a sequence of its own."""

    def __init__(self, channels: int, config: HTDemucsConfig):
        super().__init__()
        hidden = int(channels / config.dconv_comp)
        dilate = config.dconv_depth > 0
        self.layers = [
            DConvBranch(channels, hidden, 2**d if dilate else 1, config.dconv_init)
            for d in range(abs(config.dconv_depth))
        ]

    def __call__(self, x: mx.array) -> mx.array:
        """Returns x (B, T, ..., C) with the residual branches added, one after the other."""
        for layer in self.layers:
            x = layer(x)
        return x


def _rewrite(channels: int, context: int, freq: bool) -> nn.Module:
    """channels -> 2 * channels over a neighbourhood of `context` in time (and frequency); without one, a Linear."""
    if context == 0:
        return nn.Linear(channels, 2 * channels)
    size = 2 * context + 1
    if freq:
        return nn.Conv2d(channels, 2 * channels, size, padding=context)
    return nn.Conv1d(channels, 2 * channels, size, padding=context)


def _gated(rewrite: nn.Module, x: mx.array, norm: nn.Module | None) -> mx.array:
    """The GLU of the rewritten and, given a norm, normalised channels."""
    if norm is None:
        return fused.conv_glu(x, rewrite.weight, rewrite.bias)
    return activations.glu(norm(rewrite(x)))


class EncoderLayer(nn.Module):
    """A strided convolution, a DConv and a gated rewrite.

    (B, T, F, C) -> (B, T, F / stride, O) over frequency, or (B, T, C) -> (B, T / stride, O) over time.
    """

    def __init__(self, config: HTDemucsConfig, level: Level, *, time_branch: bool):
        super().__init__()
        channels_in, channels = level.time_channels if time_branch else level.freq_channels
        self.freq = level.freq and not time_branch
        kernel_size = config.kernel_size if time_branch else level.kernel_size
        self.stride = config.stride if time_branch else level.stride
        pad = config.kernel_size // 4 if time_branch else level.pad
        self.bare = time_branch and level.merging
        self.conv = nn.Conv1d(channels_in, channels, kernel_size, stride=self.stride, padding=pad)
        if self.bare:
            return
        self.normed = level.norm
        if level.norm:
            self.norm1 = GroupNorm(config.norm_groups, channels)
        self.rewrites = config.rewrite
        if config.rewrite:
            self.rewrite = _rewrite(channels, config.context_enc, self.freq)
            if level.norm:
                self.norm2 = GroupNorm(config.norm_groups, 2 * channels)
        self.dilated = bool(config.dconv_mode & 1)
        if self.dilated:
            self.dconv = DConv(channels, config)

    def __call__(self, x: mx.array, inject: mx.array | None = None) -> mx.array:
        """Encodes x; `inject`, if given, is added after the convolution."""
        if self.freq:
            B, T, _, _ = x.shape
            y = mx.unflatten(dispatch.by_rows(self.conv, mx.flatten(x, 0, 1)), 0, (B, T))
        else:
            if x.ndim == 4:  # the one frequency row that is left: (B, T, 1, C) -> (B, T, C)
                x = mx.flatten(x, 2, 3)
            x = mx.pad(x, [(0, 0), (0, -x.shape[1] % self.stride), (0, 0)])
            y = self.conv(x)
        if self.bare:
            return y
        if inject is not None:
            y = y + (inject[:, :, None] if y.ndim == 4 else inject)
        y = activations.gelu(self.norm1(y) if self.normed else y)
        if self.dilated:
            y = self.dconv(y)
        if not self.rewrites:
            return y
        return _gated(self.rewrite, y, self.norm2 if self.normed else None)


class DecoderLayer(nn.Module):
    """The mirror of EncoderLayer: skip connection, gated rewrite, DConv and a transposed convolution."""

    def __init__(self, config: HTDemucsConfig, level: Level, *, time_branch: bool):
        super().__init__()
        channels = (level.time_channels if time_branch else level.freq_channels)[1]
        channels_out = level.time_out if time_branch else level.freq_out
        self.freq = level.freq and not time_branch
        kernel_size = config.kernel_size if time_branch else level.kernel_size
        stride = config.stride if time_branch else level.stride
        self.pad = config.kernel_size // 4 if time_branch else level.pad
        self.outermost = level.index == 0
        self.bare = time_branch and level.merging  # no skip connection
        self.normed = level.norm
        self.conv_tr = ConvTranspose1d(channels, channels_out, kernel_size, stride)
        if level.norm:
            self.norm2 = GroupNorm(config.norm_groups, channels_out)
        if self.bare:
            return
        self.rewrites = config.rewrite
        if config.rewrite:
            self.rewrite = _rewrite(channels, config.context, self.freq)
            if level.norm:
                self.norm1 = GroupNorm(config.norm_groups, 2 * channels)
        self.dilated = bool(config.dconv_mode & 2)
        if self.dilated:
            self.dconv = DConv(channels, config)

    def __call__(self, x: mx.array, skip: mx.array | None, length: int) -> tuple[mx.array, mx.array]:
        """Returns the output, and what went into the transposed convolution.

        The output is cut to `length` along time where the layer upsamples time. The waveform branch restarts below the
        merge from the second value.
        """
        if self.freq and x.ndim == 3:
            x = x[:, :, None]
        y = x if skip is None else self._gated(x + skip)
        if self.freq:
            B, T, _, _ = y.shape
            z = mx.unflatten(self.conv_tr(mx.flatten(y, 0, 1)), 0, (B, T))
        else:
            z = self.conv_tr(y)
        if self.normed:
            z = self.norm2(z)
        if not self.outermost:  # before z is cut, as long as it is dense
            z = activations.gelu(z)
        if self.freq:
            return (z[:, :, self.pad : -self.pad] if self.pad else z), y
        if z.shape[1] < self.pad + length:
            raise ValueError(f"time_stride must bring back {length} samples, got {z.shape[1] - self.pad}")
        return z[:, self.pad : self.pad + length], y

    def _gated(self, x: mx.array) -> mx.array:
        if self.rewrites:
            x = _gated(self.rewrite, x, self.norm1 if self.normed else None)
        return self.dconv(x) if self.dilated else x
