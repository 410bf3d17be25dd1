"""KVCache: the keys and values of the positions so far, all of them or a window.

Axes: B batch, G key/value heads, n new positions, S positions read, D head_dim, Dv value_dim.

What is stored stands in lines of slots in temporal order, so that what is read is one slice. A full line is renewed:
by a longer one where it may grow, or else (with a window) by one of the same length that begins with what still counts.
The `keep` first positions travel along: they are written again just before the first that still counts. How many slots
there are follows from the longest length so far, see sizes.py.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx

from .options import CacheOptions
from .quantized import KeysOrValues, Quantized, form_of, made_of, parts_of
from .sizes import lost, slots
from .slots import filled, joined, written

KIND = ("window", "keep", "slack", "bits", "capacity")


class RewindError(ValueError):
    """A cache cannot be rewound that far. It is as it was."""


@dataclass(frozen=True)
class View:
    """What new queries may see: attention(q, view.keys, view.values, **view.options). A view that is still held at the
    next append stays as it is, and costs that append a copy of the cache."""

    keys: KeysOrValues
    values: KeysOrValues
    options: dict[str, Any]


class KVCache:
    """Keys and values of one causal attention layer, position by position."""

    def __init__(
        self,
        *,
        window: int | None = None,
        keep: int = 0,
        slack: int = 0,
        bits: int | None = None,
        capacity: int | None = None,
        padding: Sequence[int] | None = None,
    ):
        """Makes an empty cache.

        Args:
            window: Positions that a query may see, its own among them; by default all.
            keep: First positions of every row that stay visible beyond the window.
            slack: Positions by which a cache with a window can be rewound from the longest it has been.
            bits: 8 or 4, in which keys and values are held; by default in the dtype they have.
            capacity: The most positions there may be; by default any number.
            padding: For the rows of a batch, how many of their first positions are padding.

        Raises:
            ValueError: An argument is out of range.
        """
        padding = None if padding is None else tuple(padding)
        options = CacheOptions(window, keep, slack, bits, capacity, padding)
        self.window, self.keep, self.slack, self.bits = options.window, options.keep, options.slack, options.bits
        self.capacity, self.padding = options.capacity, options.padding
        self.reset()

    @classmethod
    def from_options(cls, options: CacheOptions) -> KVCache:
        """An empty cache."""
        return cls(**vars(options))

    def reset(self) -> None:
        """Forgets all positions, and frees their memory."""
        self.length = 0  # positions appended and not trimmed, padding among them
        self._longest = 0  # the most that length has been
        self._lines: list[mx.array] = []  # what keys, then values, are made of: (B, G, slots, ...) each
        self._kept: list[mx.array] = []  # the `keep` first positions of each row, once positions after them are lost
        self._first = 0  # the first position in the lines, apart from the kept ones; those before are lost, or padding
        self._slot = 0  # its slot
        self._widths = (0, 0)
        self._taken: tuple[Any, ...] | None = None  # what was appended last fitted, and so does its like

    @property
    def offset(self) -> int | mx.array:
        """The position of the next token: an int, or with padding an array (B,), negative inside padding."""
        return self.length if self.padding is None else mx.array([self.length - row for row in self.padding])

    @property
    def arrays(self) -> list[mx.array]:
        """Every array it holds, for mx.eval."""
        return [*self._lines, *self._kept]

    @property
    def nbytes(self) -> int:
        """Bytes held, spare slots among them; cache_bytes() computes them beforehand for a cache without padding."""
        return sum(x.nbytes for x in self.arrays)

    def append(self, k: mx.array, v: mx.array, *, window: int | None = None) -> View:
        """Appends n positions.

        Args:
            k: Keys (B, G, n, D) with n >= 1.
            v: Values (B, G, n, Dv).
            window: Narrows what the queries at these positions may see.

        Returns:
            What they may see, for attention().

        Raises:
            ValueError: They do not fit what is held, or there is no room; nothing has been appended.
        """
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        new = self._parts(k, v)
        n, before = k.shape[2], self.length
        if self.capacity is not None and before + n > self.capacity:
            raise ValueError(f"the cache is full: its capacity is {self.capacity} positions, got {before + n}")
        self._widths = (k.shape[-1], v.shape[-1])
        if not self._lines:
            self._first, self._slot = before, 0
        self._forget()
        longest = max(self._longest, before + n)
        size, stop = self._size(longest), self._slot + before - self._first
        if self._lines and self._lines[0].shape[2] == size and stop + n <= size:
            if self._kept:
                self._lines = written(self._lines, self._kept, self._slot - self.keep)
            lines = self._lines = written(self._lines, new, stop)
        else:
            pieces = [self._kept, [x[:, :, self._slot : stop] for x in self._lines], new]
            lines = joined(pieces)
            self._slot = self.keep if self._kept else 0
            if lines[0].shape[2] <= size:
                lines = self._lines = filled(lines, size)
        view = self._view(lines, n, window)
        self.length, self._longest = before + n, longest
        self._settle(lines)
        return view

    def trim(self, n: int) -> None:
        """Forgets the last n positions.

        Raises:
            RewindError: Positions would be needed that are gone; nothing has changed.
        """
        most = self.length
        if self._lost() > self.keep:
            most = self.slack - (self._longest - self.length)
        if not 0 <= n <= most:
            raise RewindError(f"the cache can be rewound by 0 to {most} of its {self.length} positions, got {n}")
        self.length -= n
        if self.length < self._first:  # in the padding of all rows
            self._lines = []

    def fork(self) -> KVCache:
        """A copy that holds the same and continues on its own. Both share their arrays until one of them appends."""
        return copy.copy(self)

    def select(self, rows: Sequence[int] | mx.array) -> KVCache:
        """A cache of these rows, in this order; any may be repeated. Padding that they all have is dropped."""
        rows = cast(list[int], rows.tolist()) if isinstance(rows, mx.array) else list(rows)
        if not rows or not all(0 <= row < self._rows for row in rows):
            raise ValueError(f"rows must be at least one of 0 to {self._rows - 1}, got {rows}")
        padding = [0 if self.padding is None else self.padding[row] for row in rows]
        common = min(self.length, *padding)
        other = self._like([row - common for row in padding])
        if common == self.length:
            other.padding = tuple(row - common for row in padding)  # which tell how many rows there are
        self._forget()
        stop, index = self._slot + self.length - self._first, mx.array(rows)
        other.length, other._longest = self.length - common, self._longest - common
        other._first, other._widths = self._first - common, self._widths
        other._kept = [mx.take(x, index, axis=0) for x in self._kept]
        other._settle([mx.take(x[:, :, self._slot : stop], index, axis=0) for x in self._lines])
        return other

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: not the form of the last append, since dtypes of MLX cannot be pickled."""
        return {**vars(self), "_taken": None}

    def split(self) -> list[KVCache]:
        """A cache for each row, without its padding."""
        return [self.select([row]) for row in range(self._rows)]

    def state(self) -> tuple[dict[str, Any], dict[int | None, list[mx.array]]]:
        """What counts, as JSON-able facts and as arrays: those of all rows under None, or, of a ragged batch, those of
        each row that has begun."""
        facts = {**self._kind, "padding": self.padding, "length": self.length, "longest": self._longest}
        if self.padding is not None:
            rows = {row: cache for row, cache in enumerate(self.split()) if cache.length}
            arrays: dict[int | None, list[mx.array]] = {row: cache._counting() for row, cache in rows.items()}
        else:
            arrays = {None: self._counting()} if self.length else {}
        return {**facts, "widths": self._widths}, arrays

    @property
    def _rows(self) -> int:
        return self._lines[0].shape[0] if self._lines else len(self.padding or (0,))

    @property
    def _padded(self) -> int:
        """The padding of the emptiest row."""
        return max(self.padding or (0,))

    @property
    def _kind(self) -> dict[str, int | None]:
        return {name: getattr(self, name) for name in KIND}

    @property
    def _form(self) -> tuple[Any, ...]:
        return self._lines[0].shape[1], *self._widths, *(x.dtype for x in self._lines[-1:])

    def _like(self, padding: Sequence[int] | None) -> KVCache:
        """An empty cache of the same kind."""
        padding = padding if padding is not None and any(padding) else None
        return KVCache(**self._kind, padding=padding)  # type: ignore[arg-type]

    def _lost(self) -> int:
        return lost(self._longest, self.window, self.slack)

    def _size(self, longest: int) -> int:
        return slots(longest, self.window, self.keep, self.slack, self.capacity, self._padded)

    def _parts(self, k: mx.array, v: mx.array) -> list[mx.array]:
        """What is stored of new keys and values, which must fit what is stored already."""
        form = k.shape, v.shape, k.dtype, v.dtype
        if self._lines and self.bits is None and form == self._taken:
            return [k, v]
        for name, x in (("k", k), ("v", v)):
            if x.ndim != 4 or x.shape[2] < 1:
                raise ValueError(f"{name} must be (batch, heads, length, dim) of 1 or more positions, got {x.shape}")
            if not mx.issubdtype(x.dtype, mx.floating):
                raise ValueError(f"{name} must be a float, got {x.dtype}")
        if v.shape[:3] != k.shape[:3]:
            raise ValueError(f"v must have the batch size, heads and length of k, {k.shape[:3]}, got {v.shape[:3]}")
        if self.padding is not None and len(self.padding) != k.shape[0]:
            raise ValueError(f"k must have the {len(self.padding)} rows that padding names, got {k.shape[0]}")
        new = [x if self.bits is None else Quantized.of(x, self.bits) for x in (k, v)]
        for name, x, old in zip("kv", (k, v), self._pair(self._lines), strict=False):
            wanted, got = (*old.shape[:2], old.shape[3]), (*x.shape[:2], x.shape[3])
            if got != wanted or x.dtype != old.dtype:
                raise ValueError(
                    f"{name} must have the batch size, heads and width that are cached, {wanted} in {old.dtype},"
                    f" got {got} in {x.dtype}"
                )
        self._taken = form
        return [part for x in new for part in parts_of(x)]

    def _pair(self, parts: Sequence[mx.array]) -> list[KeysOrValues]:
        """Keys and values, made of these arrays; nothing of none."""
        half = len(parts) // 2
        halves = zip((parts[:half], parts[half:]), self._widths, strict=True)
        return [made_of(some, width, self.bits) for some, width in halves] if parts else []

    def _forget(self) -> None:
        """Moves on to the first position that still counts."""
        first = self._lost() if self._kept or not self.keep else 0
        if first > self._first:
            self._slot, self._first = self._slot + first - self._first, first

    def _settle(self, lines: list[mx.array]) -> None:
        """Keeps the first positions aside when others after them are lost, and stores what counts of lines that are not
        stored. Position self._first is in their slot self._slot."""
        gone = self._lost()
        if self.keep and not self._kept and gone > self.keep + self._padded:
            at = mx.array(self.padding or (0,))[:, None] + mx.arange(self.keep) + (self._slot - self._first)
            at = at[:, None, :, None]  # (B or 1, 1, keep, 1)
            self._kept = [mx.take_along_axis(x, at, axis=2) for x in lines]
        if lines is self._lines or not self.length:
            return
        start = self._slot - self._first
        first = max(self._first, gone if self._kept or not self.keep else 0)
        pieces = [self._kept, [x[:, :, start + first : start + self.length] for x in lines]]
        self._lines = filled(joined(pieces), self._size(self._longest))
        self._first, self._slot = first, self.keep if self._kept else 0

    def _counting(self) -> list[mx.array]:
        """What counts, kept positions first."""
        self._forget()
        stop = self._slot + self.length - self._first
        return joined([self._kept, [x[:, :, self._slot : stop] for x in self._lines]])

    def _restored(self, length: int, longest: int, widths: tuple[int, int], parts: list[mx.array]) -> KVCache:
        """This empty cache with what was counting. ValueError if it does not fit."""
        gone = lost(longest, self.window, self.slack)
        kept = self.keep if gone > self.keep else 0
        first = gone if kept or not self.keep else 0
        if not 0 < length <= longest or (gone > self.keep and longest - length > self.slack):
            raise ValueError(f"length must be from 1 to {longest}, the longest, less what can be rewound, got {length}")
        forms = [part for width in widths for part in form_of(width, self.bits)]
        for x, (width, floating) in zip(parts, forms, strict=True):
            expected = (*parts[0].shape[:2], kept + length - first, width)
            if x.shape != expected or mx.issubdtype(x.dtype, mx.floating) != floating:
                raise ValueError(f"a tensor must be {expected}, got {x.shape} in {x.dtype}")
        self.length, self._longest, self._widths = length, longest, widths
        self._kept = [mx.take(x, mx.arange(kept), axis=2) for x in parts] if kept else []
        self._first, self._slot = first, kept
        self._settle(parts)
        return self

    def _view(self, lines: list[mx.array], n: int, window: int | None) -> View:
        """What the n queries from self.length on may see of the lines."""
        window = min((some for some in (self.window, window) if some is not None), default=None)
        options: dict[str, Any] = {"causal": True}
        first, stop = self._first, self.length + n
        start = self._slot - self._first
        if self.keep:
            mask = self._mask(n, window)
            parts = [x[:, :, start + first - (self.keep if self._kept else 0) : start + stop] for x in lines]
        else:
            if window is not None:
                options["window"] = window
                first = max(first, self.length - window + 1)
            mask = self._real(first, stop)
            parts = [x[:, :, start + first : start + stop] for x in lines]
        if mask is not None:
            options["mask"] = mask
        keys, values = self._pair(parts)
        return View(keys, values, options)

    def _real(self, first: int, stop: int) -> mx.array | None:
        """Which of the positions are no padding, (B, 1, 1, S); None for all."""
        if first >= self._padded:
            return None
        return mx.arange(first, stop) >= mx.array(self.padding or (0,))[:, None, None, None]

    def _mask(self, n: int, window: int | None) -> mx.array | None:
        """What n queries may see where first positions are kept, but for causality; None for everything."""
        stop, kept = self.length + n, bool(self._kept)
        if window is None or stop - window <= (self._first if kept else self.keep):
            return None if kept else self._real(self._first, stop)
        keys = mx.arange(self._first, stop)
        near = mx.arange(self.length, stop)[:, None] - keys < window
        if kept:
            return mx.concatenate([mx.ones((n, self.keep), mx.bool_), near], axis=1)
        padding = mx.array(self.padding or (0,))[:, None, None, None]
        seen = (near | (keys < padding + self.keep)) & (keys >= padding)  # (B or 1, 1, n, S)
        return seen
