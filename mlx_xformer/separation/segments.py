"""Applies a model to a track of any length by overlapping segments, and yields finished samples in order.

The arithmetic and the order of random draws are those of demucs 4.1.0 (demucs/apply.py): equal seeds give equal stems.
A bag is several models whose outputs are averaged, with a weight for each model and source, as demucs calls it.
Axes: S sources, C channels, N samples of the track, n of a block.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..models.htdemucs import Bag, HTDemucs
from .options import Options, transition_weight
from .track import Track

_MAX_SHIFT = 0.5  # seconds
_reading = threading.Lock()  # arrays of a file may be evaluated in any thread, but in one at a time


def apply_model(model: HTDemucs | Bag, mix: mx.array, options: Options | None = None) -> mx.array:
    """Applies a model to a whole track that is normalized already. Source: demucs/apply.py, apply_model.

    Args:
        model: a model, or a bag of several.
        mix: (C, N) at the model's sample rate.
        options: how the model is applied.

    Returns:
        The wanted stems, (S, C, N).
    """
    track = Track([np.asarray(mix)], *mix.shape)
    return mx.concatenate(list(stream_stems(model, track, options or Options())), axis=-1)


def stream_stems(
    model: HTDemucs | Bag,
    track: Track,
    options: Options,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[mx.array]:
    """Applies a model to a track and yields the wanted stems of the normalized track, block by block.

    All passes over the track advance side by side, so that only a few segments are held in memory. When a block is
    yielded, the track's samples of that block can still be read.

    Args:
        model: a model, or a bag of several.
        track: what to separate.
        options: how the model is applied.
        report: called as report(done, total) with the number of segments after each batch.

    Yields:
        Blocks (S, C, n), in order.
    """
    models, weights = get_members(model)
    for member in models:
        options.check(member.config)
    wanted = options.wanted(model.config.sources)
    passes = [p for p in _draw_passes(models, track.samples, options) if any(weights[p.member][s] for s in wanted)]
    with _reading:  # weights that a bag has not read yet
        mx.eval([models[member].parameters() for member in {p.member for p in passes}])
    streams = [_Stream(_run_pass(models[p.member], track, p, options, wanted)) for p in passes]
    total, done, yielded = sum(len(p.offsets) for p in passes), 0, 0
    # The last segment reads up to a whole segment of samples before the end of the track.
    reach = max(options.samples(models[p.member].config) for p in passes)
    while yielded < track.samples:
        behind = min(streams, key=lambda stream: stream.finished)
        if behind.finished == yielded:
            done += behind.advance()
            report(done, total)
            continue
        count, yielded = behind.finished - yielded, behind.finished
        estimates = [(p.member, stream.take(count)) for p, stream in zip(passes, streams, strict=True)]
        yield _average(estimates, weights, wanted)
        track.discard(yielded - reach)


def get_members(model: HTDemucs | Bag) -> tuple[list[HTDemucs], tuple[tuple[float, ...], ...]]:
    """Returns the models of a bag, or the single model, and each one's weights for all sources."""
    if isinstance(model, HTDemucs):
        return [model], ((1.0,) * len(model.config.sources),)
    sources = model.models[0].config.sources
    return model.models, model.config.weights or ((1.0,) * len(sources),) * len(model.models)


class _Stream:
    """The output of a pass, computed batch by batch."""

    def __init__(self, pieces: Iterator[tuple[mx.array, int]]) -> None:
        self._pieces, self._held = pieces, list[mx.array]()
        self.finished = 0  # samples of the track

    def advance(self) -> int:
        """Computes the next batch; returns its number of segments."""
        piece, count = next(self._pieces)
        self._held.append(piece)
        self.finished += piece.shape[-1]
        return count

    def take(self, count: int) -> mx.array:
        """Removes and returns the next `count` finished samples, (S, C, count)."""
        held = self._held[0] if len(self._held) == 1 else mx.concatenate(self._held, axis=-1)
        self._held = [held[..., count:]] if count < held.shape[-1] else []
        return held[..., :count]


