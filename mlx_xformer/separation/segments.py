"""A model over a track of any length, by overlapping segments, as a stream: finished stretches leave in order.

The arithmetic and the order of random draws are those of demucs 4.1.0 (demucs/apply.py), so equal seeds give equal
stems. Axes: S sources, C channels, N samples of the track, n of a stretch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import numpy as np

from ..backend import device
from ..models.htdemucs import Bag, HTDemucs, HTDemucsConfig, InferenceMode
from .track import Track

OtherMethod = Literal["add", "minus", "none"]
_MAX_SHIFT = 0.5  # seconds
_FOOTPRINT = 72  # bytes that a segment takes per sample and channel of the first layer, at the peak


@dataclass(frozen=True)
class Options:
    """How a model is applied to a track; `separate` explains the fields. ValueError names one out of range."""

    shifts: int = 1
    overlap: float = 0.25
    segment: float | None = None
    transition_power: float = 1.0
    seed: int = 0
    batch_size: int | None = None
    stems: Sequence[str] | None = None
    two_stems: str | None = None
    other_method: OtherMethod = "add"
    mode: InferenceMode = InferenceMode.FULL

    def __post_init__(self) -> None:
        if self.shifts < 0:
            raise ValueError(f"shifts must be at least 0, got {self.shifts}")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap must be at least 0 and below 1, got {self.overlap}")
        if not self.transition_power >= 1:
            raise ValueError(f"transition_power must be at least 1, got {self.transition_power}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if isinstance(self.stems, str):
            raise ValueError(f"stems must be a sequence of names, got {self.stems!r}")
        if self.stems is not None:
            object.__setattr__(self, "stems", tuple(self.stems))
        if self.stems is not None and self.two_stems is not None:
            raise ValueError(f"stems and two_stems exclude each other, got {self.stems} and {self.two_stems!r}")
        if self.other_method not in ("add", "minus", "none"):
            raise ValueError(f'other_method must be "add", "minus" or "none", got {self.other_method!r}')
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
        if transition_weight(self.samples(config), self.transition_power).min() < 1e-30:
            raise ValueError(f"transition_power must leave every sample some weight, got {self.transition_power:g}")
        self.wanted(config.sources)

    def samples(self, config: HTDemucsConfig) -> int:
        """Samples of one segment."""
        return int(config.samplerate * (config.segment if self.segment is None else self.segment))

    def stride(self, config: HTDemucsConfig) -> int:
        """Samples from one segment to the next."""
        return int((1 - self.overlap) * self.samples(config))

    def wanted(self, sources: tuple[str, ...]) -> list[int]:
        """The indices of the sources that are needed, in the model's order."""
        if self.two_stems is not None:
            if self.two_stems not in sources:
                raise ValueError(f"two_stems must be one of {', '.join(sources)}, got {self.two_stems}")
            return [i for i, name in enumerate(sources) if self.other_method == "add" or name == self.two_stems]
        unknown = [str(stem) for stem in self.stems or () if stem not in sources]
        if unknown or (self.stems is not None and not self.stems):
            raise ValueError(f"stems must be among {', '.join(sources)}, got {', '.join(unknown) or 'none'}")
        return [i for i, name in enumerate(sources) if self.stems is None or name in self.stems]

    def names(self, sources: tuple[str, ...]) -> list[str]:
        """The stems that come out, as demucs names them."""
        if self.two_stems is None:
            return [sources[i] for i in self.wanted(sources)]
        other = {"add": [f"no_{self.two_stems}"], "minus": [f"minus_{self.two_stems}"], "none": []}
        return [self.two_stems, *other[self.other_method]]

    def batch(self, config: HTDemucsConfig) -> int:
        """Segments to run at once: as told, or what the device gains from and its memory holds."""
        if not config.use_train_segment and self.segment is None:
            return 1  # the segments differ in length
        return self.batch_size or device.batch_size(_FOOTPRINT * self.samples(config) * config.channels)


