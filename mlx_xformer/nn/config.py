"""What configurations check of their fields, and how they are read from plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

Config = TypeVar("Config")
# Far beyond any model, and below what would keep a reader of a hostile file busy.
WIDTH, LAYERS, VOCABULARY = 10**6, 1000, 10**8


def read(kind: type[Config], what: str, values: Mapping[str, Any]) -> Config:
    """The configuration of this kind from plain values. ValueError names options of `what` that are unknown or lack."""
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    if unknown := sorted(values.keys() - {field.name for field in fields}):
        raise ValueError(f"{what} has no option named {', '.join(unknown)}")
    missing = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING and f.name not in values]
    if missing:
        raise ValueError(f"{what} must be given {', '.join(missing)}")
    return kind(**values)


def check_whole(config: Any, limits: Mapping[str, tuple[int, int]], optional: tuple[str, ...] = ()) -> None:
    """ValueError names a field that is no whole number from .. to, or None if it is optional."""
    for name, (least, most) in limits.items():
        value = getattr(config, name)
        if value is None and name in optional:
            continue
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{name} must be a whole number from {least} to {most}, got {value!r:.80}")


def check_flags(config: Any, *names: str) -> None:
    """ValueError names a field that is neither true nor false."""
    for name in names:
        if type(getattr(config, name)) is not bool:
            raise ValueError(f"{name} must be true or false, got {getattr(config, name)!r:.80}")


def check_rate(config: Any, *names: str) -> None:
    """ValueError names a field that is no number from 0 to below 1."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise ValueError(f"{name} must be a number from 0 to below 1, got {value!r:.80}")


def check_one_of(config: Any, name: str, known: Any) -> None:
    """ValueError for a field that is none of the words known."""
    value = getattr(config, name)
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r:.80}")
