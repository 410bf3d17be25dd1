"""The bench runner: cases in processes of their own, taken in turns; prints a table and appends JSON lines.

    python bench/run.py [--cases gelu,attention] [--rounds N]     our hot parts against the plain forms
    python bench/run.py --peers [--cases demucs-mlx]              one segment against other programs
    python bench/run.py --attention                               windows, causal, the module, against the plain forms
    python bench/run.py --bag                                     one stem of a bag against a single model
    python bench/run.py --cache [--cases append]                  appends at 1k and 4k; 8 bits against float16 at 8k
    python bench/run.py --language [--cases decode]               generation by a Llama against mlx-lm
    python bench/run.py --mixture [--cases training]              a mixture of experts against mlx-lm, a dense network
    python bench/run.py --pages                                   the report page against the separation of 30 s
    python bench/run.py --seq2seq                                 64 tokens of an encoder-decoder by what it keeps

Times are medians over the rounds after a warm-up run in each process. Only figures of one run are comparable.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
from pathlib import Path

from harness import Case, Settings, add_json, add_patience, add_threads, finish, measure

OPTIONS = {  # suite: (rounds, help)
    "attention": (15, "attention against the plain forms"),
    "bag": (5, "one stem of a bag against a single model"),
    "cache": (5, "one layer's cache: appends, and 8 bits against float16"),
    "language": (5, "generation by a random Llama against mlx-lm"),
    "mixture": (15, "a mixture of experts against mlx-lm"),
    "pages": (3, "the report page against the separation of 30 s"),
    "peers": (5, "a whole segment against PyTorch demucs and demucs-mlx"),
    "seq2seq": (5, "an encoder-decoder with caches and without"),
}


def run_pairs(suite: str, settings: Settings) -> None:
    """Measures the chosen pairs of cases/SUITE.py."""
    found = []
    for part, (plain, ours) in settings.choose(importlib.import_module(f"cases.{suite}").PAIRS).items():
        print(f"{part}:")
        cases = [Case(f"{part}, plain", suite, plain), Case(f"{part}, ours", suite, ours)]
        with tempfile.TemporaryDirectory() as folder:
            found += measure(cases, Path(folder), settings)
    finish(suite, found, settings)


def run_bag(settings: Settings) -> None:
    """Measures one stem of a bag of four against a single model, both through separate()."""
    cases = [Case("htdemucs, all stems", "bag", "single"), Case("htdemucs_ft, one stem", "bag", "one_of_four")]
    with tempfile.TemporaryDirectory() as folder:
        finish("bag", measure(cases, Path(folder), settings), settings)


def run_cache(settings: Settings) -> None:
    """Measures the chosen pairs of cases/cache.py, and notes what each cache holds."""
    from cases.cache import PAIRS, held_bytes

    found = []
    for part, pair in settings.choose(PAIRS).items():
        print(f"{part}:")
        cases = [Case(name.replace("_", " "), "cache", name) for name in pair]
        with tempfile.TemporaryDirectory() as folder:
            records = measure(cases, Path(folder), settings)
        found += [{**r, "cache_mib": held_bytes(name) / 2**20} for name, r in zip(pair, records, strict=True)]
    finish("cache", found, settings)


def run_pages(settings: Settings) -> None:
    """Measures the report page of 30 seconds of audio, and the separations that it follows."""
    from cases.pages import CASES

    with tempfile.TemporaryDirectory() as folder:
        cases = []
        for name, function in settings.choose(CASES).items():
            own = Path(folder) / function
            own.mkdir()
            cases.append(Case(name, "pages", function, folder=own))
        finish("pages", measure(cases, Path(folder), settings), settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    suites = parser.add_mutually_exclusive_group()
    for name, (rounds, text) in OPTIONS.items():
        suites.add_argument(
            f"--{name}", action="store_const", dest="suite", const=name, help=f"{text}, {rounds} rounds"
        )
    parser.add_argument("--cases", default="", help="only cases whose names hold one of these words, comma-separated")
    parser.add_argument("--rounds", type=int, help="how often each case runs")
    add_threads(parser)
    add_patience(parser)
    add_json(parser)
    options = parser.parse_args()
    suite = options.suite or "parts"
    rounds = options.rounds or OPTIONS.get(suite, (5, ""))[0]
    settings = Settings(options.cases.split(","), rounds, options.threads, options.patience, options.json)
    if suite in ("parts", "attention"):
        run_pairs(suite, settings)
    elif suite == "bag":
        run_bag(settings)
    elif suite == "pages":
        run_pages(settings)
    elif suite == "cache":
        run_cache(settings)
    else:
        importlib.import_module(suite).run(settings)


if __name__ == "__main__":
    main()