@dataclass(frozen=True)
class _Pass:
    """One pass of one model over the track.

    member: the model's index. start, length: the samples that are read; a shift makes `start` negative. skip: samples
    at the beginning of the result that lie before the track. offsets: of the segments, from `start`. position_shifts:
    the random shift of each segment's positions in the waveform's transformer.
    """

    member: int
    start: int
    length: int
    skip: int
    offsets: range
    position_shifts: tuple[int, ...]


def _draw_passes(models: list[HTDemucs], length: int, options: Options) -> list[_Pass]:
    """Every pass with its random draws.

    They are in demucs' order: for each model and shift the offset of the track, then for each segment the shift of the
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
            shifts = tuple(rng.randrange(config.t_sin_random_shift + 1) if draws else 0 for _ in offsets)
            passes.append(_Pass(member, -skip, size, skip, offsets, shifts))
    return passes


def _run_pass(
    model: HTDemucs, track: Track, p: _Pass, options: Options, wanted: list[int]
) -> Iterator[tuple[mx.array, int]]:
    """Yields the finished samples (S, C, n) of a pass, batch by batch, with the number of segments in the batch.

    While a batch is handed out, the next one is computed.
    """
    config = model.config
    segment, stride, batch = options.samples(config), options.stride(config), options.batch(config)
    chosen = mx.array(wanted)
    sums = _OverlapAdd((len(wanted), config.audio_channels, segment), stride, options.transition_power)
    same_size = config.use_train_segment or options.segment is not None
    skip, before = p.skip, None
    for first in range(0, len(p.offsets), batch):
        offsets = p.offsets[first : first + batch]
        lengths = [min(segment, p.length - offset) for offset in offsets]
        inputs = [
            read_segment(track, p.start + offset, n, segment if same_size else n)
            for offset, n in zip(offsets, lengths, strict=True)
        ]
        shifts = p.position_shifts[first : first + batch]
        outputs = model(mx.stack(inputs), position_shift=shifts if any(shifts) else 0, mode=options.mode)
        finished = []
        for offset, n, output in zip(offsets, lengths, outputs, strict=True):
            left = (output.shape[-1] - n) // 2
            finished.append(sums.add(output[chosen, :, left : left + n], last=offset == p.offsets[-1]))
        piece = mx.concatenate(finished, axis=-1)
        piece, skip = piece[..., skip:], max(0, skip - piece.shape[-1])
        mx.async_eval(piece, sums.pending)
        if before is not None:
            yield before
        before = piece, len(offsets)
    assert before is not None  # a track has at least one sample
    yield before


class _OverlapAdd:
    """The weighted mean of overlapping segments, each `stride` samples after the one before.

    pending: (S, C, N of a segment), sums from the start of the next segment on, which later segments still change.
    """

    def __init__(self, shape: tuple[int, int, int], stride: int, transition_power: float) -> None:
        self._segment, self._stride = shape[-1], stride
        self._weight = transition_weight(self._segment, transition_power)
        self._gain = mx.array(self._weight)
        self.pending = mx.zeros(shape)
        self._weights = np.zeros(self._segment, np.float32)  # the sum of the weights in `pending`

    def add(self, stems: mx.array, *, last: bool) -> mx.array:
        """Adds the next segment (S, C, n); returns the samples that no later segment changes, or all if `last`."""
        n, stride = stems.shape[-1], self._stride
        pending = self.pending + mx.pad(stems * self._gain[:n], [(0, 0), (0, 0), (0, self._segment - n)])
        self._weights[:n] += self._weight[:n]
        ready = n if last else min(stride, n)
        finished = pending[..., :ready] * mx.array(1 / self._weights[:ready])
        self.pending = mx.pad(pending[..., stride:], [(0, 0), (0, 0), (0, stride)])
        self._weights = np.pad(self._weights[stride:], (0, stride))
        return finished


def read_segment(track: Track, offset: int, length: int, target: int) -> mx.array:
    """Returns (C, target) normalized samples with the track's [offset, offset + length) in the middle.

    Beside them are the track's neighbouring samples, or zeros beyond its ends.
    """
    start = offset - (target - length) // 2
    return track.read_normalized(start, start + target)


def _average(
    estimates: list[tuple[int, mx.array]], weights: tuple[tuple[float, ...], ...], wanted: list[int]
) -> mx.array:
    """The weighted average of the models' estimates (S, C, n), after the average over the passes of each model."""
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
