"""CacheMaker: what models and stacks of layers share that make caches for their layers."""

from __future__ import annotations

from collections.abc import Sequence

from .kv import KVCache
from .options import CacheOptions


class CacheMaker:
    """Base of models and of stacks of layers that attend to the positions before, which caches hold."""

    def make_caches(
        self,
        *,
        window: int | None = None,
        keep: int = 0,
        slack: int = 0,
        bits: int | None = None,
        capacity: int | None = None,
        padding: Sequence[int] | None = None,
    ) -> list[KVCache]:
        """Makes an empty cache of self-attention for each layer.

        Args:
            window: Positions that a query may see, its own among them; by default all. A layer's own window goes
                before a larger one, and keeps no first positions.
            keep: First positions of every row that stay visible beyond the window.
            slack: Positions by which a cache with a window can be rewound.
            bits: 8 or 4, in which keys and values are held; by default in the dtype they have.
            capacity: The most positions there may be; by default any number.
            padding: For the rows of a batch, how many of their first positions are padding.

        Returns:
            A list of KVCaches, in the order of the layers.

        Raises:
            ValueError: An argument is out of range.
        """
        padding = None if padding is None else tuple(padding)
        return self.caches_for(CacheOptions(window, keep, slack, bits, capacity, padding))

    def caches_for(self, options: CacheOptions) -> list[KVCache]:
        """make_caches(), given options that are made already."""
        raise NotImplementedError
