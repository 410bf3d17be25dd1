"""Whole tracks by overlapping segments. Axes: S sources, C channels, N samples.

Source: demucs/apply.py, demucs/api.py.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from .backend import mean_var

Forward = Callable[..., np.ndarray]  # forward(chunk (C, N), position_shift=int) -> (S, C, N)


class Chunk(NamedTuple):
    """A stretch of a longer recording that still knows what lies around it."""

    audio: np.ndarray  # (C, all samples)
    offset: int
    length: int

    def part(self, offset: int, length: int) -> "Chunk":
        """`length` samples from `offset`, or as many as there are."""
        return Chunk(self.audio, self.offset + offset, min(length, self.length - offset))

    def padded(self, length: int) -> np.ndarray:
        """(C, length): with the audio on both sides, half the missing samples (rounded down) from the left.

        Zeros stand for what lies outside the recording.
        """
        missing = length - self.length
        if missing < 0:
            raise ValueError(f"a chunk must be at most {length} samples, got {self.length}")
        start = self.offset - missing // 2
        stop = start + length
        total = self.audio.shape[-1]
        inside = self.audio[:, max(0, start) : min(total, stop)]
        return np.pad(inside, ((0, 0), (max(0, -start), max(0, stop - total))))


def normalise(wav: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Subtract the mean and divide by the standard deviation (unbiased, plus 1e-8) of the mono mix.

    wav (C, N). Returns the result, the mean and the divisor.
    """
    mono = wav.mean(axis=0)
    n = mono.size
    if n < 2:
        raise ValueError(f"samples must be at least 2, got {n}")
    mean, var = mean_var(mono, (0,))
    centre, divisor = float(mean[0]), float(np.sqrt(var[0] * (n / (n - 1))) + 1e-8)
    return (wav - centre) / divisor, centre, divisor


def denormalise(stems: np.ndarray, mean: float, divisor: float) -> np.ndarray:
    """Undo `normalise`."""
    return stems * divisor + mean


def triangle(length: int, power: float, dtype: np.dtype) -> np.ndarray:
    """The weight of each sample of a segment, (length,): rising to 1 in the middle, to the given power."""
    up = np.arange(1, length // 2 + 1)
    down = np.arange(length - length // 2, 0, -1)
    ramp = np.concatenate([up, down]).astype(dtype)
    return (ramp / ramp.max()) ** power


def apply(
    forward: Forward,
    mix: np.ndarray,
    *,
    sources: int,
    samplerate: int,
    training_samples: int,
    segment: float | Fraction | None = None,
    shifts: int = 1,
    overlap: float = 0.25,
    transition_power: float = 1.0,
    rng: random.Random,
    random_shift: int | None = 0,
    pad_chunks: bool = True,
) -> np.ndarray:
    """Separate a track: mix (C, N) -> (S, C, N).

    `segment` (seconds) shortens the chunks, else they are `training_samples` long. `random_shift` is the
    model's t_sin_random_shift, or None if it draws no position shift (t_emb other than "sin", or t_layers 0).
    `pad_chunks` is its use_train_segment: False leaves a short last chunk short, unless `segment` is given.
    Draws from `rng`: per shift randint(0, samplerate / 2), then per chunk randrange(random_shift + 1).
    """
    length = mix.shape[-1]
    if length < 1:
        raise ValueError(f"samples must be at least 1, got {length}")
    if transition_power < 1:
        raise ValueError(f"transition_power must be at least 1, got {transition_power}")
    segment_length = training_samples if segment is None else int(samplerate * segment)
    stride = int((1 - overlap) * segment_length)
    if stride < 1:
        raise ValueError(f"overlap must leave a step of at least one sample, got {overlap}")
    weight = triangle(segment_length, transition_power, mix.dtype)

    def run(chunk: Chunk) -> np.ndarray:
        target = segment_length if pad_chunks or segment is not None else chunk.length
        shift = 0 if random_shift is None else rng.randrange(random_shift + 1)
        out = forward(chunk.padded(target), position_shift=shift)  # (S, C, target)
        first = (target - chunk.length) // 2
        return out[..., first : first + chunk.length]

    def split(track: Chunk) -> np.ndarray:
        out = np.zeros((sources, mix.shape[0], track.length), dtype=mix.dtype)
        total = np.zeros(track.length, dtype=mix.dtype)
        for offset in range(0, track.length, stride):
            chunk = track.part(offset, segment_length)
            place = slice(offset, offset + chunk.length)
            out[..., place] += weight[: chunk.length] * run(chunk)
            total[place] += weight[: chunk.length]
        return out / total

    track = Chunk(mix, 0, length)
    if not shifts:
        return split(track)
    most = int(0.5 * samplerate)
    padded = track.padded(length + 2 * most)  # zeros on both sides
    out = np.zeros((sources, *mix.shape), dtype=mix.dtype)
    for _ in range(shifts):
        offset = rng.randint(0, most)
        out += split(Chunk(padded, offset, length + most - offset))[..., most - offset :]
    return out / shifts


def bag(
    members: Sequence[Mapping[str, Any]],
    mix: np.ndarray,
    *,
    weights: Sequence[Sequence[float]] | None = None,
    **common: Any,
) -> np.ndarray:
    """The average of several models, each with one weight per source: mix (C, N) -> (S, C, N).

    `members` are the arguments of `apply` that differ by model, `common` those that do not; each member
    draws its own shifts, one member after the other. Without `weights` all count the same.
    """
    if weights is None:
        weights = [[1.0] * common["sources"] for _ in members]
    if len(weights) != len(members):
        raise ValueError(f"weights must be one row per model, got {len(weights)} for {len(members)}")
    table = np.asarray(weights, dtype=mix.dtype)[:, :, None, None]  # (models, S, 1, 1)
    if not np.all(table.sum(axis=0)):
        raise ValueError(f"the weights of each source must not sum to 0, got {list(weights)}")
    out = np.zeros((table.shape[1], *mix.shape), dtype=mix.dtype)
    for member, weight in zip(members, table, strict=True):
        out += weight * apply(mix=mix, **{**common, **member})
    return out / table.sum(axis=0)
