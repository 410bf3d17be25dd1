"""Layouts: how the axes and rows of a tensor change on the way from source to target, each with its inverse."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Permute:
    """Axis k of the result is axis `axes[k]` of the input."""

    axes: tuple[int, ...]

    def __call__(self, x: mx.array) -> mx.array:
        """Returns x with its axes permuted."""
        if x.ndim != len(self.axes):
            raise ValueError(f"must have {len(self.axes)} axes, got {x.ndim}")
        return x.transpose(self.axes)

    def inverse(self) -> Permute:
        """The permutation back."""
        return Permute(tuple(self.axes.index(k) for k in range(len(self.axes))))


@dataclass(frozen=True)
class Squeeze:
    """Drops `axis`, which has one element."""

    axis: int

    def __call__(self, x: mx.array) -> mx.array:
        """Returns x without the axis."""
        if x.ndim <= self.axis or x.shape[self.axis] != 1:
            raise ValueError(f"axis {self.axis} must have one element")
        return x.squeeze(self.axis)

    def inverse(self) -> Expand:
        """The layout that inserts the axis again."""
        return Expand(self.axis)


@dataclass(frozen=True)
class Expand:
    """Puts in an axis of one element as `axis`."""

    axis: int

    def __call__(self, x: mx.array) -> mx.array:
        """Returns x with one axis more."""
        if x.ndim < self.axis:
            raise ValueError(f"must have at least {self.axis} axes, got {x.ndim}")
        return mx.expand_dims(x, self.axis)

    def inverse(self) -> Squeeze:
        """The layout that drops the axis again."""
        return Squeeze(self.axis)


@dataclass(frozen=True)
class Pairs:
    """The rows of each of `heads` heads: neighbours (2i, 2i + 1) go to (i, i + half of the head); back if `joined`."""

    heads: int
    joined: bool = False

    def __call__(self, x: mx.array) -> mx.array:
        """Returns x (heads * D, ...) with the rows of each head reordered."""
        if not x.ndim or x.shape[0] % (2 * self.heads):
            raise ValueError(f"must have an even number of rows for each of {self.heads} heads")
        half = x.shape[0] // self.heads // 2
        parts = x.reshape(self.heads, *((2, half) if self.joined else (half, 2)), *x.shape[1:])
        return parts.swapaxes(1, 2).reshape(x.shape)

    def inverse(self) -> Pairs:
        """The order back."""
        return Pairs(self.heads, not self.joined)


@dataclass(frozen=True)
class Stack:
    """The rows are those of `count` equal parts, which become axis 0; joined again if `joined`."""

    count: int
    joined: bool = False

    def __call__(self, x: mx.array) -> mx.array:
        """Returns (count * R, ...) as (count, R, ...), or the reverse if `joined`."""
        if self.joined:
            if x.ndim < 2 or x.shape[0] != self.count:
                raise ValueError(f"must have {self.count} parts as axis 0, each with rows")
            return mx.flatten(x, 0, 1)
        if not x.ndim or x.shape[0] % self.count:
            raise ValueError(f"must have rows in {self.count} equal parts")
        return mx.unflatten(x, 0, (self.count, x.shape[0] // self.count))

    def inverse(self) -> Stack:
        """The reverse layout."""
        return Stack(self.count, not self.joined)


@dataclass(frozen=True)
class Halves:
    """The two halves of axis 1 follow each other along axis 0, (E, 2 O, ...) -> (2 E, O, ...); back if `joined`."""

    joined: bool = False

    def __call__(self, x: mx.array) -> mx.array:
        """Returns x with the halves of one axis joined along the other."""
        axis = 0 if self.joined else 1
        if x.ndim < 2 or x.shape[axis] % 2:
            raise ValueError(f"axis {axis} must have two halves")
        return mx.concatenate([*mx.split(x, 2, axis=axis)], axis=1 - axis)

    def inverse(self) -> Halves:
        """The reverse layout."""
        return Halves(not self.joined)


@dataclass(frozen=True)
class ZeroPart:
    """Of the rows, `count` equal parts, part `index` holds nothing but zeros, and goes; back if `joined`."""

    count: int
    index: int
    joined: bool = False

    def __call__(self, x: mx.array) -> mx.array:
        """Returns x without the part, or with zeros in its place if `joined`."""
        given = self.count - 1 if self.joined else self.count
        if not x.ndim or x.shape[0] % given:
            raise ValueError(f"must have rows in {given} equal parts")
        parts = [*mx.split(x, given, axis=0)]
        if self.joined:
            parts.insert(self.index, mx.zeros_like(parts[0]))
        elif mx.any(parts.pop(self.index)).item():
            raise ValueError(f"part {self.index + 1} of its {self.count} parts of rows must be zeros")
        return mx.concatenate(parts, axis=0)

    def inverse(self) -> ZeroPart:
        """The reverse layout."""
        return ZeroPart(self.count, self.index, not self.joined)


Layout = Permute | Squeeze | Expand | Pairs | Stack | Halves | ZeroPart
