"""What the benchmarks share: cases in processes of their own that are measured in turns, and the records of a run.

Times are medians over the rounds after a first run in each process. Only figures of one run are comparable.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

from report import Record, append, renew, table

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
RESULTS = BENCH / "results"
SETTLE = 0.3  # seconds between runs: threads of the case before may still spin
QUIET = 0.1  # cores busy with other programs that a run may begin with
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """How a suite is run.

    Args:
        words: only cases whose names hold one of these are measured; "" is in every name.
        rounds: how often each case runs after its first run.
        threads: of the BLAS of every process.
        patience: seconds to wait for a quiet machine before each run.
        json: the file to append the records to, instead of results/ and the tables of README.md.
    """

    words: Sequence[str] = ("",)
    rounds: int = 5
    threads: int = 1
    patience: float = 15
    json: Path | None = None

    def wants(self, name: str) -> bool:
        """Whether the case of this name is measured."""
        return any(word in name for word in self.words)

    def choose(self, known: Mapping[str, T]) -> dict[str, T]:
        """Those of `known` that are measured. SystemExit if there are none."""
        chosen = {name: value for name, value in known.items() if self.wants(name)}
        if not chosen:
            raise SystemExit(f"--cases must match some of {', '.join(known)}, got {','.join(self.words)}")
        return chosen


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds the option --json."""
    text = "append JSON lines to FILE, and leave results/ and README.md as they are"
    parser.add_argument("--json", type=Path, metavar="FILE", help=text)


