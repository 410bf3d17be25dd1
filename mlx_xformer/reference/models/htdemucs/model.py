"""HTDemucs: a spectrogram U-Net and a waveform U-Net around one cross-transformer.

Axes: B batch, S sources, C channels, N samples; inside, spectrograms are (B, T, F, C) and waveforms
(B, T, C). `config` is any object with the keywords of demucs.htdemucs.HTDemucs as attributes.
Source: demucs/htdemucs.py.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from ...backend import mean_var
from ...nn.layers import Params, linear, sub
from ...nn.spectral import istft, reflect_pad, stft
from .layers import decoder_layer, encoder_layer
from .transformer import cross_transformer


class Level(NamedTuple):
    """One depth of the spectrogram U-Net, which turns into a waveform U-Net once one frequency is left."""

    freq: bool  # still convolves over frequencies
    merges: bool  # the last that does: takes the waveform branch in
    stride: int
    padding: int


def levels(config: Any) -> list[Level]:
    """The levels from the outside in."""
    found = []
    freqs = config.nfft // 2
    for _ in range(config.depth):
        if freqs == 1:
            found.append(Level(False, False, config.time_stride, 2 * config.time_stride // 4))
        elif freqs <= config.kernel_size:
            found.append(Level(True, True, config.stride, 0))  # one kernel takes in all frequencies
            freqs = 1
        else:
            found.append(Level(True, False, config.stride, config.kernel_size // 4))
            freqs //= config.stride
    return found


def spectrogram(config: Any, mix: np.ndarray) -> np.ndarray:
    """(B, C, N) -> complex (B, C, T, F), a frame per nfft / 4 samples begun, without the Nyquist bin."""
    hop = config.nfft // 4
    N = mix.shape[-1]
    T = math.ceil(N / hop)
    pad = hop // 2 * 3
    padded = reflect_pad(mix, pad, pad + T * hop - N)
    z = stft(padded, n_fft=config.nfft, hop_length=hop)  # (B, C, T + 4, F + 1)
    return z[..., 2 : 2 + T, :-1]


def waveform(config: Any, z: np.ndarray, length: int) -> np.ndarray:
    """The inverse of `spectrogram`: complex (..., T, F) -> (..., length)."""
    hop = config.nfft // 4
    pad = hop // 2 * 3
    z = np.pad(z, [(0, 0)] * (z.ndim - 2) + [(2, 2), (0, 1)])  # (..., T + 4, F + 1)
    x = istft(z, n_fft=config.nfft, hop_length=hop, length=hop * math.ceil(length / hop) + 2 * pad)
    return x[..., pad : pad + length]


def _standardise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each item of the batch to mean 0 and (unbiased) standard deviation 1, with what undoes it."""
    axes = tuple(range(1, x.ndim))
    mean, var = mean_var(x, axes)
    n = x[0].size
    std = np.sqrt(var * (n / (n - 1)))
    return (x - mean) / (1e-5 + std), mean, std


def _options(config: Any, index: int, *, decoder: bool) -> dict[str, Any]:
    """What the layers of one level have in common in both branches."""
    return {
        "norm_groups": config.norm_groups if index >= config.norm_starts else None,
        "rewrite": config.rewrite,
        "context": config.context if decoder else config.context_enc,
        "dconv_depth": config.dconv_depth if config.dconv_mode & (2 if decoder else 1) else None,
    }


