"""CrossCache: the keys and values of a memory that decoders attend to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx


class CrossCache:
    """Keys and values of a memory, such as an encoder's output, projected once."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets the memory."""
        self._memory: mx.array | None = None
        self._pair: tuple[mx.array, ...] = ()

    def get(
        self, memory: mx.array, project: Callable[[mx.array], tuple[mx.array, mx.array]]
    ) -> tuple[mx.array, mx.array]:
        """project(memory), which is called again where memory is another array than last time.

        An array changed in place is still the same: call reset() first.
        """
        if not self._pair or memory is not self._memory:
            k, v = project(memory)
            pair = mx.contiguous(k), mx.contiguous(v)  # or every step's products would copy the heads into order
            self._memory, self._pair = memory, pair
        k, v = self._pair
        return k, v

    def __deepcopy__(self, memo: dict[int, Any]) -> CrossCache:
        """A cache of the same memory: get() knows it by its array, of which a copy would be another memory."""
        return copy.copy(self)

    def select(self, rows: Sequence[int], memory: mx.array) -> CrossCache:
        """A cache of these rows. `memory` is the same rows of what the keys and values are of."""
        other = CrossCache()
        if self._pair:
            index = mx.array(list(rows))
            other._memory, other._pair = memory, tuple(mx.take(x, index, axis=0) for x in self._pair)
        return other

    @property
    def length(self) -> int:
        """Positions of the memory; 0 for none."""
        return self._pair[0].shape[2] if self._pair else 0

    @property
    def arrays(self) -> list[mx.array]:
        """Every array it holds, for mx.eval."""
        return list(self._pair)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return sum(x.nbytes for x in self._pair)
