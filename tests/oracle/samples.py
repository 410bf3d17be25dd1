"""A deterministic signal that has what music has, and the samples a fixture keeps. NumPy only, for both sides."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

RMS = 0.1


def music(length: int, channels: int = 2, seed: int = 0, sample_rate: int = 44100) -> np.ndarray:
    """Tones with slow amplitude modulation, a noise burst twice a second and a little noise.

    Returns float32 (channels, length) of rms 0.1.
    """
    rng = np.random.default_rng(seed)
    time = np.arange(length) / sample_rate
    tones = np.zeros((channels, length))
    for _ in range(9):
        pitch = 55.0 * 2.0 ** (rng.uniform(0, 7))
        rate, phase, turn = rng.uniform(0.1, 2.0), rng.uniform(0, 2 * np.pi), rng.uniform(0, 2 * np.pi)
        swell = 0.55 + 0.45 * np.sin(2 * np.pi * rate * time + phase)
        tone = swell * np.sin(2 * np.pi * pitch * time + turn) / np.sqrt(pitch / 55.0)
        tones += rng.uniform(0.2, 1.0, (channels, 1)) * tone
    beat = np.exp(-12.0 * (time % 0.5)) * np.clip(rng.standard_normal(length), -2, 2)
    mix = tones + rng.uniform(0.2, 0.4, (channels, 1)) * beat + 0.02 * rng.standard_normal((channels, length))
    return (mix * (RMS / np.sqrt(np.mean(mix**2)))).astype(np.float32)


def thin(x: np.ndarray, count: int = 64) -> np.ndarray:
    """At most about `count` elements of x in order, at a prime distance so that every axis is met."""
    stride = max(1, x.size // count)
    while stride > 1 and any(stride % k == 0 for k in range(2, int(stride**0.5) + 1)):
        stride += 1
    return x.reshape(-1)[::stride]


def track(x: np.ndarray, stride: int = 17, edge: int = 31) -> np.ndarray:
    """The last axis of x thinned, with both edges in full."""
    return np.concatenate([x[..., :edge], x[..., ::stride], x[..., -edge:]], axis=-1)


def pack(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One flat vector per dtype and a JSON index: a thousand small arrays cost no thousand headers."""
    index = [[name, value.dtype.name, list(value.shape)] for name, value in arrays.items()]
    packed = {"index": np.frombuffer(json.dumps(index).encode(), np.uint8)}
    for kind in {value.dtype.name for value in arrays.values()}:
        packed[kind] = np.concatenate([v.reshape(-1) for v in arrays.values() if v.dtype.name == kind])
    return dict(sorted(packed.items()))


def read_packed(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays that `pack` made one file of."""
    with np.load(path) as stored:
        vectors = {name: stored[name] for name in stored.files}
    arrays, position = {}, dict.fromkeys(vectors, 0)
    for name, kind, shape in json.loads(vectors.pop("index").tobytes()):
        start, size = position[kind], int(np.prod(shape))
        arrays[name] = vectors[kind][start : start + size].reshape(shape)
        position[kind] = start + size
    return arrays
