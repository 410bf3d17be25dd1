"""The bench runner: cases in processes of their own, taken in turns; prints a table and appends JSON lines.

    python bench/run.py [--cases gelu,attention] [--rounds N]     our hot parts against the plain forms
    python bench/run.py --peers [--cases demucs-mlx]              one segment against other programs
    python bench/run.py --attention                               windows, causal, the module, against the plain forms
    python bench/run.py --bag                                     one stem of a bag against a single model
    python bench/run.py --cache [--cases append]                  appends at 1k and 4k; 8 bits against float16 at 8k
    python bench/run.py --language [--cases decode]               generation by a Llama against mlx-lm
    python bench/run.py --mixture [--cases training]              a mixture of experts against mlx-lm, a dense network
    python bench/run.py --seq2seq                                 64 tokens of an encoder-decoder by what it keeps

Times are medians over the rounds after a warm-up run in each process. Only figures of one run are comparable.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from report import append, renew, table

BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results"
SETTLE = 0.3  # seconds between runs: threads of the case before may still spin
QUIET = 0.1  # cores busy with other programs that a run may begin with


@dataclass(frozen=True)
class Case:
    """A function of a file under cases/, and the Python that runs it."""

    name: str
    file: str
    function: str
    python: str = sys.executable
    environment: dict[str, str] = field(default_factory=dict)


class Worker:
    """A case's process."""

    def __init__(self, case: Case, folder: Path, threads: int):
        self.case = case
        self.rounds: list[dict[str, Any]] = []
        count = str(threads)
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "BENCH_THREADS")
        kept = {key: value for key, value in os.environ.items() if key not in ("LD_PRELOAD", "PYTHONPATH")}
        self._child = subprocess.Popen(
            [case.python, str(BENCH / "worker.py"), case.file, case.function, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**kept, **dict.fromkeys(names, count), **case.environment},
        )
        self.facts = self._read()

    def _read(self) -> dict[str, Any]:
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


