"""What error messages say about tensors that do not fit a model, and how they quote a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

_MAX_LINES = 20


def shorten(value: Any) -> str:
    """At most 100 characters of `str(value)`, on one line. For a value that may be nested without end, pass a part."""
    text = " ".join(str(value).split())
    return text if len(text) <= 100 else text[:97] + "..."


def find_misfits(tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, str]]:
    """Compares tensors with the shapes that a model expects.

    Args:
        tensors: Anything with a `shape`, by name.
        shapes: The expected shapes, by name.

    Returns:
        (kind, line) for every tensor that is missing, unexpected or misshapen; empty if all fit.
    """
    problems = [("missing", f"{name} {shapes[name]}") for name in shapes.keys() - tensors.keys()]
    problems += [("unexpected", f"{name} {tensors[name].shape}") for name in tensors.keys() - shapes.keys()]
    problems += [
        ("misshapen", f"{name} must be {shapes[name]}, got {tensors[name].shape}")
        for name in tensors.keys() & shapes.keys()
        if tensors[name].shape != shapes[name]
    ]
    return problems


def describe_misfits(problems: Sequence[tuple[str, str]]) -> str:
    """The message for (kind, line) pairs: the number of each kind, then the lines, at most twenty of them."""
    counts = Counter(kind for kind, _ in problems)
    lines = [f"  {kind}: {line}" for kind, line in sorted(problems)]
    if len(lines) > _MAX_LINES:
        lines[_MAX_LINES:] = [f"  ... and {len(lines) - _MAX_LINES} more"]
    summary = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))
    return "\n".join([f"the tensors do not fit the model: {summary}", *lines])
