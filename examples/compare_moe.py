"""Trains mixtures with the balance loss and without, and compares how much each expert is used:
python examples/compare_moe.py OUT [--seeds 0,1,2] writes OUT/table.md, OUT/load.png and OUT/loss.png. The plots need
matplotlib: pip install "mlx-xformer[plots]". Ctrl-C stops, and the same command continues."""

import argparse
import os
import sys
from datetime import datetime, timezone
from pathlib import Path

from train_moe import ALPHA, BOOK, train  # isort: skip (imports mlx_xformer, which must come before MLX)

import numpy as np

from mlx_xformer import __version__
from mlx_xformer.backend import device

NAMES = {ALPHA: "with the balance loss", 0.0: "without"}


def worst(record: dict) -> str:
    """The largest imbalance, and its layer."""
    found = max(record["imbalance"])
    return f"{found:.2f} (layer {record['imbalance'].index(found)})"


def table(records: dict[tuple[float, int], dict], seeds: list[int]) -> str:
    """A Markdown table with a row for each seed."""
    lines = [
        "| seed | imbalance with | without | held-out loss with | without | seconds with | without |",
        "|---" * 7 + "|",
    ]
    for seed in seeds:
        pair = [records[alpha, seed] for alpha in NAMES]
        cells = [str(seed), *map(worst, pair)]
        cells += [f"{record['held_out']:.3f}" for record in pair] + [f"{record['seconds']:.0f}" for record in pair]
        lines.append(f"| {' | '.join(cells)} |")
    now, host = datetime.now(timezone.utc), device.report()
    lines += [
        "",
        f"{host.name}, {os.cpu_count()} cores; {now:%Y-%m-%d}; mlx {host.mlx}, mlx-xformer {__version__}; {host.blas}.",
    ]
    return "\n".join(lines) + "\n"


def plot_load(records: dict[tuple[float, int], dict], seed: int, path: Path) -> None:
    """Plots each expert's share of the tokens during training: a row with the loss and one without, a column for each
    layer."""
    import matplotlib.pyplot as plt

    layers = len(records[ALPHA, seed]["imbalance"])
    figure, grid = plt.subplots(2, layers, figsize=(9, 4.5), sharex=True, sharey=True, layout="constrained")
    for (alpha, name), row in zip(NAMES.items(), grid, strict=True):
        load = np.array(records[alpha, seed]["load"], float)  # (steps, layers, E)
        size = max(1, len(load) // 100)
        load = load[: len(load) // size * size].reshape(-1, size, *load.shape[1:]).mean(axis=1)
        for layer, axes in enumerate(row):
            share = load[:, layer] / load[:, layer].sum(axis=-1, keepdims=True)
            axes.stackplot(np.arange(len(share)) * size, share.T, colors=plt.get_cmap("tab10").colors, linewidth=0)
            axes.set(title=f"layer {layer}, {name}", ylim=(0, 1), xlim=(0, (len(share) - 1) * size or 1))
    grid[0, 0].set_ylabel("share of the tokens")
    grid[1, 0].set_ylabel("share of the tokens")
    figure.supxlabel(f"step (seed {seed}; a colour for each expert)")
    figure.savefig(path, dpi=90)


def plot_loss(records: dict[tuple[float, int], dict], path: Path) -> None:
    """Plots the cross-entropy of every run during training, averaged over 20 steps."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for (alpha, seed), record in records.items():
        size = min(20, len(record["loss"]))
        smooth = np.convolve(record["loss"], np.ones(size) / size, "valid")
        label = NAMES[alpha] if seed == min(s for _, s in records) else None
        axes.plot(np.arange(len(smooth)) + size, smooth, color="C0" if alpha else "C1", linewidth=1, label=label)
    axes.set(xlabel="step", ylabel="loss in training, nats a byte")
    axes.legend()
    figure.savefig(path, dpi=90)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], help="numbers, separated by commas")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--text", type=Path, default=BOOK)
    options = parser.parse_args()
    try:
        import matplotlib

        matplotlib.use("agg")
        records = {}
        for seed in options.seeds:
            for alpha, name in zip(NAMES, ("with", "without"), strict=True):
                folder = options.out / f"{name}-{seed}"
                records[alpha, seed] = train(folder, options.text, alpha, seed, options.steps)
        text = table(records, options.seeds)
        (options.out / "table.md").write_text(text, "utf-8")
        plot_load(records, options.seeds[0], options.out / "load.png")
        plot_loss(records, options.out / "loss.png")
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"compare_moe.py: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: run the same command again to continue")
    print(text, end="")


if __name__ == "__main__":
    main()
