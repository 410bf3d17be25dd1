"""Compares the speed of this checkout with that of another one of this project, in processes that take turns.

    python bench/compare.py OTHER_CHECKOUT [--rounds 9] [--case NAME ...] [--python PYTHON] [--other-python PYTHON]

Cases: segment (one of the official htdemucs), decode (64 tokens of a Llama in float32 after a prompt of 64, three
times) and translate (64 tokens of an encoder-decoder with its caches, five times). Weights are random, and the same in
both. A round runs the case once in each checkout; "paired" is the median of the rounds' ratios, which suffers least
from other programs. Prints a table and whether the outputs are equal, and appends JSON lines to results/compare.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from harness import RESULTS, ROOT, Case, Record, Settings, add_json, add_patience, add_threads, commit, measure, origin
from language import write_llama
from report import append, provenance

CASES = ("segment", "decode", "translate")  # functions of cases/checkouts.py


def compare_outputs(a: np.ndarray, b: np.ndarray) -> str:
    """In words."""
    if np.array_equal(a, b):
        return "equal"
    if np.issubdtype(a.dtype, np.integer):
        return f"{int((a != b).sum())} of {a.size} tokens differ"
    return f"largest difference {np.abs(a - b).max():.1e} of {np.abs(a).max():.1e}"


def measure_case(name: str, sides: dict[str, tuple[Path, str]], folder: Path, settings: Settings) -> Record:
    """A record of a case. sides: "other" and "this", each a checkout and its Python."""
    cases = []
    for side, (checkout, python) in sides.items():
        own = folder / name / side
        own.mkdir(parents=True)
        cases.append(Case(f"{name}, {side}", "checkouts", name, python=python, checkout=checkout, folder=own))
    if name == "decode":
        write_llama(folder / name / "llama")
    other, this = measure(cases, folder, settings)
    pairs = zip(this["wall_s"], other["wall_s"], strict=True)
    outputs = [np.load(folder / name / side / f"{name}.npy") for side in sides]
    return {
        **{key: value for key, value in this.items() if key != "base"},
        "case": name,
        "paired_ratio": round(statistics.median(a / b for a, b in pairs), 4),
        "cpu_ratio": round(this["cpu_median_s"] / other["cpu_median_s"], 4),
        "outputs": compare_outputs(*outputs),
        "other": {key: other[key] for key in ("wall_median_s", "cpu_median_s", "wall_s", "cpu_s", "others", "rss_mib")},
        "other_commit": commit(sides["other"][0]),
    }


def table(found: list[Record]) -> str:
    """A Markdown table; ratios are this / other."""
    names = "case", "other", "this", "ratio", "paired", "CPU-seconds", "speed", "outputs"
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for r in found:
        seconds = f"{r['other']['wall_median_s']:.4f} s | {r['wall_median_s']:.4f} s"
        ratios = f"{r['ratio']:.3f} | {r['paired_ratio']:.3f} | {r['cpu_ratio']:.3f} | {1 / r['paired_ratio']:.3f}"
        lines.append(f"| {r['case']} | {seconds} | {ratios} | {r['outputs']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, metavar="OTHER_CHECKOUT", help="a clone of another commit")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--case", nargs="+", choices=CASES, default=CASES, help="which cases (default: all)")
    parser.add_argument("--python", default=sys.executable, help="of this checkout (default: the one that runs this)")
    parser.add_argument("--other-python", help="of the other checkout (default: its .venv/bin/python, or --python)")
    add_threads(parser)
    add_patience(parser)
    add_json(parser)
    options = parser.parse_args()
    other = options.other.resolve()
    if not (other / "mlx_xformer").is_dir():
        parser.error(f"{options.other} must be a clone of this project, got no folder mlx_xformer in it")
    if other == ROOT:
        parser.error(f"OTHER_CHECKOUT must be another clone than {ROOT}")
    own = other / ".venv" / "bin" / "python"
    other_python = options.other_python or (str(own) if own.exists() else options.python)
    sides = {"other": (other, other_python), "this": (ROOT, options.python)}
    settings = Settings(rounds=options.rounds, threads=options.threads, patience=options.patience)
    shared, found = origin("compare"), []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.case:
            print(f"{name}:")
            found.append({**shared, **measure_case(name, sides, Path(folder), settings)})
            append(options.json or RESULTS / "compare.jsonl", found[-1:])
    print(table(found))
    setting = f"{options.threads} threads; {options.rounds} rounds; other commit {found[0]['other_commit']}"
    print(f"\nratios are this / other, speed is 1 / paired; {provenance(found[0], setting)}")


if __name__ == "__main__":
    main()
