"""What a proof says: a row for each operation and check, as a table or as JSON."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

_MOST_SKIPPED = 0.05


@dataclass(frozen=True)
class Place:
    """Where a sample is found again: run([name], seeds=[seed]) draws it as number `sample`."""

    seed: int
    sample: int
    what: str
    why: str = ""


@dataclass
class Row:
    """One operation in one check ("float32", "float32 vjp", ...). worst is in budgets; a failure's goes before."""

    name: str
    check: str
    attempted: int = 0
    passed: int = 0
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> samples
    worst: float = 0.0
    place: Place | None = None
    failures: list[Place] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether a sample failed, too many were skipped, or none was proven."""
        return bool(self.failures) or self.too_many_skipped or not self.passed

    @property
    def too_many_skipped(self) -> bool:
        """Whether more samples were skipped than a row may skip."""
        return self.skips > _MOST_SKIPPED * self.attempted

    @property
    def skips(self) -> int:
        """How many samples were skipped."""
        return sum(self.skipped.values())

    def skip(self, reason: str) -> None:
        """Counts a sample that is not compared, and why."""
        self.attempted += 1
        self.skipped[reason] = self.skipped.get(reason, 0) + 1

    def add(self, ratio: float, place: Place) -> None:
        """One sample's result; it has failed if the place says why."""
        self.attempted += 1
        self.passed += not place.why
        if place.why:
            self.failures.append(place)
        worse = self.place is None or (bool(place.why), ratio) > (bool(self.place.why), self.worst)
        if worse:
            self.worst, self.place = ratio, place


@dataclass(frozen=True)
class Report:
    """Rows, and on what they were computed."""

    rows: tuple[Row, ...]
    device: str
    versions: dict[str, str]
    seeds: tuple[int, ...]
    seconds: float

    @property
    def failed(self) -> bool:
        """Whether a row has failed, or there is none."""
        return not self.rows or any(row.failed for row in self.rows)

    def table(self) -> str:
        """Fixed columns: a line for each row, then the reasons for skips, the failures and a summary."""
        heads = ("name", "check", "attempted", "passed", "skipped", "worst", "worst case")
        lines = [heads, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(6)]
        shown = [
            "  ".join(
                [
                    *(f"{c:{'<' if i < 2 else '>'}{w}}" for i, (c, w) in enumerate(zip(line, widths, strict=False))),
                    line[6],
                ]
            )
            for line in lines
        ]
        return "\n".join([*shown, *self._skips(), *self._failures(), self.summary()])

    def summary(self) -> str:
        """One line: how many of how many, on what."""
        attempted, passed, skipped = (
            sum(counts) for counts in zip(*((r.attempted, r.passed, r.skips) for r in self.rows), strict=True)
        )
        verdict = "FAILED" if self.failed else "passed"
        worst = max((row.worst for row in self.rows if row.failed == self.failed), default=0.0)
        on = ", ".join([self.device, *(f"{name} {version}" for name, version in self.versions.items())])
        return (
            f"{verdict}: {passed} of {attempted} checks, {skipped} skipped, worst {_number(worst)} budgets; "
            f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}, {self.seconds:.0f} s ({on})"
        )

    def _skips(self) -> list[str]:
        reasons: Counter[tuple[str, str]] = Counter()
        for row in self.rows:
            for reason, count in row.skipped.items():
                reasons[row.name, reason] += count
        return [f"skipped  {name}: {count}, {reason}" for (name, reason), count in reasons.items()]

    def _failures(self) -> list[str]:
        lines = []
        for row in self.rows:
            if row.failures and row.place:
                at = f"seed {row.place.seed} sample {row.place.sample}"
                count = f"{len(row.failures)} of {row.attempted}"
                lines.append(f"FAILED   {row.name} {row.check}: {count}, worst {at}, {row.place.what}: {row.place.why}")
            elif row.failed:
                why = "over 5 % of its samples are skipped" if row.too_many_skipped else "nothing was proven"
                lines.append(f"FAILED   {row.name} {row.check}: {why}")
        return lines

    def to_json(self) -> str:
        """Everything, failures in full. A ratio that is no number ("inf") is a string."""
        rows = [{**asdict(row), "worst": _finite(row.worst), "failed": row.failed} for row in self.rows]
        facts: dict[str, Any] = {"failed": self.failed, "device": self.device, "versions": self.versions}
        facts |= {"seeds": list(self.seeds), "seconds": round(self.seconds, 1), "rows": rows}
        return json.dumps(facts, indent=1, allow_nan=False)


def _finite(x: float) -> float | str:
    return x if math.isfinite(x) else str(x)


def _number(x: float) -> str:
    return f"{x:.2f}" if x < 100 else f"{x:.1e}" if math.isfinite(x) else "inf"


def _cells(row: Row) -> tuple[str, ...]:
    place = f"seed {row.place.seed} sample {row.place.sample}: {row.place.what}" if row.place else ""
    counts = (row.attempted, row.passed, row.skips)
    return (row.name, row.check, *map(str, counts), _number(row.worst) if row.place else "-", place)
