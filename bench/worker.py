"""One case in a process of its own: prepares it, then runs it once for each line on standard input.

    python bench/worker.py MODULE FUNCTION FOLDER

FUNCTION(FOLDER) of cases/MODULE.py returns a dict: run (a callable that computes and returns a NumPy array or None),
versions, blas, threads and, where there is one, peak (a callable: bytes of the framework's own peak). What the first
run returns is written to FOLDER/FUNCTION.npy. Standard library only: workers run in environments that differ. Answers
one JSON line each: ready, then one for each run.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import IO, Any


def usage() -> tuple[float, float, float]:
    """CPU-seconds of all threads, in programs and in the kernel, and peak resident MiB of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    scale = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return used.ru_utime, used.ru_stime, used.ru_maxrss / scale


def timed(run: Any) -> tuple[dict[str, float], Any]:
    """Wall and CPU seconds of one run, those in the kernel apart too, and what it returned."""
    (user, system, _), wall = usage(), time.perf_counter()
    output = run()
    wall = time.perf_counter() - wall
    user, system = usage()[0] - user, usage()[1] - system
    return {"wall_s": round(wall, 6), "cpu_s": round(user + system, 6), "kernel_s": round(system, 6)}, output


def main(module: str, function: str, folder: Path, answers: IO[str]) -> None:
    def answer(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    case = getattr(importlib.import_module(f"cases.{module}"), function)(folder)
    first, output = timed(case["run"])
    if output is not None:
        import numpy as np

        np.save(folder / f"{function}.npy", output)
        del output
    facts = {key: case[key] for key in ("versions", "blas", "threads")}
    answer({"first_s": first["wall_s"], "python": sys.version.split()[0], **facts})
    for _ in sys.stdin:
        seconds, _ = timed(case["run"])
        peak = case["peak"]() / 2**20 if "peak" in case else None
        answer({**seconds, "rss_mib": usage()[2], "framework_mib": peak})


if __name__ == "__main__":
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), channel)
