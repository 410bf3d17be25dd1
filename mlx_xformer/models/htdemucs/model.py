"""HTDemucs, the hybrid transformer Demucs (Rouard et al. 2022, arXiv 2211.08553), and bags of several.

Source: demucs/htdemucs.py of demucs 4.1.0. Axes: B batch, S sources, C audio channels, N samples, T frames,
F frequencies.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from typing import Any, ClassVar, SupportsIndex

import mlx.core as mx
import mlx.nn as nn

from ...backend import dispatch, norms
from ...nn.config import Config
from ...nn.linear import Linear
from ...nn.spectral import istft, reflect_pad, stft
from .config import HTDemucsConfig, Segment, levels
from .layers import DecoderLayer, EncoderLayer
from .transformer import CrossTransformer

_EPS = 1e-5


class InferenceMode(Enum):
    """FULL is HTDemucs. TIME_ONLY runs the waveform encoder and decoder alone, past transformer and spectrogram: a
    different and worse estimate that a checkpoint was not trained for, of use to look into a model."""

    FULL = "full"
    TIME_ONLY = "time_only"


class HTDemucs(nn.Module):
    """Separates (B, C, N) into (B, S, C, N). N is at most config.segment_samples (unless use_train_segment is off);
    shorter input is extended with zeros, and the model runs on the full segment."""

    def __init__(self, config: HTDemucsConfig):
        super().__init__()
        self.config = config
        plan = levels(config)
        waveform = [level for level in plan if level.freq]
        self.encoder = [EncoderLayer(config, level, time_branch=False) for level in plan]
        self.tencoder = [EncoderLayer(config, level, time_branch=True) for level in waveform]
        self.decoder = [DecoderLayer(config, level, time_branch=False) for level in reversed(plan)]
        self.tdecoder = [DecoderLayer(config, level, time_branch=True) for level in reversed(waveform)]
        if config.freq_emb:
            freqs = config.nfft // 2
            freqs = 1 if freqs <= config.kernel_size else freqs // config.stride
            self.freq_emb = nn.Embedding(freqs, plan[0].freq_channels[1])
        inner, outer = config.bottom_channels, config.bottleneck_channels
        if inner:
            self.channel_upsampler = Linear(outer, inner)
            self.channel_downsampler = Linear(inner, outer)
            self.channel_upsampler_t = Linear(outer, inner)
            self.channel_downsampler_t = Linear(inner, outer)
        if config.t_layers:
            self.crosstransformer = CrossTransformer(config)

    def __call__(
        self,
        mix: mx.array,
        *,
        position_shift: SupportsIndex | Sequence[int] = 0,
        mode: InferenceMode = InferenceMode.FULL,
    ) -> mx.array:
        """mix (B, C, N) at config.samplerate -> (B, S, C, N). `position_shift`: see CrossTransformer."""
        length = self._check(mix, position_shift)
        mode = InferenceMode(mode)
        padded = mix = mix.astype(mx.float32)
        if self.config.use_train_segment:
            padded = mx.pad(mix, [(0, 0), (0, 0), (0, self.config.segment_samples - length)])
        xt, mean_t, std_t = _standardized(padded.swapaxes(1, 2), (1, 2))  # (B, N, C)
        if mode is InferenceMode.TIME_ONLY:
            out = self._time_only(xt) * std_t + mean_t
        else:
            x, mean, std = _standardized(self._spectrogram(padded), (1, 2, 3))
            x, xt = self._run(x, xt, position_shift)
            waves = self._waves(x * std + mean, padded.shape[-1])
            out = xt * std_t + mean_t + waves
        return mx.unflatten(out.swapaxes(1, 2), 1, (len(self.config.sources), mix.shape[1]))[..., :length]

    def _check(self, mix: mx.array, position_shift: SupportsIndex | Sequence[int]) -> int:
        if mix.ndim != 3 or mix.shape[1] != self.config.audio_channels:
            raise ValueError(f"mix must be (batch, {self.config.audio_channels}, samples), got {mix.shape}")
        length = mix.shape[-1]
        longest = self.config.segment_samples if self.config.use_train_segment else math.inf
        if not isinstance(position_shift, SupportsIndex) and len(position_shift) != mix.shape[0]:
            raise ValueError(f"position_shift must be one or {mix.shape[0]} numbers, got {len(position_shift)}")
        if not 1 <= length <= longest:
            raise ValueError(f"mix must have 1 to {longest} samples, got {length}")
        return length

    def _run(
        self, x: mx.array, xt: mx.array, position_shift: SupportsIndex | Sequence[int]
    ) -> tuple[mx.array, mx.array]:
        """Both branches through encoders, transformer and decoders: x (B, T, F, 2C), xt (B, N, C) ->
        (B, T, F, S * 2C), (B, N, S * C)."""
        skips, skips_t, lengths, lengths_t = [], [], [], []
        for index, encode in enumerate(self.encoder):
            lengths.append(x.shape[1])
            inject = None
            if index < len(self.tencoder):
                lengths_t.append(xt.shape[1])
                encode_t = self.tencoder[index]
                xt = encode_t(xt)
                if encode_t.bare:
                    inject = xt
                else:
                    skips_t.append(xt)
            x = encode(x, inject)
            if index == 0 and self.config.freq_emb:
                x = x + self.freq_emb.weight * (self.config.emb_scale * self.config.freq_emb)
            skips.append(x)
        if self.config.t_layers:
            x, xt = self._transform(x, xt, position_shift)
        merged = len(self.decoder) - len(self.tdecoder)
        for index, decode in enumerate(self.decoder):
            x, before = decode(x, skips.pop(), lengths.pop())
            if index >= merged:
                decode_t = self.tdecoder[index - merged]
                if decode_t.bare:
                    xt, _ = decode_t(before[:, :, 0], None, lengths_t.pop())
                else:
                    xt, _ = decode_t(xt, skips_t.pop(), lengths_t.pop())
        return x, xt

    def _transform(
        self, x: mx.array, xt: mx.array, position_shift: SupportsIndex | Sequence[int]
    ) -> tuple[mx.array, mx.array]:
        if self.config.bottom_channels:
            x = self.channel_upsampler(x)
            xt = self.channel_upsampler_t(xt)
        x, xt = self.crosstransformer(x, xt, position_shift)
        if self.config.bottom_channels:
            x = self.channel_downsampler(x)
            xt = self.channel_downsampler_t(xt)
        return x, xt

    def _time_only(self, xt: mx.array) -> mx.array:
        if self.tencoder[-1].bare:
            raise ValueError("mode must be FULL for a model whose branches merge, got TIME_ONLY")
        skips, lengths = [], []
        for encode in self.tencoder:
            lengths.append(xt.shape[1])
            xt = encode(xt)
            skips.append(xt)
        for decode in self.tdecoder:
            xt, _ = decode(xt, skips.pop(), lengths.pop())
        return xt

    def _spectrogram(self, mix: mx.array) -> mx.array:
        """(B, C, N) -> (B, T, F, 2C) with T = ceil(N / hop) and F = nfft / 2, channels L.re L.im R.re R.im."""
        nfft, hop = self.config.nfft, self.config.nfft // 4
        frames = math.ceil(mix.shape[-1] / hop)
        pad = hop // 2 * 3
        mix = reflect_pad(mix, pad, pad + frames * hop - mix.shape[-1])
        z = stft(mix, n_fft=nfft, hop_length=hop, center=False)[..., :-1]  # no Nyquist
        parts = mx.stack([mx.real(z), mx.imag(z)], axis=2)  # (B, C, 2, T, F)
        return mx.flatten(parts, 1, 2).transpose(0, 2, 3, 1)

    def _waves(self, x: mx.array, length: int) -> mx.array:
        """(B, T, F, S * 2C) -> (B, length, S * C), the inverse of _spectrogram for every source."""
        nfft, hop = self.config.nfft, self.config.nfft // 4
        pad = hop // 2 * 3
        whole = hop * math.ceil(length / hop) + 2 * pad

        def waves(parts: mx.array) -> mx.array:
            z = mx.pad(parts[:, 0] + 1j * parts[:, 1], [(0, 0), (2, 2), (0, 1)])
            return istft(z, n_fft=nfft, hop_length=hop, length=whole)[:, pad : pad + length]

        parts = x.transpose(0, 3, 1, 2).reshape(-1, 2, *x.shape[1:3])  # (B * S * C, 2, T, F)
        return mx.unflatten(dispatch.by_rows(waves, parts), 0, (x.shape[0], -1)).swapaxes(1, 2)


def _standardized(x: mx.array, axes: tuple[int, ...]) -> tuple[mx.array, mx.array, mx.array]:
    """(x - mean) / (eps + std), mean and std over `axes`; the deviation is the unbiased one."""
    count = math.prod(x.shape[axis] for axis in axes)
    mean, var = norms.mean_var(x, axes)
    std = mx.sqrt(var * (count / max(count - 1, 1)))
    return (x - mean) / (_EPS + std), mean, std


@dataclass(frozen=True)
class BagConfig(Config):
    """Several HTDemucs over the same sources. `weights[m][s]` weighs source s of member m (all 1 without);
    `segment`, in seconds, shortens the members' own."""

    _what: ClassVar[str] = "a bag"

    members: tuple[HTDemucsConfig, ...]
    weights: tuple[tuple[float, ...], ...] | None = None
    segment: Segment | None = None

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("members must be one or more models, got none")
        first = self.members[0]
        for member in self.members[1:]:
            for name in ("sources", "samplerate", "audio_channels"):
                if getattr(member, name) != getattr(first, name):
                    raise ValueError(
                        f"{name} must be the same in every member, {getattr(first, name)}, got {getattr(member, name)}"
                    )
        if self.weights is None:
            return
        shape = (len(self.members), len(first.sources))
        if len(self.weights) != shape[0] or any(len(row) != shape[1] for row in self.weights):
            raise ValueError(f"weights must be {shape[0]} rows of {shape[1]} numbers, got {self.weights}")
        for name, column in zip(first.sources, zip(*self.weights, strict=True), strict=True):
            if sum(column) == 0:
                raise ValueError(f"weights must not sum to 0 for any source, got {column} for {name}")

    @property
    def sources(self) -> tuple[str, ...]:
        """The stems, the same in every member."""
        return self.members[0].sources

    @property
    def samplerate(self) -> int:
        """Hz, the same in every member."""
        return self.members[0].samplerate

    @property
    def audio_channels(self) -> int:
        """Channels, the same in every member."""
        return self.members[0].audio_channels

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BagConfig:
        """The configuration from plain values, as in Config; a segment such as "39/5" becomes a Fraction."""
        plain = dict(values)
        plain["members"] = tuple(HTDemucsConfig.from_dict(member) for member in values.get("members", ()))
        if plain.get("weights") is not None:
            plain["weights"] = tuple(tuple(float(weight) for weight in row) for row in plain["weights"])
        if isinstance(plain.get("segment"), str):
            plain["segment"] = Fraction(plain["segment"])
        return super().from_dict(plain)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {
            "members": [member.to_dict() for member in self.members],
            "weights": None if self.weights is None else [list(row) for row in self.weights],
            "segment": str(self.segment) if isinstance(self.segment, Fraction) else self.segment,
        }


class Bag(nn.Module):
    """The members of a bag, as `models`; not callable itself, since each takes segments of its own: `separate` runs and
    weighs them."""

    def __init__(self, config: BagConfig):
        super().__init__()
        self.config = config
        self.models = [HTDemucs(_shortened(member, config.segment)) for member in config.members]


def _shortened(config: HTDemucsConfig, segment: Segment | None) -> HTDemucsConfig:
    if segment is None or segment > config.segment:
        return config
    return dataclasses.replace(config, segment=segment)
