"""Rotary position embeddings. Tables are computed in float64 on the host, once per shape.

Axes: B batch, H heads, L positions, D head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import mlx.core as mx
import numpy as np

from ..backend import dispatch
from .config import Config


@dataclass(frozen=True)
class RotaryScaling(Config):
    """What makes rotary positions reach further than a model was trained: pairs of channels turn more slowly.

    "linear" (Chen et al. 2023, arXiv 2306.15595): all by `factor`. The others let alone what turns at least `high`
    times in the `length` positions of the training, slow what turns at most `low` times by the factor, and go from one
    to the other between: "llama3" (Llama 3.1) in proportion to the turns, "yarn" (Peng et al. 2023, arXiv 2309.00071)
    to the index of the pair, from whole indices if `truncate`. Queries and keys are multiplied with `magnitude`.
    """

    _what: ClassVar[str] = "rope_scaling"

    kind: str
    factor: float
    length: int | None = None
    low: float = 1.0
    high: float = 4.0
    magnitude: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3", "yarn"):
            raise ValueError(f"kind must be one of linear, llama3, yarn, got {self.kind!r}")
        self._check_above_0("factor", "magnitude", "low", "high")
        if self.kind != "linear" and not (self.length is not None and self.length > 0 and 0 < self.low < self.high):
            raise ValueError(
                f"{self.kind} needs a length and 0 < low < high, got {self.length}, {self.low} and {self.high}"
            )

    def rates(self, rates: np.ndarray, theta: float) -> np.ndarray:
        """The rates (radians a position, dims / 2 of them, from theta^0 down) as slowed."""
        if self.length is None or self.kind == "linear":
            return rates / self.factor
        turns = self.length * rates / (2 * math.pi)
        if self.kind == "llama3":
            kept: np.ndarray = (turns - self.low) / (self.high - self.low)
        else:
            first, last = (self._index(number, len(rates), theta) for number in (self.high, self.low))
            if self.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, 2 * len(rates) - 1)
            kept = 1 - (np.arange(len(rates)) - first) / (last - first if last != first else 0.001)
        kept = np.clip(kept, 0, 1)
        return rates * kept + rates / self.factor * (1 - kept)

    def _index(self, turns: float, pairs: int, theta: float) -> float:
        """Of the pair that would turn so many times."""
        assert self.length is not None  # rates() has asked
        return pairs * math.log(self.length / (2 * math.pi * turns)) / math.log(theta)


@dataclass(frozen=True)
class Rotary(Config):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864): pairs of the first `dims` channels of a head turn by
    position * theta^(-2i / dims), or slower by `scaling`. Pairs are (i, i + dims / 2), as in Llama, or (2i, 2i + 1) if
    `interleaved`."""

    _what: ClassVar[str] = "the rotary positions"
    _parts: ClassVar = {"scaling": RotaryScaling}

    dims: int
    theta: float = 10000.0
    interleaved: bool = False
    scaling: RotaryScaling | None = None

    def __post_init__(self) -> None:
        if type(self.dims) is not int or self.dims < 2 or self.dims % 2:
            raise ValueError(f"dims must be a whole number, even and at least 2, got {self.dims!r:.80}")
        self._check_above_0("theta")
        self._check_flags("interleaved")

    def __call__(self, x: mx.array, *, offset: int | mx.array = 0, positions: mx.array | None = None) -> mx.array:
        """Turns the channels of queries or keys by their positions.

        Args:
            x: Floats (B, H, L, D), or (B, L, D) of one head.
            offset: The position of the first of the L vectors, a whole number or an array of them, (B,) or ().
            positions: Instead, the position of each, (L,) or (B, L), in any order.

        Returns:
            An array of the shape and dtype of x.

        Raises:
            ValueError: x is of whole numbers or has other axes, D is below `dims`, or offset or positions do not fit x.
        """
        if positions is None and isinstance(offset, int) and self._by_table(x, offset):
            turn = _turned_few if x.shape[2] <= _FEW else _turned
            return turn(x, *_turns(self, offset, x.shape[2])).astype(x.dtype)
        self._check(x, offset, positions)
        if x.ndim == 3:
            return self(x[:, None], offset=offset, positions=positions)[:, 0]
        if not x.size:  # MLX's kernel takes no empty array on CUDA
            return x
        rates = self.rates()  # MLX's own, in float32, are good to 3e-7 only
        magnitude = 1.0 if self.scaling is None else self.scaling.magnitude
        if positions is None:
            freqs = mx.array(1 / rates, mx.float32)
            turned = mx.fast.rope(
                x, self.dims, traditional=self.interleaved, base=None, scale=1.0, offset=offset, freqs=freqs
            )
            return turned if magnitude == 1 else self._grown(turned, magnitude)
        # (L, dims / 2) or (B, L, dims / 2)
        phase = positions[..., None].astype(mx.float32) * mx.array(rates, mx.float32)
        phase = phase if phase.ndim == 2 else phase[:, None]
        cos, sin = mx.cos(phase) * magnitude, mx.sin(phase) * magnitude
        turned, rest = mx.split(x, [self.dims], axis=-1)
        parts = mx.unflatten(turned, -1, (-1, 2) if self.interleaved else (2, -1))
        axis = -1 if self.interleaved else -2
        a, b = (mx.squeeze(part, axis) for part in mx.split(parts, 2, axis=axis))
        turned = mx.flatten(mx.stack([a * cos - b * sin, a * sin + b * cos], axis=axis), -2, -1)
        return mx.concatenate([turned.astype(x.dtype), rest], axis=-1)

    def _check(self, x: mx.array, offset: int | mx.array, positions: mx.array | None) -> None:
        if x.ndim not in (3, 4):
            raise ValueError(f"x must be (batch, heads, length, dim) or (batch, length, dim), got shape {x.shape}")
        if not mx.issubdtype(x.dtype, mx.floating):
            raise ValueError(f"x must be a float, got {x.dtype}")
        if self.dims > x.shape[-1]:
            raise ValueError(f"dims must be at most head_dim, {x.shape[-1]}, got {self.dims}")
        B, L = x.shape[0], x.shape[-2]
        if positions is not None and positions.shape not in ((L,), (1, L), (B, L)):
            raise ValueError(f"positions must be (L,) or (B, L) = {(B, L)}, got {positions.shape}")
        if isinstance(offset, mx.array):
            if not mx.issubdtype(offset.dtype, mx.integer) or offset.shape not in ((), (1,), (B,)):
                raise ValueError(f"offset must be whole numbers, one or ({B},), got {offset.dtype} {offset.shape}")
        elif type(offset) is not int:
            raise ValueError(f"offset must be a whole number, got {offset!r:.80}")

    def _by_table(self, x: mx.array, offset: int) -> bool:
        """Whether cosines and sines come from the host: a CPU computes them one by one, and layers can share them."""
        floats = x.ndim == 4 and x.size > 0 and mx.issubdtype(x.dtype, mx.floating) and type(offset) is int
        whole = floats and self.dims == x.shape[3] and not self.interleaved and x.shape[2] <= _TABLE
        return whole and dispatch.on_cpu()

    def rates(self) -> np.ndarray:
        """(dims / 2,) float64: radians that a pair turns from one position to the next."""
        rates: np.ndarray = self.theta ** (-np.arange(0, self.dims, 2) / self.dims)
        return rates if self.scaling is None else self.scaling.rates(rates, self.theta)

    def _grown(self, x: mx.array, magnitude: float) -> mx.array:
        """x with its turned channels multiplied."""
        if self.dims == x.shape[-1]:
            return x * magnitude
        turned, rest = mx.split(x, [self.dims], axis=-1)
        return mx.concatenate([turned * magnitude, rest], axis=-1)


_TABLE = 1024  # positions of a table, at most
_FEW = 8  # positions for which each operation counts


def _turned(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    a, b = mx.split(x, 2, axis=-1)
    return x * cos + mx.concatenate([b, a], axis=-1) * sin


_turned_few = mx.compile(_turned)


@lru_cache(maxsize=8)
def _turns(rotary: Rotary, offset: int, length: int) -> tuple[mx.array, mx.array]:
    """(length, dims) each: cosines of pairs (i, i + dims / 2), and sines, those of the first half negative."""
    phase = (offset + np.arange(length, dtype=np.float64))[:, None] * rotary.rates()
    cos, sin = np.cos(phase), np.sin(phase)
    magnitude = 1.0 if rotary.scaling is None else rotary.scaling.magnitude
    tables = np.concatenate([cos, cos], axis=1), np.concatenate([-sin, sin], axis=1)
    return mx.array((tables[0] * magnitude).astype(np.float32)), mx.array((tables[1] * magnitude).astype(np.float32))
