"""CacheOptions: what the caches of a model shall be."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .quantized import BITS


@dataclass(frozen=True)
class CacheOptions:
    """What KVCaches shall be, under the names of KVCache's arguments. ValueError names one that is out of range."""

    window: int | None = None
    keep: int = 0
    slack: int = 0
    bits: int | None = None
    capacity: int | None = None
    padding: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("keep", 0), ("slack", 0), ("capacity", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.bits is not None and self.bits not in BITS:
            raise ValueError(f"bits must be None or one of {', '.join(map(str, BITS))}, got {self.bits}")
        if self.padding is not None and (not len(self.padding) or min(self.padding) < 0):
            raise ValueError(f"padding must be at least 0 for each of at least one row, got {list(self.padding)}")

    def within(self, window: int | None) -> CacheOptions:
        """The options for a layer with a window of its own, which goes before a larger one and keeps no first
        positions."""
        if window is None or (self.window is not None and self.window < window):
            return self
        return replace(self, window=window, keep=0)