class _Run:
    """One pass: the parameters, the taps, and the skips from the encoders to the decoders."""

    def __init__(self, params: Params, config: Any, taps: dict | None):
        self.params, self.config, self.taps = params, config, taps
        self.levels = levels(config)
        self.time_levels = sum(level.freq for level in self.levels)
        self.time_conv = {"stride": config.stride, "padding": config.kernel_size // 4}
        self.skips: list[np.ndarray] = []
        self.skips_t: list[np.ndarray] = []
        self.lengths: list[int] = []
        self.lengths_t: list[int] = []

    def tap(self, name: str, value: Any) -> Any:
        if self.taps is not None:
            self.taps[name] = value
        return value

    def encode_time(self, index: int, xt: np.ndarray) -> np.ndarray:
        """(B, T, C) -> (B, T / stride, C'); the level that merges is its convolution alone."""
        name, empty = f"tencoder.{index}", self.levels[index].merges
        self.lengths_t.append(xt.shape[1])
        options = _options(self.config, index, decoder=False)
        xt = encoder_layer(sub(self.params, name), xt, empty=empty, **self.time_conv, **options)
        xt = self.tap(name, xt)
        if not empty:
            self.skips_t.append(xt)
        return xt

    def encode(self, index: int, x: np.ndarray, inject: np.ndarray | None) -> np.ndarray:
        """(B, T, F, C) -> (B, T, F', C'), or over T once F is 1."""
        name, level = f"encoder.{index}", self.levels[index]
        if not level.freq and x.ndim == 4:
            x = x[:, :, 0, :]  # (B, T, 1, C) -> (B, T, C)
        self.lengths.append(x.shape[1])
        options = _options(self.config, index, decoder=False)
        params = sub(self.params, name)
        x = encoder_layer(params, x, inject, stride=level.stride, padding=level.padding, **options)
        x = self.tap(name, x)
        if index == 0 and self.config.freq_emb:
            table = self.params["freq_emb.weight"] * self.config.emb_scale  # (F', C')
            x = x + self.config.freq_emb * table
        self.skips.append(x)
        return x

    def decode(self, index: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The mirror of `encode`; `index` counts from the inside."""
        name, outer = f"decoder.{index}", self.config.depth - 1 - index
        level = self.levels[outer]
        if level.freq and x.ndim == 3:
            x = x[:, :, None, :]  # (B, T, C) -> (B, T, 1, C)
        options = _options(self.config, outer, decoder=True) | {"last": outer == 0}
        skip, length = self.skips.pop(), self.lengths.pop()
        params = sub(self.params, name)
        x, pre = decoder_layer(params, x, skip, length, stride=level.stride, padding=level.padding, **options)
        return self.tap(name, x), pre

    def decode_time(self, index: int, xt: np.ndarray) -> np.ndarray:
        """The mirror of `encode_time`; `index` counts from the inside."""
        name, outer = f"tdecoder.{index}", self.time_levels - 1 - index
        empty = self.levels[outer].merges
        options = _options(self.config, outer, decoder=True) | {"last": outer == 0, "empty": empty}
        skip, length = None if empty else self.skips_t.pop(), self.lengths_t.pop()
        xt, _ = decoder_layer(sub(self.params, name), xt, skip, length, **self.time_conv, **options)
        return self.tap(name, xt)

    def transform(self, x: np.ndarray, xt: np.ndarray, position_shift: int) -> tuple[np.ndarray, np.ndarray]:
        """The transformer, between two changes of width if the config has them."""
        params, resample = self.params, self.config.bottom_channels
        if resample:
            x = self.tap("channel_upsampler", linear(sub(params, "channel_upsampler"), x))
            xt = self.tap("channel_upsampler_t", linear(sub(params, "channel_upsampler_t"), xt))
        inner = sub(params, "crosstransformer")
        x, xt = cross_transformer(inner, self.config, x, xt, position_shift=position_shift)
        self.tap("crosstransformer", (x, xt))
        if resample:
            x = self.tap("channel_downsampler", linear(sub(params, "channel_downsampler"), x))
            xt = self.tap("channel_downsampler_t", linear(sub(params, "channel_downsampler_t"), xt))
        return x, xt

    def both(self, x: np.ndarray, xt: np.ndarray, position_shift: int) -> tuple[np.ndarray, np.ndarray]:
        """Both branches, normalised input to normalised output."""
        for index in range(self.config.depth):
            inject = None
            if index < self.time_levels:
                xt = self.encode_time(index, xt)
                inject = xt if self.levels[index].merges else None
            x = self.encode(index, x, inject)
        if self.config.t_layers:
            x, xt = self.transform(x, xt, position_shift)
        for index in range(self.config.depth):
            x, pre = self.decode(index, x)
            index_t = index - (self.config.depth - self.time_levels)
            if index_t >= 0:
                outer = self.time_levels - 1 - index_t
                xt = self.decode_time(index_t, pre[:, :, 0, :] if self.levels[outer].merges else xt)
        return x, xt

    def time(self, xt: np.ndarray) -> np.ndarray:
        """The waveform branch alone, its encoder joined straight to its decoder."""
        for index in range(self.time_levels):
            xt = self.encode_time(index, xt)
        for index in range(self.time_levels):
            xt = self.decode_time(index, xt)
        return xt


def _check(params: Params, config: Any, mix: np.ndarray, time_only: bool) -> int:
    """The number of samples that the model runs on."""
    for name, value in params.items():
        if value.dtype != mix.dtype:
            raise ValueError(f"{name} must be {mix.dtype} like the mix, got {value.dtype}")
    if time_only and any(level.merges for level in levels(config)):
        raise ValueError(f"time_only must be False where branches merge, got True with depth {config.depth}")
    N = mix.shape[-1]
    if not config.use_train_segment:
        return N
    length = int(config.segment * config.samplerate)
    if length < N:
        raise ValueError(f"samples must be at most the training segment of {length}, got {N}")
    return length


def htdemucs(
    params: Params,
    config: Any,
    mix: np.ndarray,
    *,
    position_shift: int = 0,
    taps: dict | None = None,
    time_only: bool = False,
) -> np.ndarray:
    """Separate one segment: (B, C, N) -> (B, S, C, N).

    `position_shift` moves the waveform positions (t_emb "sin"). `taps` collects the output of each part under
    its module name, "crosstransformer" a pair; encoder.0 is before the frequency embedding is added.
    `time_only` runs the waveform branch alone, past transformer and resamplers, without any spectrogram.
    """
    length = _check(params, config, mix, time_only)
    B, C, N = mix.shape
    S = len(config.sources)
    mix = np.pad(mix, ((0, 0), (0, 0), (0, length - N)))
    run = _Run(params, config, taps)
    xt, mean_t, std_t = _standardise(mix.transpose(0, 2, 1))  # (B, N, C)
    if time_only:
        xt = run.time(xt)
    else:
        z = spectrogram(config, mix)  # (B, C, T, F)
        T, F = z.shape[2:]
        x = np.stack([z.real, z.imag], axis=-1).transpose(0, 2, 3, 1, 4).reshape(B, T, F, 2 * C)
        x, mean, std = _standardise(x)
        x, xt = run.both(x, xt, position_shift)  # (B, T, F, 2 S C), (B, N, S C)
        x = (x * std + mean).reshape(B, T, F, S, C, 2).transpose(5, 0, 3, 4, 1, 2)  # (2, B, S, C, T, F)
    out = (xt * std_t + mean_t).reshape(B, length, S, C).transpose(0, 2, 3, 1)  # (B, S, C, N)
    if not time_only:
        out = out + waveform(config, x[0] + 1j * x[1], length)
    return np.ascontiguousarray(out[..., :N])