def add_patience(parser: argparse.ArgumentParser) -> None:
    """Adds the option --patience."""
    text = "seconds to wait for a quiet machine before each run (default 15)"
    parser.add_argument("--patience", type=float, default=15, help=text)


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Adds the option --threads."""
    default = min(os.cpu_count() or 1, 4)
    parser.add_argument("--threads", type=int, default=default, help=f"of each process (default {default})")


@dataclass(frozen=True)
class Case:
    """A function of a module of cases/, and the process that runs it.

    Args:
        name: as the tables show it.
        module: of cases/.
        function: takes the folder, returns what worker.py needs.
        python: the Python that runs it.
        checkout: the clone whose mlx_xformer the process imports; None: the process needs none.
        folder: given to the function instead of the folder of all cases.
        environment: further variables of the process.
    """

    name: str
    module: str
    function: str
    python: str = sys.executable
    checkout: Path | None = ROOT
    folder: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)


class Worker:
    """A case's process. `facts` is what it tells when it is ready, `rounds` what it tells of each run."""

    def __init__(self, case: Case, folder: Path, threads: int):
        self.case = case
        self.rounds: list[Record] = []
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "BENCH_THREADS")
        kept = {key: value for key, value in os.environ.items() if key not in ("LD_PRELOAD", "PYTHONPATH")}
        checkout = case.checkout and dict.fromkeys(("PYTHONPATH", "BENCH_CHECKOUT"), str(case.checkout))
        self._child = subprocess.Popen(
            [case.python, str(BENCH / "worker.py"), case.module, case.function, str(case.folder or folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**kept, **dict.fromkeys(names, str(threads)), **(checkout or {}), **case.environment},
        )
        self.facts = self._read()

    def _read(self) -> Record:
        assert self._child.stdout
        line = self._child.stdout.readline()
        if not line:
            raise SystemExit(f"{self.case.name} ended with exit code {self._child.wait()}")
        return json.loads(line)

    def run(self) -> None:
        """One repetition; also notes how many cores other programs kept busy meanwhile (Linux)."""
        assert self._child.stdin
        busy = busy_seconds()
        self._child.stdin.write("run\n")
        self._child.stdin.flush()
        found = self._read()
        if busy is not None:
            others = (busy_seconds() or 0.0) - busy - found["cpu_s"]
            found["others"] = round(max(0.0, others / found["wall_s"]), 2)
        self.rounds.append(found)

    def close(self) -> None:
        """Lets the process end."""
        assert self._child.stdin and self._child.stdout
        self._child.stdin.close()
        self._child.wait()
        self._child.stdout.close()


def busy_seconds() -> float | None:
    """CPU-seconds that the whole machine has worked since it started; None where that is not told."""
    if sys.platform != "linux":
        return None
    user, nice, system = Path("/proc/stat").read_text().split(maxsplit=4)[1:4]
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def settle(patience: float) -> None:
    """Waits until other programs are quiet, `patience` seconds at most (Linux)."""
    limit = time.monotonic() + patience
    while True:
        before, start = busy_seconds(), time.monotonic()
        time.sleep(SETTLE)
        after, now = busy_seconds(), time.monotonic()
        if before is None or after is None or (after - before) / (now - start) <= QUIET or now > limit:
            return


def measure(cases: Sequence[Case], folder: Path, settings: Settings) -> list[Record]:
    """Starts every case, then takes them in turns. Returns a record a case; the first case's median is ratio 1."""
    workers: list[Worker] = []
    try:
        for case in cases:
            workers.append(Worker(case, folder, settings.threads))
            facts = workers[-1].facts
            print(f"  {case.name}: ready, first run {facts['first_s']:.2f} s, {facts['blas']}", flush=True)
        for index in range(settings.rounds):
            for worker in workers[:: -1 if index % 2 else 1]:  # there and back: no case always follows the same one
                settle(settings.patience)
                worker.run()
            print(f"  round {index + 1} of {settings.rounds}", flush=True)
    finally:
        for worker in workers:
            worker.close()
    base = statistics.median(r["wall_s"] for r in workers[0].rounds)
    return [{"base": cases[0].name, **_record(worker, base)} for worker in workers]


def _record(worker: Worker, base: float) -> Record:
    """What is kept of a case's rounds. base: the median wall time that is ratio 1."""
    columns = {key: [r.get(key) for r in worker.rounds] for key in ("wall_s", "cpu_s", "kernel_s", "others")}
    wall, cpu, kernel = (statistics.median(columns[key]) for key in ("wall_s", "cpu_s", "kernel_s"))
    last = worker.rounds[-1]
    return {
        "case": worker.case.name,
        "wall_median_s": round(wall, 6),
        "cpu_median_s": round(cpu, 6),
        "kernel_median_s": round(kernel, 6),
        "ratio": round(wall / base, 4),
        "rounds": len(worker.rounds),
        "wall_s": columns["wall_s"],
        "cpu_s": columns["cpu_s"],
        "others": columns["others"],
        "rss_mib": round(last["rss_mib"]),
        "framework_mib": last["framework_mib"] and round(last["framework_mib"], 2),
        **worker.facts,
    }


def machine() -> dict[str, Any]:
    """What the figures were measured on, without names of hosts."""
    model = platform.processor() or platform.machine()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    elif sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        model = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    system = f"{platform.system()} {platform.machine()}"
    return {"cpu": model, "cores": os.cpu_count(), "memory_gib": round(memory), "system": system}


def commit(checkout: Path = ROOT) -> str | None:
    """The commit of a clone, with a + where it has changes; None outside git or before the first commit."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=checkout, capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    return head and head + ("+" if git("status", "--porcelain") else "")


def origin(suite: str) -> Record:
    """What all records of a run have in common: when, of which commit and on which machine."""
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"suite": suite, "date": now, "commit": commit(), "machine": machine(), "whole": False}


def finish(suite: str, found: Sequence[Record], settings: Settings) -> None:
    """Prints the table. Appends the records to settings.json, or to results/SUITE.jsonl and renews README.md, which
    shows runs of all cases only."""
    shared = {**origin(suite), "whole": list(settings.words) == [""]}
    append(settings.json or RESULTS / f"{suite}.jsonl", [{**shared, **record} for record in found])
    if settings.json is None:
        renew(BENCH / "README.md", RESULTS)
    print(table(found))
