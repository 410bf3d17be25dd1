"""separate(): a recording of any length into its stems, by overlapping segments.

The arithmetic and the order of random draws are those of demucs 4.1.0 (demucs/api.py, demucs/apply.py), so equal
seeds give equal stems. Axes: S sources, C channels, N samples.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from . import kernels
from .audio import convert_channels, resample
from .models.htdemucs import Bag, BagConfig, HTDemucs, HTDemucsConfig, InferenceMode

Progress = Callable[[int, int], None]
_MAX_SHIFT = 0.5  # seconds
_MOST_CHANNELS = 64  # more are samples in the wrong axis


@dataclass(frozen=True)
class Options:
    """How a model is applied to a track; `separate` explains the fields. ValueError names one out of range."""

    shifts: int = 1
    overlap: float = 0.25
    segment: float | None = None
    transition_power: float = 1.0
    seed: int = 0
    batch_size: int = 1
    stems: Sequence[str] | None = None
    mode: InferenceMode = InferenceMode.FULL

    def __post_init__(self) -> None:
        if self.shifts < 0:
            raise ValueError(f"shifts must be at least 0, got {self.shifts}")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap must be at least 0 and below 1, got {self.overlap}")
        if not self.transition_power >= 1:
            raise ValueError(f"transition_power must be at least 1, got {self.transition_power}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if isinstance(self.stems, str):
            raise ValueError(f"stems must be a sequence of names, got {self.stems!r}")
        object.__setattr__(self, "mode", InferenceMode(self.mode))

    def check(self, config: HTDemucsConfig) -> None:
        """ValueError where a model cannot be applied like this."""
        longest = float(config.segment)
        if self.segment is not None and not 0 < self.segment <= longest:
            given = float(self.segment)
            raise ValueError(f"segment must be above 0 and at most the model's {longest:g} s, got {given:g}")
        if self.samples(config) < 1:
            raise ValueError(f"segment must hold a sample or more, got {float(self.segment or longest):g} s")
        if self.stride(config) < 1:
            raise ValueError(f"overlap must leave a stride of a sample or more, got {self.overlap}")

    def samples(self, config: HTDemucsConfig) -> int:
        """Samples of one segment."""
        return int(config.samplerate * (config.segment if self.segment is None else self.segment))

    def stride(self, config: HTDemucsConfig) -> int:
        """Samples from one segment to the next."""
        return int((1 - self.overlap) * self.samples(config))

    def wanted(self, sources: tuple[str, ...]) -> list[int]:
        """The indices of the wanted stems, in the model's order."""
        unknown = [str(stem) for stem in self.stems or () if stem not in sources]
        if unknown or (self.stems is not None and not self.stems):
            raise ValueError(f"stems must be among {', '.join(sources)}, got {', '.join(unknown) or 'none'}")
        return [i for i, name in enumerate(sources) if self.stems is None or name in self.stems]


def separate(
    model: HTDemucs | Bag,
    audio: np.ndarray | mx.array,
    sample_rate: int,
    *,
    shifts: int = 1,
    overlap: float = 0.25,
    segment: float | None = None,
    transition_power: float = 1.0,
    seed: int = 0,
    batch_size: int = 1,
    stems: Sequence[str] | None = None,
    mode: InferenceMode = InferenceMode.FULL,
    progress: Progress | None = None,
) -> dict[str, mx.array]:
    """Separates audio (C, N), or mono (N,), into {stem: (channels, samples)} at the model's sample rate.

    shifts: passes over the track, each moved by a random part of half a second, averaged; 0 for one unmoved pass.
    overlap: part of a segment shared with the next, in [0, 1). segment: seconds, at most the model's own.
    transition_power: sharpness of the cross-fade between segments, 1 for a linear one. stems: the wanted ones; a bag
    runs only the members that they need. seed: of the random draws. batch_size: segments run at once. mode: see
    InferenceMode. progress(done, total) counts segments. The track is brought to mean 0 and deviation 1, and back.
    ValueError names the argument that is out of range, and refuses NaN and infinite samples.
    """
    stems = stems if stems is None or isinstance(stems, str) else tuple(stems)
    options = Options(shifts, overlap, segment, transition_power, seed, batch_size, stems, mode)
    config = model.config
    wanted = options.wanted(config.sources)
    mix = _prepare(audio, sample_rate, config)
    center, scale = _track_statistics(mix)
    out = apply_model(model, (mix - center) / scale, options, progress) * scale + center
    separated = {config.sources[s]: out[i] for i, s in enumerate(wanted)}
    mx.eval(separated)  # so that another thread may read them
    return separated