def commit() -> str | None:
    """The commit of the tree, with a + where it has changes; None outside git or before the first commit."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=BENCH, capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    return head and head + ("+" if git("status", "--porcelain") else "")


def measure(cases: Sequence[Case], folder: Path, rounds: int, threads: int, patience: float) -> list[Worker]:
    """Starts every case, then takes them in turns, `rounds` times. `patience`: see settle."""
    workers: list[Worker] = []
    try:
        for case in cases:
            workers.append(Worker(case, folder, threads))
            facts = workers[-1].facts
            print(f"  {case.name}: ready, first run {facts['first_s']:.2f} s, {facts['blas']}", flush=True)
        for index in range(rounds):
            for worker in workers:
                settle(patience)
                worker.run()
            print(f"  round {index + 1} of {rounds}", flush=True)
    finally:
        for worker in workers:
            worker.close()
    return workers


def records(workers: Sequence[Worker], base: str) -> list[dict[str, Any]]:
    """One JSON-able record a case. `base`: the case whose median wall time is ratio 1."""
    medians = {w.case.name: statistics.median(r["wall_s"] for r in w.rounds) for w in workers}
    return [
        {
            "case": worker.case.name,
            "base": base,
            "wall_median_s": round(medians[worker.case.name], 6),
            "cpu_median_s": round(statistics.median(r["cpu_s"] for r in worker.rounds), 6),
            "kernel_median_s": round(statistics.median(r["kernel_s"] for r in worker.rounds), 6),
            "ratio": round(medians[worker.case.name] / medians[base], 4),
            "rounds": len(worker.rounds),
            "wall_s": [r["wall_s"] for r in worker.rounds],
            "cpu_s": [r["cpu_s"] for r in worker.rounds],
            "others": [r.get("others") for r in worker.rounds],
            "rss_mib": round(worker.rounds[-1]["rss_mib"]),
            "framework_mib": worker.rounds[-1]["framework_mib"] and round(worker.rounds[-1]["framework_mib"]),
            **worker.facts,
        }
        for worker in workers
    ]


def finish(suite: str, found: Sequence[dict[str, Any]], wanted: Sequence[str]) -> None:
    """Appends the records to results/SUITE.jsonl, renews README.md (from whole runs) and prints the table."""
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    shared: dict[str, Any] = {
        "suite": suite,
        "date": now,
        "commit": commit(),
        "machine": machine(),
    }
    shared["whole"] = list(wanted) == [""]
    append(RESULTS / f"{suite}.jsonl", [{**shared, **record} for record in found])
    renew(BENCH / "README.md", RESULTS)
    print(table(found))


def pairs(suite: str, wanted: Sequence[str], rounds: int, threads: int, patience: float) -> None:
    """Measures the pairs of cases/SUITE.py whose names hold one of the words `wanted`."""
    sys.path.insert(0, str(BENCH / "cases"))
    known = importlib.import_module(suite).PAIRS
    chosen = {part: pair for part, pair in known.items() if any(word in part for word in wanted)}
    if not chosen:
        raise SystemExit(f"--cases must match some of {', '.join(known)}, got {','.join(wanted)}")
    found = []
    for part, (plain, ours) in chosen.items():
        print(f"{part}:")
        cases = [
            Case(f"{part}, plain", f"cases/{suite}.py", plain),
            Case(f"{part}, ours", f"cases/{suite}.py", ours),
        ]
        with tempfile.TemporaryDirectory() as folder:
            found += records(measure(cases, Path(folder), rounds, threads, patience), cases[0].name)
    finish(suite, found, wanted)


def bag(wanted: Sequence[str], rounds: int, threads: int, patience: float) -> None:
    """Measures one stem of a bag of four against a single model, both through separate()."""
    cases = [
        Case("htdemucs, all stems", "cases/bag.py", "single"),
        Case("htdemucs_ft, one stem", "cases/bag.py", "one_of_four"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        found = records(measure(cases, Path(folder), rounds, threads, patience), cases[0].name)
    finish("bag", found, wanted)


def cache(wanted: Sequence[str], rounds: int, threads: int, patience: float) -> None:
    """Measures the pairs of cases/cache.py whose names hold one of the words `wanted`."""
    sys.path.insert(0, str(BENCH / "cases"))
    from cache import CONTEXT, KV_HEADS, PAIRS, WIDTH, mx

    from mlx_xformer.nn.cache import cache_bytes

    sizes = {"num_kv_heads": KV_HEADS, "head_dim": WIDTH}
    held = {
        "append_at_1k": cache_bytes(1024 + 256, **sizes),
        "append_at_4k": cache_bytes(4096 + 256, **sizes),
        "float16": cache_bytes(CONTEXT, **sizes, dtype=mx.float16),
        "8_bits": cache_bytes(CONTEXT, **sizes, dtype=mx.float16, bits=8),
    }
    found = []
    for part, pair in PAIRS.items():
        if not any(word in part for word in wanted):
            continue
        print(f"{part}:")
        cases = [Case(name.replace("_", " "), "cases/cache.py", name) for name in pair]
        with tempfile.TemporaryDirectory() as folder:
            workers = measure(cases, Path(folder), rounds, threads, patience)
        for name, worker, record in zip(pair, workers, records(workers, cases[0].name), strict=True):
            size = next(size for ending, size in held.items() if name.endswith(ending))
            peak = round(worker.rounds[-1]["framework_mib"], 2)
            found.append({**record, "cache_mib": size / 2**20, "framework_mib": peak})
    finish("cache", found, wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peers", action="store_true", help="a whole segment against PyTorch demucs and demucs-mlx")
    parser.add_argument("--attention", action="store_true", help="attention against the plain forms, 15 rounds")
    parser.add_argument("--bag", action="store_true", help="one stem of a bag against a single model")
    parser.add_argument("--cache", action="store_true", help="one layer's cache: appends, and 8 bits against float16")
    parser.add_argument("--language", action="store_true", help="generation by a random Llama against mlx-lm")
    parser.add_argument("--mixture", action="store_true", help="a mixture of experts against mlx-lm, 15 rounds")
    parser.add_argument("--seq2seq", action="store_true", help="an encoder-decoder with caches and without")
    parser.add_argument("--cases", default="", help="only cases whose names hold one of these words, comma-separated")
    parser.add_argument("--rounds", type=int, help="by default 5, or 15 of attention and mixtures")
    parser.add_argument("--threads", type=int, default=min(os.cpu_count() or 1, 4))
    parser.add_argument(
        "--patience", type=float, default=15, help="seconds to wait for a quiet machine before each run"
    )
    options = parser.parse_args()
    suite = partial(pairs, "parts")
    if options.peers:
        from peers import compare as suite
    elif options.language:
        from support.language import compare as suite
    elif options.mixture:
        from mixture import compare as suite
    elif options.seq2seq:
        from seq2seq import compare as suite
    elif options.attention:
        suite = partial(pairs, "attention")
    elif options.bag or options.cache:
        suite = bag if options.bag else cache
    rounds = options.rounds or (15 if options.attention or options.mixture else 5)
    suite(options.cases.split(","), rounds, options.threads, options.patience)


if __name__ == "__main__":
    sys.modules["run"] = sys.modules["__main__"]  # what peers.py imports
    main()
