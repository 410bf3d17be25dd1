"""Keys and values in 8 or 4 bits: groups of a head's channels, each with a scale and a bias.

Axes: B batch, G key/value heads, S positions, D width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ...backend import dispatch

BITS = (8, 4)
_FLOATS = 2**15  # channels of a stretch of positions that a CPU takes at once


def group_size(width: int) -> int:
    """Channels that share a scale: 64, or 32 where 64 does not divide the width."""
    return 32 if width % 64 else 64


def stored_width(width: int) -> int:
    """The width with the zeros that make it a multiple of its group size."""
    return -(-width // group_size(width)) * group_size(width)


@dataclass(frozen=True)
class Quantized:
    """x (B, G, S, D), affine: x is nearly packed * scales + biases.

    `packed` is uint32 with 32 / bits channels each, the first in its lowest bits; scales and biases are one a group of
    channels. Zeros stand behind the first `width` channels.
    """

    packed: mx.array
    scales: mx.array
    biases: mx.array
    group_size: int
    bits: int
    width: int

    @classmethod
    def of(cls, x: mx.array, bits: int) -> Quantized:
        """The nearest to x."""
        width = x.shape[-1]
        more, group = stored_width(width) - width, group_size(width)
        if more:
            x = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)])
        packed, scales, biases = mx.quantize(x, group_size=group, bits=bits)
        return cls(packed, scales, biases, group, bits, width)

    @property
    def parts(self) -> list[mx.array]:
        """packed, scales, biases."""
        return [self.packed, self.scales, self.biases]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of x."""
        return (*self.packed.shape[:-1], self.width)

    @property
    def ndim(self) -> int:
        """That of x."""
        return self.packed.ndim

    @property
    def dtype(self) -> mx.Dtype:
        """That of x, and of dequantized()."""
        return self.scales.dtype

    def head(self, row: int, head: int) -> Quantized:
        """One head of one row, (1, 1, S, D)."""
        parts = [x[row : row + 1, head : head + 1] for x in self.parts]
        return self._of(parts)

    def after(self, x: mx.array) -> Quantized:
        """The same, computed with when x is."""
        return self._of(mx.depends(self.parts, [x]))

    def dequantized(self, dtype: mx.Dtype | None = None) -> mx.array:
        """x, nearly, in its own dtype or another."""
        scales, biases = (x if dtype is None else x.astype(dtype) for x in (self.scales, self.biases))
        x = mx.dequantize(self.packed, scales, biases, group_size=self.group_size, bits=self.bits)
        return x if x.shape[-1] == self.width else x[..., : self.width]

    def _of(self, parts: Sequence[mx.array]) -> Quantized:
        packed, scales, biases = parts
        return Quantized(packed, scales, biases, self.group_size, self.bits, self.width)

    def scores(self, q: mx.array) -> mx.array:
        """q x^T in float32, for q (B, G, L, D): (B, G, L, S)."""
        q, found = q.astype(mx.float32), list[mx.array]()
        for part in self._stretches():
            part = part.after(found[-1]) if found else part
            found.append(part._product(q, True, few=2))
        return found[0] if len(found) == 1 else mx.concatenate(found, axis=-1)

    def weighed(self, weights: mx.array) -> mx.array:
        """weights x in float32, for weights (B, G, L, S): (B, G, L, D)."""
        at, total = 0, None
        for part in self._stretches():
            n = part.shape[2]
            part = part if total is None else part.after(total)
            some = part._product(weights[..., at : at + n].astype(mx.float32), False, few=8)
            at, total = at + n, some if total is None else total + some
        assert total is not None  # there is a position
        return total

    def _stretches(self) -> list[Quantized]:
        """It in stretches of positions that are small, since MLX's CPU backend copies what it multiplies."""
        B, G, S, D = self.shape
        if not dispatch.on_cpu():
            return [self]
        step = max(64, _FLOATS // (B * G * D))
        return [self._of([x[:, :, first : first + step] for x in self.parts]) for first in range(0, S, step)]

    def _product(self, x: mx.array, transpose: bool, few: int) -> mx.array:
        """x times this or its transpose.

        few: rows of a product with a head for which a CPU's quantized one is quicker than one with floats.
        """
        if x.shape[2] > few and dispatch.on_cpu():
            floats = self.dequantized(mx.float32)
            return x @ (floats.swapaxes(-1, -2) if transpose else floats)
        more = stored_width(self.width) - self.width
        x = mx.pad(x, [(0, 0)] * 3 + [(0, more)]) if transpose and more else x
        packed, scales, biases = self.packed, self.scales.astype(mx.float32), self.biases.astype(mx.float32)
        if dispatch.HAS_CUDA:  # where MLX 0.32.4 has no product with stretches of several heads
            packed, scales, biases = (mx.contiguous(y) for y in (packed, scales, biases))
        form: dict[str, Any] = {"transpose": transpose, "group_size": self.group_size, "bits": self.bits}
        out = mx.quantized_matmul(x, packed, scales, biases, **form)
        return out if transpose or not more else out[..., : self.width]


KeysOrValues = mx.array | Quantized


def parts_of(x: KeysOrValues) -> list[mx.array]:
    """The arrays that x is made of."""
    return x.parts if isinstance(x, Quantized) else [x]


def made_of(parts: Sequence[mx.array], width: int, bits: int | None) -> KeysOrValues:
    """The inverse of parts_of."""
    if bits is None:
        return parts[0]
    packed, scales, biases = parts
    return Quantized(packed, scales, biases, group_size(width), bits, width)


def form_of(width: int, bits: int | None) -> list[tuple[int, bool]]:
    """The last axis of each of parts_of, and whether it holds floats."""
    if bits is None:
        return [(width, True)]
    groups = stored_width(width) // group_size(width)
    return [(stored_width(width) * bits // 32, False), (groups, True), (groups, True)]
