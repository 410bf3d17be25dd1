"""The report of a conversion: what became of every tensor."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from .rules import Rule, plan
from .stored import dtype_name

_PACKED = ("weight", "scales", "biases")


@dataclass(frozen=True)
class Row:
    """One rule at work: names, shapes and dtypes (in the words of safetensors) of what was read and what was written.

    The scales and biases of a packed matrix stand in the row of its weight.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    source_shapes: tuple[tuple[int, ...], ...]
    target_shapes: tuple[tuple[int, ...], ...]
    source_dtypes: tuple[str, ...]
    target_dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What a conversion did or, in a dry run, would do. `str(report)` sums it up, `table()` lists every tensor.

    Attributes:
        source: What was converted.
        out: The folder that was written.
        family: The name of the family.
        rows: One for each rule at work.
        files: The names of the files in `out`.
        written: False for a dry run.
        parameters: How many numbers the model has; those in packed matrices count one by one.
        bytes: The size of the tensors in `out`.
        warnings: A line for each thing that looks wrong, such as values that are not finite.
        reason: Why the source was taken for one of the family.
    """

    source: Path
    out: Path
    family: str
    rows: tuple[Row, ...]
    files: tuple[str, ...]
    written: bool
    parameters: int
    bytes: int
    warnings: tuple[str, ...] = ()
    reason: str = ""

    def __str__(self) -> str:
        read = [dtype for row in self.rows for dtype in row.source_dtypes]
        made = [dtype for row in self.rows for dtype in row.target_dtypes]
        lines = [
            f"{self.source} -> {self.out}" + ("" if self.written else " (dry run: nothing was written)"),
            f"  family      {self.family}" + (f" ({self.reason})" if self.reason else ""),
            f"  tensors     {_counted(read)}, all accounted for, become {_counted(made)}",
            f"  parameters  {self.parameters:,} in {self.bytes:,} bytes",
            f"  files       {', '.join(self.files)}",
        ]
        return "\n".join(lines + [f"  warning     {line}" for line in self.warnings[:20]])

    def table(self) -> str:
        """A line per rule at work."""
        return "\n".join(map(_line, self.rows))


def _line(row: Row) -> str:
    """Names, shapes and dtypes; the dtype once if it is the same everywhere."""
    if len({*row.source_dtypes, *row.target_dtypes}) == 1:
        read, made = _listed(row.sources, row.source_shapes), _listed(row.targets, row.target_shapes)
        return f"{read} {row.source_dtypes[0]} -> {made or 'dropped on purpose'}"
    read = _listed(row.sources, row.source_shapes, row.source_dtypes)
    return f"{read} -> {_listed(row.targets, row.target_shapes, row.target_dtypes)}"


def _counted(dtypes: Sequence[str]) -> str:
    """Their number, and the number of each."""
    each = ", ".join(f"{count} {dtype}" for dtype, count in Counter(dtypes).most_common())
    return f"{len(dtypes)} ({each})" if dtypes else "0"


def _listed(names: Sequence[str], shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str] = ()) -> str:
    words = [f"{name} {shape}" for name, shape in zip(names, shapes, strict=True)]
    return ", ".join(" ".join(pair) for pair in zip(words, dtypes, strict=True)) if dtypes else ", ".join(words)


def make_rows(
    rules: Sequence[Rule],
    before: Mapping[str, mx.array],
    after: Mapping[str, mx.array],
    *,
    read: Mapping[str, mx.array] | None = None,
    written: Mapping[str, mx.array] | None = None,
) -> tuple[Row, ...]:
    """The rows of a conversion, by source name.

    Args:
        rules: The table.
        before: The tensors that the rules take.
        after: The tensors that they make.
        read: The tensors of the files that were read, where matrices were unpacked before the rules.
        written: The tensors of the files that were written, where matrices were packed after the rules.
    """
    read, written = before if read is None else read, after if written is None else written
    rows = []
    for move in sorted(plan(rules, before)[0], key=lambda move: move.sources):
        inside = _whole(before, move.sources), _whole(after, move.targets)
        sources, targets = outside = _whole(read, move.sources), _whole(written, move.targets)
        if inside == outside:
            sources, targets = move.sources, move.targets
        elif move.sources[0].endswith((".scales", ".biases")):
            continue  # they stand in the row of their weight
        (a, c), (b, d) = _shapes(read, sources), _shapes(written, targets)
        rows.append(Row(sources, targets, a, b, c, d))
    return tuple(rows)


def _shapes(
    tensors: Mapping[str, mx.array], names: Sequence[str]
) -> tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]:
    """The shapes of the tensors named, and their dtypes."""
    return tuple(tensors[name].shape for name in names), tuple(dtype_name(tensors[name].dtype) for name in names)


def _whole(names: Container[str], given: Sequence[str]) -> tuple[str, ...]:
    """The names given, each with the other parts of its packed matrix."""
    every: list[str] = []
    for name in given:
        layer, _, leaf = name.rpartition(".")
        leaves = [f"{layer}.{part}" for part in _PACKED] if leaf in _PACKED else [name]
        every += [one for one in leaves if one in names]
    return tuple(every)


def totals(tensors: Mapping[str, mx.array]) -> tuple[int, int]:
    """The number of elements and of bytes."""
    return sum(math.prod(x.shape) for x in tensors.values()), sum(x.nbytes for x in tensors.values())