def apply_model(model: HTDemucs | Bag, mix: mx.array, options: Options | None = None) -> mx.array:
    """The model over a whole track as it stands: mix (C, N) at its sample rate -> (S, C, N), the wanted stems.

    What `separate` does between levelling the track and undoing it. Source: demucs/apply.py, apply_model.
    """
    track = Track([np.asarray(mix)], *mix.shape)
    return mx.concatenate(list(stretches(model, track, options or Options())), axis=-1)


def stretches(
    model: HTDemucs | Bag,
    track: Track,
    options: Options,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[mx.array]:
    """Yields the wanted stems of the levelled track, (S, C, n) in turn. step(done, total) counts segments.

    All passes over the track go on side by side, so that no more than a few segments are held. The track's samples of a
    stretch may still be read when it is yielded.
    """
    models, weights = members(model)
    for member in models:
        options.check(member.config)
    wanted = options.wanted(model.config.sources)
    passes = [p for p in _draw_passes(models, track.samples, options) if any(weights[p.member][s] for s in wanted)]
    streams = [_Stream(_run_pass(models[p.member], track, p, options, wanted)) for p in passes]
    total, done, yielded = sum(len(p.offsets) for p in passes), 0, 0
    reach = max(options.samples(models[p.member].config) for p in passes)  # the last segment is filled from before it
    while yielded < track.samples:
        behind = min(streams, key=lambda stream: stream.reached)
        if behind.reached == yielded:
            done += behind.advance()
            step(done, total)
            continue
        count, yielded = behind.reached - yielded, behind.reached
        yield _weigh(
            [(p.member, stream.take(count)) for p, stream in zip(passes, streams, strict=True)], weights, wanted
        )
        track.forget(yielded - reach)


def members(model: HTDemucs | Bag) -> tuple[list[HTDemucs], tuple[tuple[float, ...], ...]]:
    """The models of a bag, or the one, and the weight of each for every source."""
    if isinstance(model, HTDemucs):
        return [model], ((1.0,) * len(model.config.sources),)
    sources = model.models[0].config.sources
    return model.models, model.config.weights or ((1.0,) * len(sources),) * len(model.models)


class _Stream:
    """A pass under way, and its finished samples that nobody has taken yet."""

    def __init__(self, pieces: Iterator[tuple[mx.array, int]]):
        self._pieces, self._held = pieces, list[mx.array]()
        self.reached = 0  # samples of the track that are finished

    def advance(self) -> int:
        """Runs on by a batch; returns its segments."""
        piece, count = next(self._pieces)
        self._held.append(piece)
        self.reached += piece.shape[-1]
        return count

    def take(self, count: int) -> mx.array:
        """The next `count` samples."""
        held = self._held[0] if len(self._held) == 1 else mx.concatenate(self._held, axis=-1)
        self._held = [held[..., count:]] if count < held.shape[-1] else []
        return held[..., :count]


@dataclass(frozen=True)
class _Pass:
    """One pass of one member of a bag over the track.

    `length` samples from `start` (which may lie before the track) are cut into segments at `offsets`; the first `skip`
    samples of the result lie before the track.
    """

    member: int
    start: int
    length: int
    skip: int
    offsets: range
    position_shifts: tuple[int, ...]


def _draw_passes(models: list[HTDemucs], length: int, options: Options) -> list[_Pass]:
    """Every pass with its random draws, in the order of the original.

    For each member and shift: first the offset of the track, then for each segment the shift of the waveform's
    positions.
    """
    rng = random.Random(options.seed)
    passes = []
    for member, model in enumerate(models):
        config = model.config
        stride = options.stride(config)
        reach = int(_MAX_SHIFT * config.samplerate)
        draws = config.t_layers > 0 and config.t_emb == "sin"
        for _ in range(max(options.shifts, 1)):
            skip = reach - rng.randint(0, reach) if options.shifts else 0
            size = length + skip
            offsets = range(0, size, stride)
            moved = tuple(rng.randrange(config.t_sin_random_shift + 1) if draws else 0 for _ in offsets)
            passes.append(_Pass(member, -skip, size, skip, offsets, moved))
    return passes


def _run_pass(
    model: HTDemucs, track: Track, p: _Pass, options: Options, wanted: list[int]
) -> Iterator[tuple[mx.array, int]]:
    """Yields the finished stretches (S, C, n) of one pass in order, with the number of segments that each took.

    A batch is being computed while the one before it is handed out.
    """
    config = model.config
    segment, stride, batch = options.samples(config), options.stride(config), options.batch(config)
    weight = transition_weight(segment, options.transition_power)
    gain, chosen = mx.array(weight), mx.array(wanted)
    same_size = config.use_train_segment or options.segment is not None
    pending = mx.zeros((len(wanted), config.audio_channels, segment))  # sums that later segments still reach
    weighed = np.zeros(segment, np.float32)  # and the weights in them
    skip, before = p.skip, None
    for first in range(0, len(p.offsets), batch):
        offsets = p.offsets[first : first + batch]
        lengths = [min(segment, p.length - offset) for offset in offsets]
        inputs = [
            padded_segment(track, p.start + offset, n, segment if same_size else n)
            for offset, n in zip(offsets, lengths, strict=True)
        ]
        moved = p.position_shifts[first : first + batch]
        outputs = model(mx.stack(inputs), position_shift=moved if any(moved) else 0, mode=options.mode)
        finished = []
        for offset, n, output in zip(offsets, lengths, outputs, strict=True):
            left = (output.shape[-1] - n) // 2
            stem = output[chosen, :, left : left + n] * gain[:n]
            pending = pending + mx.pad(stem, [(0, 0), (0, 0), (0, segment - n)])
            weighed[:n] += weight[:n]
            ready = n if offset == p.offsets[-1] else min(stride, n)
            finished.append(pending[..., :ready] * mx.array(1 / weighed[:ready]))
            pending = mx.pad(pending[..., stride:], [(0, 0), (0, 0), (0, stride)])
            weighed = np.pad(weighed[stride:], (0, stride))
        piece = mx.concatenate(finished, axis=-1)
        piece, skip = piece[..., skip:], max(0, skip - piece.shape[-1])
        mx.async_eval(piece, pending)
        if before is not None:
            yield before
        before = piece, len(offsets)
    assert before is not None  # a track has a sample or more
    yield before


def transition_weight(length: int, power: float) -> np.ndarray:
    """(length,) weights of a segment's samples: a triangle with its top at 1, to the given power."""
    half = length // 2
    triangle = np.concatenate([np.arange(1, half + 1), np.arange(length - half, 0, -1)]).astype(np.float32)
    return (triangle / triangle.max()) ** np.float32(power)


def padded_segment(track: Track, offset: int, length: int, target: int) -> mx.array:
    """(C, target) samples around the track's [offset, offset + length): real audio beside them, zeros past the ends."""
    start = offset - (target - length) // 2
    return track.levelled(start, start + target)


def _weigh(
    estimates: list[tuple[int, mx.array]], weights: tuple[tuple[float, ...], ...], wanted: list[int]
) -> mx.array:
    """The passes' estimates (S, C, n), each with its member's number: averaged per member, then weighed per source."""
    parts: dict[int, list[mx.array]] = {}
    for member, estimate in estimates:
        parts.setdefault(member, []).append(estimate)
    out = None
    for member, passes in parts.items():
        share = mx.array(np.array([weights[member][s] for s in wanted], np.float32)[:, None, None])
        part = sum(passes[1:], passes[0]) / len(passes) * share
        out = part if out is None else out + part
    assert out is not None  # every wanted source has a weight that is not 0
    return out / mx.array(np.array([sum(row[s] for row in weights) for s in wanted], np.float32)[:, None, None])
