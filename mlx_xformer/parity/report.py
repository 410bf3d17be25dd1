"""The result of a proof: a row for each operation and check, as a table or as JSON."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

_MOST_SKIPPED = 0.05


@dataclass(frozen=True)
class Place:
    """Where a sample is found again: `run([name], seeds=[seed])` draws it as number `sample`.

    Attributes:
        seed: The seed that it is drawn from.
        sample: Its number among the samples of that seed, from 0.
        what: Its shapes and options in words.
        why: What is wrong with the result; empty if nothing is.
    """

    seed: int
    sample: int
    what: str
    why: str = ""


@dataclass
class Row:
    """The samples of one operation in one check.

    Attributes:
        name: The operation.
        check: "float32", "float16" or "bfloat16" for values, the same with " vjp" for gradients, "exact" for
            operations without floats.
        attempted: The number of samples, those that are skipped included.
        passed: The number of samples within their tolerance.
        skipped: The number of samples that are not checked, by the reason.
        worst: The largest error, divided by its tolerance. Once a sample has failed: the largest of those that have.
        place: The sample that has this error.
        failures: The samples that have failed.
    """

    name: str
    check: str
    attempted: int = 0
    passed: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    worst: float = 0.0
    place: Place | None = None
    failures: list[Place] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether a sample failed, too many were skipped, or none was proven."""
        return bool(self.failures) or self.too_many_skipped or not self.passed

    @property
    def too_many_skipped(self) -> bool:
        """Whether more than 5 % of the samples are skipped."""
        return self.skips > _MOST_SKIPPED * self.attempted

    @property
    def skips(self) -> int:
        """The number of samples that are skipped."""
        return sum(self.skipped.values())

    def skip(self, reason: str) -> None:
        """Counts a sample that is not checked."""
        self.attempted += 1
        self.skipped[reason] = self.skipped.get(reason, 0) + 1

    def add(self, ratio: float, place: Place) -> None:
        """Counts a sample with its error, divided by its tolerance; it has failed if the place says why."""
        self.attempted += 1
        self.passed += not place.why
        if place.why:
            self.failures.append(place)
        worse = self.place is None or (bool(place.why), ratio) > (bool(self.place.why), self.worst)
        if worse:
            self.worst, self.place = ratio, place


@dataclass(frozen=True)
class Report:
    """What `run` returns.

    Attributes:
        rows: One for each operation and check.
        device: The device that computed, "cpu" or "gpu" and its name.
        versions: Of this package, MLX and NumPy.
        seeds: What the samples were drawn from.
        seconds: How long it took.
    """

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
        """Fixed columns: a line for each row, then the reasons for skips, the failures and a summary.

        The column "error" is the largest error divided by its tolerance, so that up to 1 passes.
        """
        heads = ("name", "check", "attempted", "passed", "skipped", "error", "sample of the largest error")
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
        """One line: how many checks passed, the largest error, the device and the versions."""
        attempted, passed = sum(row.attempted for row in self.rows), sum(row.passed for row in self.rows)
        skipped = sum(row.skips for row in self.rows)
        verdict = "FAILED" if self.failed else "passed"
        worst = max((row.worst for row in self.rows if row.failed == self.failed), default=0.0)
        on = ", ".join([self.device, *(f"{name} {version}" for name, version in self.versions.items())])
        return (
            f"{verdict}: {passed} of {attempted} checks, {skipped} skipped, "
            f"largest error: {_number(worst)} of its tolerance; "
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
                what = f"{row.place.what}: {row.place.why}"
                lines.append(f"FAILED   {row.name} {row.check}: {count}, largest error at {at}, {what}")
            elif row.failed:
                why = "over 5 % of its samples are skipped" if row.too_many_skipped else "nothing was proven"
                lines.append(f"FAILED   {row.name} {row.check}: {why}")
        return lines

    def to_json(self) -> str:
        """Everything, failures in full. An infinite error is the string "inf"."""
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
