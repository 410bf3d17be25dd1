"""The configuration of HTDemucs, under the names and with the defaults of demucs 4.1.0, and the plan of its levels."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

from ...nn.config import Config

Segment = int | float | Fraction

# What this implementation leaves out on purpose: option -> (the only value taken, why).
_REFUSED: dict[str, tuple[Any, str]] = {
    "cac": (True, "only complex-as-channels spectrograms are implemented"),
    "wiener_iters": (0, "Wiener filtering is not implemented"),
    "end_iters": (0, "Wiener filtering is not implemented"),
    "wiener_residual": (False, "Wiener filtering is not implemented"),
    "multi_freqs": ((), "split frequency bands are not implemented"),
    "t_sparse_self_attn": (False, "sparse attention is not implemented"),
    "t_sparse_cross_attn": (False, "sparse attention is not implemented"),
}

_POSITIVE = (
    "audio_channels",
    "channels",
    "growth",
    "depth",
    "kernel_size",
    "stride",
    "time_stride",
    "samplerate",
    "segment",
    "norm_groups",
    "dconv_comp",
    "t_heads",
    "t_hidden_scale",
    "t_max_positions",
    "t_max_period",
)
# Far beyond any model, and below what would keep a reader of a hostile file busy.
_LARGEST = {
    "audio_channels": 1000,
    "channels": 10**6,
    "growth": 1000,
    "depth": 30,
    "nfft": 2**24,
    "samplerate": 10**7,
    "segment": 10**5,
    "dconv_depth": 100,
    "t_layers": 1000,
    "t_hidden_scale": 1000,
    "t_max_positions": 10**8,
}


@dataclass(frozen=True)
class HTDemucsConfig(Config):
    """Every keyword of demucs.htdemucs.HTDemucs; see that class for their meaning. `segment` is in seconds.

    ValueError names the field that is unknown, out of range or not implemented. Options that only matter in
    training (dropout, initialisation, learning rates, masks of sparse attention) are kept, so that a checkpoint
    goes back to PyTorch as it came.
    """

    _what: ClassVar[str] = "HTDemucs"

    sources: tuple[str, ...]
    audio_channels: int = 2
    channels: int = 48
    channels_time: int | None = None
    growth: int | float = 2
    nfft: int = 4096
    wiener_iters: int = 0
    end_iters: int = 0
    wiener_residual: bool = False
    cac: bool = True
    depth: int = 4
    rewrite: bool = True
    multi_freqs: tuple[float, ...] | None = None
    multi_freqs_depth: int = 3
    freq_emb: float = 0.2
    emb_scale: float = 10
    emb_smooth: bool = True
    kernel_size: int = 8
    time_stride: int = 2
    stride: int = 4
    context: int = 1
    context_enc: int = 0
    norm_starts: int = 4
    norm_groups: int = 4
    dconv_mode: int = 1
    dconv_depth: int = 2
    dconv_comp: float = 8
    dconv_init: float = 1e-3
    bottom_channels: int = 0
    t_layers: int = 5
    t_emb: str = "sin"
    t_hidden_scale: float = 4.0
    t_heads: int = 8
    t_dropout: float = 0.0
    t_max_positions: int = 10000
    t_norm_in: bool = True
    t_norm_in_group: int = 0
    t_group_norm: int = 0
    t_norm_first: bool = True
    t_norm_out: bool = True
    t_max_period: float = 10000.0
    t_weight_decay: float = 0.0
    t_lr: float | None = None
    t_layer_scale: bool = True
    t_gelu: bool = True
    t_weight_pos_embed: float = 1.0
    t_sin_random_shift: int = 0
    t_cape_mean_normalize: bool = True
    t_cape_augment: bool = True
    t_cape_glob_loc_scale: tuple[float, ...] = (5000.0, 1.0, 1.4)
    t_sparse_self_attn: bool = False
    t_sparse_cross_attn: bool = False
    t_mask_type: str = "diag"
    t_mask_random_seed: int = 42
    t_sparse_attn_window: int = 500
    t_global_window: int = 100
    t_sparsity: float = 0.95
    t_auto_sparsity: bool = False
    t_cross_first: bool = False
    rescale: float = 0.1
    samplerate: int = 44100
    segment: Segment = 10
    use_train_segment: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_type(field, getattr(self, field.name))
        for name, (accepted, why) in _REFUSED.items():
            value = getattr(self, name)
            if (value or type(accepted)()) != accepted:
                raise ValueError(f"{name} must be {accepted!r}, got {value!r}: {why}")
        self._check_values()
        levels(self)
        self._check_transformer()
        if self.use_train_segment:
            self._check_lengths()

    def _check_values(self) -> None:
        if not self.sources or len(set(self.sources)) != len(self.sources):
            raise ValueError(f"sources must be one or more distinct names, got {self.sources!r:.80}")
        for source in self.sources:  # stems are files of these names
            if not re.fullmatch(r"[^/\\\x00-\x1f\x7f]{1,64}", source) or source in (".", ".."):
                raise ValueError(f"sources must be names that a file can have, got {source!r:.80}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{field.name} must be finite, got {value}")
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("context", "context_enc", "bottom_channels", "t_layers", "t_sin_random_shift", "norm_starts"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name, limit in _LARGEST.items():
            if getattr(self, name) > limit:
                raise ValueError(f"{name} must be at most {limit}, got {getattr(self, name)!s:.20}")
        if self.nfft < 8 or self.nfft % 8:
            raise ValueError(f"nfft must be a multiple of 8, got {self.nfft}")
        if self.kernel_size - 2 * (self.kernel_size // 4) != self.stride:
            raise ValueError(
                f"kernel_size less twice its quarter must be the stride, {self.stride}, got {self.kernel_size}"
            )
        if self.segment_samples < 1:
            raise ValueError(f"segment must hold at least one sample, got {self.segment} s")
        if not 0 <= self.dconv_mode <= 3:
            raise ValueError(f"dconv_mode must be 0, 1, 2 or 3, got {self.dconv_mode}")
        narrowest = min(self.channels, self.channels_time or self.channels)
        if self.dconv_mode and self.dconv_depth and int(narrowest / self.dconv_comp) < 1:
            raise ValueError(f"dconv_comp must leave at least one of {narrowest} channels, got {self.dconv_comp}")

    def _check_transformer(self) -> None:
        if self.t_emb not in ("sin", "cape", "scaled"):
            raise ValueError(f't_emb must be "sin", "cape" or "scaled", got {self.t_emb!r}')
        exact = self.channels * self.growth ** (self.depth - 1)
        if (self.t_layers or self.bottom_channels) and exact != self.bottleneck_channels:
            raise ValueError(f"growth must give the innermost level a whole number of channels, got {exact}")
        if self.t_layers == 0:
            return
        width = self.transformer_channels
        if width % 4 or width % self.t_heads:
            raise ValueError(f"transformer width must be a multiple of 4 and of t_heads = {self.t_heads}, got {width}")
        inner = levels(self)[-1]
        if not inner.freq:
            raise ValueError(f"depth must leave a frequency axis to the transformer, got {self.depth}")
        for name, width in (("channels", inner.freq_channels[1]), ("channels_time", inner.time_channels[1])):
            if width != self.bottleneck_channels:
                raise ValueError(f"{name} must give the transformer {self.bottleneck_channels} channels, got {width}")

    def _check_lengths(self) -> None:
        """What the two branches make of a segment must fit together."""
        frames, tokens = math.ceil(self.segment_samples / (self.nfft // 4)), self.segment_samples
        for level in levels(self):
            if not level.freq:
                break
            tokens = math.ceil(tokens / self.stride)
            if level.merging and tokens != frames:
                raise ValueError(
                    f"nfft and stride must give the branches equal frames where they merge, got {frames} and {tokens}"
                )
        if self.t_layers and self.t_emb == "scaled" and self.t_max_positions < tokens:
            raise ValueError(f"t_max_positions must be at least {tokens}, got {self.t_max_positions}")

    @property
    def segment_samples(self) -> int:
        """Samples of one training segment, the length the model runs on."""
        return int(self.segment * self.samplerate)

    @property
    def bottleneck_channels(self) -> int:
        """Channels that the innermost encoder hands to the transformer or its resamplers."""
        return int(self.channels * self.growth ** (self.depth - 1))

    @property
    def transformer_channels(self) -> int:
        """Width of the cross-transformer."""
        return self.bottom_channels or self.bottleneck_channels

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HTDemucsConfig:
        """The configuration from plain values, as in Config; a segment such as "39/5" becomes a Fraction."""
        plain = dict(values)
        if isinstance(plain.get("segment"), str):
            if not re.fullmatch(r"[0-9]{1,9}/0*[1-9][0-9]{0,8}|[0-9]{1,9}", plain["segment"]):
                raise ValueError(f"segment must be a number of seconds, got {values['segment']!r:.80}")
            plain["segment"] = Fraction(plain["segment"])
        return super().from_dict(plain)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; `from_dict` takes them back."""
        values = dataclasses.asdict(self)
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        if isinstance(self.segment, Fraction):
            plain["segment"] = str(self.segment) if self.segment.denominator > 1 else f"{self.segment}/1"
        return plain