def apply_model(
    model: HTDemucs | Bag, mix: mx.array, options: Options | None = None, progress: Progress | None = None
) -> mx.array:
    """The model over a whole track as it stands: mix (C, N) at its sample rate -> (S, C, N), the wanted stems.

    What `separate` does between levelling the track and undoing it. Source: demucs/apply.py, apply_model.
    """
    options = options or Options()
    models, weights = _members(model)
    for member in models:
        options.check(member.config)
    wanted = options.wanted(model.config.sources)
    needed = [any(row[s] for s in wanted) for row in weights]
    passes = _draw_passes(models, mix.shape[-1], options)
    total = sum(len(p.offsets) for p in passes if needed[p.member])
    done = 0
    estimates: list[mx.array | None] = [None] * len(models)
    for p in passes:
        if not needed[p.member]:
            continue
        pieces = []
        for piece, count in _run_pass(models[p.member], mix, p, options, wanted):
            pieces.append(piece)
            done += count
            if progress is not None:
                progress(done, total)
        whole = mx.concatenate(pieces, axis=-1)[..., p.skip :]
        previous = estimates[p.member]
        estimates[p.member] = whole if previous is None else previous + whole
        mx.eval(estimates[p.member])
    return _weigh(estimates, weights, wanted, max(options.shifts, 1))


def _members(model: HTDemucs | Bag) -> tuple[list[HTDemucs], tuple[tuple[float, ...], ...]]:
    if isinstance(model, HTDemucs):
        return [model], ((1.0,) * len(model.config.sources),)
    sources = model.models[0].config.sources
    return model.models, model.config.weights or ((1.0,) * len(sources),) * len(model.models)


def _prepare(audio: np.ndarray | mx.array, sample_rate: int, config: HTDemucsConfig | BagConfig) -> mx.array:
    """(C, N) float32 with the model's channels and sample rate."""
    samples = np.asarray(audio.astype(mx.float32) if isinstance(audio, mx.array) else audio)
    if not np.issubdtype(samples.dtype, np.floating):
        raise ValueError(f"audio must be floats with full scale at 1, got {samples.dtype}")
    samples = samples.astype(np.float32)
    if samples.ndim == 1:
        samples = samples[None]
    if samples.ndim != 2 or samples.size == 0 or samples.shape[0] > _MOST_CHANNELS:
        raise ValueError(
            f"audio must be (channels, samples) with at least one sample and at most {_MOST_CHANNELS} channels, "
            f"got {samples.shape}"
        )
    if not np.isfinite(samples).all():
        raise ValueError("audio must be finite, got NaN or infinite samples")
    samples = resample(convert_channels(samples, config.audio_channels), sample_rate, config.samplerate)
    if not samples.shape[-1]:
        raise ValueError(f"audio must last at least one sample at {config.samplerate} Hz, got less")
    return mx.array(samples)


def _track_statistics(mix: mx.array) -> tuple[mx.array, mx.array]:
    """Mean and unbiased deviation (plus 1e-8) of the track's mono mix: one offset and one gain for the track."""
    mono = mix.mean(axis=0)
    center, var = kernels.mean_var(mono, (0,))
    unbiased = var * (mono.size / max(mono.size - 1, 1))
    return center, mx.sqrt(unbiased) + 1e-8


@dataclass(frozen=True)
class _Pass:
    """One pass of one member over the track: `length` samples from `start` of the (padded) mix, cut into segments
    at `offsets`; the first `skip` samples of the result are not the track's."""

    member: int
    padding: int
    start: int
    length: int
    skip: int
    offsets: range
    position_shifts: tuple[int, ...]


