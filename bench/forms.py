"""The forms of a mixture's products by size, from which layout() and block_rows() choose: CPU-seconds of each.

    python bench/forms.py [--rounds N] [--json FILE]

Prints a Markdown table, a row for each size, the form that would be chosen in bold. "8" to "64" are blocks of so many
rows. CPU-seconds, as other programs stretch those less than wall time; medians, the forms of a row in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from harness import add_json, origin
from report import Record, append

from mlx_xformer.backend import device
from mlx_xformer.nn.moe import MoE, MoEConfig
from mlx_xformer.nn.moe import layer as moe

# isort: split
import mlx.nn as nn  # after mlx_xformer, which chooses the BLAS

mx = device.mx
MODELS = {
    (256, 512, 8, 2): (1, 4, 8, 16, 32, 128, 512),
    (256, 128, 64, 8): (4, 8, 16, 128),
    (1024, 2048, 8, 2): (4, 8, 32),
}
FORMS = ("gather", "dispatch", "8", "16", "32", "64")
MOST = 5  # rows that a form may have for one of the choices


@contextmanager
def forced(form: str) -> Iterator[None]:
    """Lets a form be chosen, whatever the size."""
    before = moe.layout, moe.block_rows
    blocks = form.isdigit()
    moe.layout = lambda *_, **__: "blocks" if blocks else form  # type: ignore[assignment]
    moe.block_rows = lambda *_: int(form) if blocks else 1  # type: ignore[assignment]
    try:
        yield
    finally:
        moe.layout, moe.block_rows = before


def medians(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """CPU-seconds by name, after a run to warm up."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds + 1):
        for name, run in runs.items():
            before = time.process_time()
            run()
            if index:
                found[name].append(time.process_time() - before)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def run_of(layer: Any, x: Any, form: str, train: bool) -> Callable[[], None]:
    """One pass in a form, or forward and backward."""
    step = nn.value_and_grad(layer, lambda x: (layer(x)[0] * x).sum())

    def run() -> None:
        with forced(form):
            mx.eval(step(x) if train else layer(x)[0])

    return run


def measure(layer: MoE, tokens: int, train: bool, rounds: int) -> Record:
    """CPU-seconds of the forms for a size, and which would be chosen."""
    config = layer.config
    choices = tokens * config.num_experts_per_tok
    groups = {form: int(form) for form in FORMS if form.isdigit()}
    rows = {form: moe.grouping.num_groups(choices, config.num_experts, size) * size for form, size in groups.items()}
    rows |= {"dispatch": config.num_experts * tokens, "gather": choices * (1 + 8 * (train or choices > 128))}
    x = mx.array(np.random.default_rng(0).standard_normal((tokens, config.embed_dim)).astype(np.float32))
    taken = [form for form in FORMS if rows[form] <= max(MOST * choices, 80)]
    found = medians({form: run_of(layer, x, form, train) for form in taken}, rounds)
    chosen = moe.layout(config, tokens, half=False, training=train)
    chosen = str(moe.block_rows(choices, config.num_experts)) if chosen == "blocks" else chosen
    sizes = [config.embed_dim, config.hidden_dim, config.num_experts, config.num_experts_per_tok]
    return {"sizes": sizes, "tokens": tokens, "training": train, "rounds": rounds, "chosen": chosen, "cpu_s": found}


def row(record: Record) -> str:
    """A line of the table."""
    found = record["cpu_s"]
    times = {form: f"{1000 * found[form]:.2f}" if form in found else "" for form in FORMS}
    times = {form: f"**{text}**" if form == record["chosen"] else text for form, text in times.items()}
    what = "training" if record["training"] else "inference"
    return f"| {', '.join(map(str, record['sizes']))} | {record['tokens']} | {what} | {' | '.join(times.values())} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    add_json(parser)
    options = parser.parse_args()
    shared = origin("forms")
    print(f"| D, H, E, k | tokens | | {' | '.join(FORMS)} |\n|{'---|' * (3 + len(FORMS))}")
    for sizes, lengths in MODELS.items():
        layer = MoE(MoEConfig(*sizes))
        mx.eval(layer.parameters())
        for train in (False, True):
            for tokens in lengths:
                if train and tokens < 32:
                    continue
                record = measure(layer, tokens, train, options.rounds)
                print(row(record), flush=True)
                if options.json is not None:
                    append(options.json, [{**shared, **record}])


if __name__ == "__main__":
    main()