def _check_type(field: dataclasses.Field, value: Any) -> None:
    """Raises unless `value` is of the kind that the field's annotation names (booleans are also 0 and 1)."""
    kinds = {
        "bool": (bool, int),
        "int": (int,),
        "float": (int, float),
        "Segment": (int, float, Fraction),
        "str": (str,),
        "tuple": (tuple,),
        "None": (type(None),),
    }
    annotation = str(field.type).replace("tuple[str, ...]", "tuple").replace("tuple[float, ...]", "tuple")
    accepted = tuple(kind for part in annotation.split(" | ") for kind in kinds[part])
    fits = isinstance(value, accepted)
    if fits and field.name == "sources":
        fits = all(isinstance(name, str) for name in value)
    if fits and annotation == "bool":
        fits = value in (0, 1)
    if not fits:
        raise ValueError(f"{field.name} must be of type {annotation}, got {value!r:.80}")


@dataclass(frozen=True)
class Level:
    """One level of the U-Net: the spectrogram branch's encoder and decoder and, above the merge, the waveform's.

    `freq` levels convolve over frequency; below the merge the one remaining row is convolved over time. At the
    `merging` level the waveform encoder is a bare convolution, injected into the spectrogram branch.
    """

    index: int
    freq: bool
    merging: bool
    kernel_size: int
    stride: int
    pad: int
    norm: bool
    freq_channels: tuple[int, int]  # into and out of the encoder
    time_channels: tuple[int, int]
    freq_out: int  # out of the decoder
    time_out: int