def _draw_passes(models: list[HTDemucs], length: int, options: Options) -> list[_Pass]:
    """Every pass with its random draws, in the original's order: per member and shift first the offset of the
    track, then one draw per segment for the shift of the waveform's positions."""
    rng = random.Random(options.seed)
    passes = []
    for member, model in enumerate(models):
        config = model.config
        stride = options.stride(config)
        reach = int(_MAX_SHIFT * config.samplerate)
        draws = config.t_layers > 0 and config.t_emb == "sin"
        for _ in range(max(options.shifts, 1)):
            if options.shifts:
                start = rng.randint(0, reach)
                padding, size, skip = reach, length + reach - start, reach - start
            else:
                padding, start, size, skip = 0, 0, length, 0
            offsets = range(0, size, stride)
            moved = tuple(rng.randrange(config.t_sin_random_shift + 1) if draws else 0 for _ in offsets)
            passes.append(_Pass(member, padding, start, size, skip, offsets, moved))
    return passes


def _run_pass(
    model: HTDemucs, mix: mx.array, p: _Pass, options: Options, wanted: list[int]
) -> Iterator[tuple[mx.array, int]]:
    """Yields the finished stretches (S, C, n) of one pass, in order, with the segments that each took."""
    config = model.config
    segment, stride = options.samples(config), options.stride(config)
    mix = mx.pad(mix, [(0, 0), (p.padding, p.padding)])
    weight = transition_weight(segment, options.transition_power)
    total = np.zeros(p.length, np.float32)
    for offset in p.offsets:
        total[offset : offset + segment] += weight[: p.length - offset]
    if total.min() < 1e-30:
        raise ValueError(f"transition_power must leave every sample some weight, got {options.transition_power:g}")
    gain, inverse = mx.array(weight), mx.array(1 / total)
    same_size = config.use_train_segment or options.segment is not None
    batch_size = options.batch_size if same_size else 1
    pending = mx.zeros((len(wanted), config.audio_channels, segment))  # sums that later segments still reach
    for first in range(0, len(p.offsets), batch_size):
        offsets = p.offsets[first : first + batch_size]
        lengths = [min(segment, p.length - offset) for offset in offsets]
        inputs = [
            padded_segment(mix, p.start + offset, n, segment if same_size else n)
            for offset, n in zip(offsets, lengths, strict=True)
        ]
        moved = p.position_shifts[first : first + batch_size]
        outputs = model(mx.stack(inputs), position_shift=moved if any(moved) else 0, mode=options.mode)
        stretches = []
        for offset, n, output in zip(offsets, lengths, outputs, strict=True):
            left = (output.shape[-1] - n) // 2
            stem = output[mx.array(wanted), :, left : left + n] * gain[:n]
            pending = pending + mx.pad(stem, [(0, 0), (0, 0), (0, segment - n)])
            ready = n if offset == p.offsets[-1] else min(stride, n)
            stretches.append(pending[..., :ready] * inverse[offset : offset + ready])
            pending = mx.pad(pending[..., stride:], [(0, 0), (0, 0), (0, stride)])
        piece = mx.concatenate(stretches, axis=-1)
        mx.eval(piece, pending)
        yield piece, len(offsets)


def transition_weight(length: int, power: float) -> np.ndarray:
    """(length,) weights of a segment's samples: a triangle with its top at 1, to the given power."""
    half = length // 2
    triangle = np.concatenate([np.arange(1, half + 1), np.arange(length - half, 0, -1)]).astype(np.float32)
    return (triangle / triangle.max()) ** np.float32(power)


def padded_segment(mix: mx.array, offset: int, length: int, target: int) -> mx.array:
    """(C, target) samples around mix[:, offset : offset + length]: the real audio beside it, zeros past the ends."""
    start = offset - (target - length) // 2
    end = start + target
    left, right = max(0, -start), max(0, end - mix.shape[-1])
    return mx.pad(mix[:, max(0, start) : end], [(0, 0), (left, right)])


def _weigh(
    estimates: list[mx.array | None], weights: tuple[tuple[float, ...], ...], wanted: list[int], shifts: int
) -> mx.array:
    """The members' estimates (S, C, N), weighed per source."""
    total = np.array([sum(row[s] for row in weights) for s in wanted], np.float32)[:, None, None]
    out = None
    for estimate, row in zip(estimates, weights, strict=True):
        if estimate is None:
            continue
        part = estimate / shifts * mx.array(np.array([row[s] for s in wanted], np.float32)[:, None, None])
        out = part if out is None else out + part
    assert out is not None  # every wanted source has a weight that is not 0
    return out / mx.array(total)
