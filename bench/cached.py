"""What a cache saves: generation with and without one, by length and by heads, and how far their logits are apart.

    python bench/cached.py [--lengths 16,128,512,2048] [--rounds N] [--patience S] [--json FILE]

Two layers of width 64, eight query heads, random weights; the tokens are given, so that both see the same. Without a
cache every step computes everything before it again; beyond 128 tokens every 32nd of these steps is measured and stands
for its neighbours. Prints a table, appends JSON lines to results/cached.jsonl and renews its part of README.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from cases.common import set_weights
from harness import BENCH, RESULTS, add_json, add_patience, origin, settle
from report import append, fill, provenance

import mlx_xformer
from mlx_xformer.backend import device
from mlx_xformer.models.causal_lm.model import CausalLM, CausalLMConfig

mx = device.mx
KINDS = {"MHA": 8, "GQA": 2, "MQA": 1}  # key/value heads
STRIDE = 32


def model_of(kv_heads: int) -> CausalLM:
    """With matrices of unit gain."""
    config = CausalLMConfig(
        vocab_size=256, embed_dim=64, num_layers=2, num_heads=8, num_kv_heads=kv_heads, hidden_dim=192
    )
    model = CausalLM(config)
    set_weights(model)
    return model


def sampled(length: int) -> range:
    """The steps without a cache that are measured: how many tokens each computes."""
    return range(1, length + 1) if length <= 128 else range(STRIDE // 2, length + 1, STRIDE)


def with_cache(model: CausalLM, tokens: Any) -> tuple[float, dict[int, np.ndarray]]:
    """Seconds, and the logits of the sampled steps."""
    caches, wanted, found = model.make_caches(), set(sampled(tokens.shape[1])), {}
    start = time.perf_counter()
    for n in range(1, tokens.shape[1] + 1):
        logits = model(tokens[:, n - 1 : n], caches=caches, last=1)
        mx.eval(logits)
        if n in wanted:
            found[n] = logits
    seconds = time.perf_counter() - start
    return seconds, {n: np.array(logits) for n, logits in found.items()}


def without_cache(model: CausalLM, tokens: Any) -> tuple[float, dict[int, np.ndarray]]:
    """Seconds of all steps by the sampled ones, and their logits."""
    found, steps = {}, sampled(tokens.shape[1])
    start = time.perf_counter()
    for n in steps:
        found[n] = model(tokens[:, :n], last=1)
        mx.eval(found[n])
    seconds = time.perf_counter() - start
    return seconds * tokens.shape[1] / len(steps), {n: np.array(logits) for n, logits in found.items()}


def measure(lengths: list[int], rounds: int, patience: float) -> Iterator[dict[str, Any]]:
    """One record for each kind and length: medians over the rounds, the two taken in turns. patience: see settle."""
    for kind, heads in KINDS.items():
        model = model_of(heads)
        for length in lengths:
            tokens = mx.array(np.random.default_rng(length).integers(0, 256, (1, length)), mx.int32)
            with_cache(model, tokens[:, :16])
            without_cache(model, tokens[:, :16])
            cached, uncached, error = [], [], 0.0
            for _ in range(rounds):
                settle(patience)
                seconds, ours = with_cache(model, tokens)
                cached.append(seconds)
                seconds, plain = without_cache(model, tokens)
                uncached.append(seconds)
                error = max(float(np.abs(ours[n] - plain[n]).max() / np.abs(plain[n]).max()) for n in plain)
            yield {
                "kind": kind,
                "length": length,
                "cached_s": statistics.median(cached),
                "uncached_s": statistics.median(uncached),
                "error": error,
                "steps": len(sampled(length)),
                "rounds": rounds,
            }


def table(found: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    lines = ["| heads | N | with a cache | without | times as fast | largest error of a logit |", "|" + "---|" * 6]
    for r in found:
        faster = r["uncached_s"] / r["cached_s"]
        steps = "" if r["steps"] == r["length"] else f" (of {r['steps']} steps)"
        lines.append(
            f"| {r['kind']} | {r['length']} | {r['cached_s']:.3f} s | {r['uncached_s']:.3f} s{steps} | {faster:.1f} |"
            f" {r['error']:.1e} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="16,128,512,2048")
    parser.add_argument("--rounds", type=int, default=3)
    add_patience(parser)
    add_json(parser)
    options = parser.parse_args()
    found = list(measure([int(n) for n in options.lengths.split(",")], options.rounds, options.patience))
    shared = {
        **origin("cached"),
        "versions": {"mlx": mx.__version__, "mlx-xformer": mlx_xformer.__version__},
        "blas": device.blas,
        "threads": device.workers,
    }
    append(options.json or RESULTS / "cached.jsonl", [{**shared, **record} for record in found])
    print(table(found))
    if options.json is None:
        line = provenance(shared, f"{shared['threads']} threads; {options.rounds} rounds")
        fill(BENCH / "README.md", "cached", f"{table(found)}\n\n{line}")


if __name__ == "__main__":
    main()