def levels(config: HTDemucsConfig) -> tuple[Level, ...]:
    """The levels from the outermost to the innermost. ValueError where a level does not divide its frequencies."""
    plan: list[Level] = []
    freqs = config.nfft // 2
    time_in = config.audio_channels
    freq_in = 2 * time_in
    time_out: float = config.channels_time or config.channels
    freq_out: float = config.channels
    for index in range(config.depth):
        freq = freqs > 1
        merging = freq and freqs <= config.kernel_size
        if merging:
            kernel, stride, pad = freqs, config.stride, 0
            freq_out = time_out = max(freq_out, time_out)
        elif freq:
            kernel, stride, pad = config.kernel_size, config.stride, config.kernel_size // 4
            if freqs % stride:
                raise ValueError(f"stride must divide the {freqs} frequencies of level {index}, got {stride}")
        else:
            kernel, stride, pad = 2 * config.time_stride, config.time_stride, 2 * config.time_stride // 4
        back = config.audio_channels * len(config.sources)
        plan.append(
            Level(
                index=index,
                freq=freq,
                merging=merging,
                kernel_size=kernel,
                stride=stride,
                pad=pad,
                norm=index >= config.norm_starts,
                freq_channels=(freq_in, int(freq_out)),
                time_channels=(time_in, int(time_out)),
                freq_out=2 * back if index == 0 else freq_in,
                time_out=back if index == 0 else time_in,
            )
        )
        freq_in, time_in = int(freq_out), int(time_out)
        freq_out, time_out = int(config.growth * freq_in), int(config.growth * time_in)
        if freq:
            freqs = 1 if freqs <= config.kernel_size else freqs // config.stride
    return tuple(plan)
