"""Audio at another sample rate, in other channels and in blocks of another size.

Audio is a float32 NumPy array (channels, samples) with full scale at -1 and 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator

import numpy as np
import soxr

_MAX_RATE = 10_000_000  # Hz
_HALF_POWER = math.sqrt(0.5)


def resample(audio: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Resamples audio with libsoxr at very high quality.

    Args:
        audio: (channels, samples) of floats.
        from_rate: the sample rate of `audio`, in Hz.
        to_rate: the sample rate of the result, in Hz.

    Returns:
        (channels, samples) at `to_rate`.

    Raises:
        ValueError: if a rate is not a whole number from 1 to 10 million.
    """
    _check_rates(from_rate, to_rate)
    if from_rate == to_rate:
        return audio
    return np.ascontiguousarray(soxr.resample(audio.T, from_rate, to_rate, quality="VHQ").T)


def _check_rates(from_rate: int, to_rate: int) -> None:
    for name, rate in (("from_rate", from_rate), ("to_rate", to_rate)):
        if not isinstance(rate, (int, np.integer)) or not 1 <= rate <= _MAX_RATE:
            raise ValueError(f"{name} must be a whole number of Hz from 1 to {_MAX_RATE}, got {rate!r}")


def resample_blocks(blocks: Iterable[np.ndarray], channels: int, from_rate: int, to_rate: int) -> Iterator[np.ndarray]:
    """Resamples audio that comes in blocks. The result equals that of resample() bit for bit.

    Args:
        blocks: arrays (channels, n).
        channels: of the blocks.
        from_rate: the sample rate of `blocks`, in Hz.
        to_rate: the sample rate of the result, in Hz.

    Yields:
        Blocks (channels, m); m varies and may be 0.
    """
    _check_rates(from_rate, to_rate)
    if from_rate == to_rate:
        yield from blocks
        return
    stream = soxr.ResampleStream(from_rate, to_rate, channels, dtype="float32", quality="VHQ")
    for block in blocks:
        yield np.ascontiguousarray(stream.resample_chunk(np.ascontiguousarray(block.T)).T)
    yield np.ascontiguousarray(stream.resample_chunk(np.zeros((0, channels), np.float32), last=True).T)


def rechunk(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Yields the samples of blocks (channels, n) in blocks (channels, size); the last one may be shorter."""
    held: list[np.ndarray] = []
    count = 0
    for block in blocks:
        held.append(block)
        count += block.shape[1]
        if count < size:
            continue
        whole = np.concatenate(held, axis=1)
        for start in range(0, count - size + 1, size):
            yield whole[:, start : start + size]
        held = [whole[:, count - count % size :]]
        count %= size
    if count:
        yield np.concatenate(held, axis=1)


def convert_channels(audio: np.ndarray, channels: int, downmix: np.ndarray | None = None) -> np.ndarray:
    """Converts audio to another number of channels.

    Mono is repeated and several channels are averaged to mono. More channels than wanted are mixed to stereo where
    `downmix` tells how; otherwise the first are taken.

    Args:
        audio: (C, samples).
        channels: of the result.
        downmix: (2, C), the weights of all channels in the left and the right one.

    Returns:
        (channels, samples).

    Raises:
        ValueError: if `audio` has several channels, but fewer than wanted.
    """
    given = audio.shape[0]
    if given == channels:
        return audio
    if downmix is not None and given > 2 >= channels:
        return convert_channels(downmix @ audio, channels)
    if channels == 1:
        return audio.mean(axis=0, keepdims=True)
    if given == 1:
        return np.repeat(audio, channels, axis=0)
    if given < channels:
        raise ValueError(f"audio must be mono or have at least {channels} channels, got {given}")
    return audio[:channels]


@functools.cache
def downmix_weights(layout: str, centre: float = _HALF_POWER, surround: float = _HALF_POWER) -> np.ndarray:
    """Returns the weights (2, C) with which FFmpeg's libswresample mixes C channels to stereo, by ITU-R BS.775.

    Args:
        layout: FFmpeg's name of the channels, as "5.1(side)", or "6c" for the usual layout of six channels.
        centre: the weight of the centre, where a file has one of its own (AC-3).
        surround: the weight of the surround channels, where a file has one of its own.

    Raises:
        ValueError: if there is no such mix.
    """
    import av

    try:
        count = av.AudioLayout(layout).nb_channels
        units = av.AudioFrame.from_ndarray(np.eye(count, dtype=np.float32), "fltp", layout)
        units.sample_rate = 48000
        mixed = av.AudioResampler("fltp", "stereo", 48000).resample(units)
        names = [channel.name for channel in av.AudioLayout(layout).channels]
        levels = {"FC": centre, **dict.fromkeys(("SL", "SR", "BL", "BR", "BC"), surround)}
        scale = [levels.get(name, _HALF_POWER) / _HALF_POWER for name in names]
        return np.concatenate([part.to_ndarray() for part in mixed], axis=1) * np.array(scale, np.float32)
    except (av.error.FFmpegError, ValueError):
        raise ValueError(f"channels of the layout {layout!r} cannot be mixed to stereo") from None
