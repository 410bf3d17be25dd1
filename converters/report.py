"""What a conversion did to every tensor."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from .rules import Rule, plan
from .source import dtype_name


@dataclass(frozen=True)
class Row:
    """One rule at work: names and shapes before and after, dtype in the words of safetensors."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    source_shapes: tuple[tuple[int, ...], ...]
    target_shapes: tuple[tuple[int, ...], ...]
    dtype: str


@dataclass(frozen=True)
class Report:
    """What a conversion did, or would do. `str(report)` sums it up, `table()` lists every tensor."""

    source: Path
    out: Path
    family: str
    rows: tuple[Row, ...]
    files: tuple[str, ...]
    written: bool
    parameters: int
    bytes: int
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        before = sum(len(row.sources) for row in self.rows)
        after = sum(len(row.targets) for row in self.rows)
        dtypes = Counter(row.dtype for row in self.rows for _ in row.sources)
        stored = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
        lines = [
            f"{self.source} -> {self.out}" + ("" if self.written else " (dry run: nothing was written)"),
            f"  family      {self.family}",
            f"  tensors     {before} ({stored}), all accounted for, become {after}",
            f"  parameters  {self.parameters:,} in {self.bytes:,} bytes",
            f"  files       {', '.join(self.files)}",
        ]
        return "\n".join(lines + [f"  warning     {line}" for line in self.warnings[:20]])

    def table(self) -> str:
        """A line per rule at work."""
        return "\n".join(
            f"{_listed(row.sources, row.source_shapes)} {row.dtype} -> "
            f"{_listed(row.targets, row.target_shapes) or 'dropped on purpose'}"
            for row in self.rows
        )


def _listed(names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in zip(names, shapes, strict=True))


def make_rows(rules: Sequence[Rule], before: Mapping[str, mx.array], after: Mapping[str, mx.array]) -> tuple[Row, ...]:
    """The rows of a conversion that went well, by source name."""
    moves, _ = plan(rules, before)
    return tuple(
        Row(
            move.sources,
            move.targets,
            tuple(before[name].shape for name in move.sources),
            tuple(after[name].shape for name in move.targets),
            dtype_name(before[move.sources[0]].dtype),
        )
        for move in sorted(moves, key=lambda move: move.sources)
    )


def totals(tensors: Mapping[str, mx.array]) -> tuple[int, int]:
    """Parameters and bytes."""
    return sum(math.prod(x.shape) for x in tensors.values()), sum(x.nbytes for x in tensors.values())
