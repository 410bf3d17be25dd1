"""The training loop of the experiments: AdamW, a progress bar, checkpoints to continue from, a table and a plot.

The random numbers of a step depend on seed and step only, so that an interrupted run that is continued ends with the
same parameters as an uninterrupted one. Ctrl-C stops after the current step; the same command continues."""

from __future__ import annotations

import argparse
import json
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_xformer import __version__, backend  # isort: skip (must come before MLX)

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from tqdm import tqdm

EVERY = 100  # steps between two checkpoints
Batch = tuple[mx.array, ...]


@dataclass(frozen=True)
class Experiment:
    """What to train.

    make: makes a model with random weights. batch: draws the arrays of one step. loss: loss(model, *batch), to be
    minimised. limit: the loss on held-out data must be below it after `steps`. rate: the highest learning rate.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[np.random.Generator], Batch]
    loss: Callable[..., mx.array]
    steps: int
    limit: float
    rate: float = 3e-3


@dataclass
class Run:
    """A model and its optimizer, and the loss of every step so far."""

    model: nn.Module
    optimizer: optim.Optimizer
    losses: list[float]
    seconds: float = 0.0

    def save(self, path: Path, facts: dict[str, int]) -> None:
        """Saves everything in one file, which replaces the last one when it is complete."""
        parts = {"model": self.model.parameters(), "optimizer": self.optimizer.state, "losses": mx.array(self.losses)}
        fresh = path.with_name("fresh.safetensors")
        metadata = {"facts": json.dumps(facts), "seconds": str(self.seconds)}
        mx.save_safetensors(str(fresh), dict(tree_flatten(parts)), metadata)
        fresh.replace(path)

    def load(self, path: Path, facts: dict[str, int]) -> None:
        """Loads what `save` wrote. ValueError if it is damaged or of another run."""
        try:
            arrays, metadata = mx.load(str(path), return_metadata=True)
            known = json.loads(metadata["facts"])
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"{path}: not a saved run ({' '.join(str(error).split())[:160]})") from None
        if known != facts:
            raise ValueError(
                f"OUT must be new, or of the same seed and steps, {facts}, got {metadata['facts']} in {path}"
            )
        parts: Any = tree_unflatten(list(arrays.items()))
        self.model.update(parts["model"])
        self.optimizer.state = parts["optimizer"]
        self.losses, self.seconds = parts["losses"].tolist(), float(metadata["seconds"])


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Yields a list that Ctrl-C appends to, instead of ending the program."""
    stopped: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: stopped.append(number))
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def train(experiment: Experiment, folder: Path, seed: int, steps: int) -> Run:
    """Trains a model and saves it in a folder, or continues the run that is there. Ctrl-C saves it and raises
    KeyboardInterrupt."""
    mx.random.seed(seed)
    model, facts, path = experiment.make(), {"seed": seed, "steps": steps}, folder / "state.safetensors"
    warm = optim.linear_schedule(0, experiment.rate, 30)
    fall = optim.cosine_decay(experiment.rate, max(1, steps - 30), experiment.rate / 100)
    run = Run(model, optim.AdamW(optim.join_schedules([warm, fall], [30]), weight_decay=0.01), [])
    run.optimizer.init(model.trainable_parameters())
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        run.load(path, facts)
    gradient, began = nn.value_and_grad(model, lambda *given: experiment.loss(model, *given)), time.monotonic()
    began -= run.seconds
    first = len(run.losses)
    with interruptible() as stopped, tqdm(range(first, steps), folder.name, steps, initial=first, unit="step") as bar:
        for step in bar:
            loss, change = gradient(*experiment.batch(np.random.default_rng((seed, step))))
            run.optimizer.update(model, change)
            mx.eval(model.parameters(), run.optimizer.state, loss)
            run.losses.append(loss.item())
            bar.set_postfix(loss=f"{run.losses[-1]:.4f}", refresh=False)
            run.seconds = time.monotonic() - began
            if stopped or (step + 1) % EVERY == 0 or step + 1 == steps:
                run.save(path, facts)
            if stopped and step + 1 < steps:
                raise KeyboardInterrupt
    return run


def held_out(experiment: Experiment, model: nn.Module, seed: int) -> float:
    """The mean loss of 8 batches that are not in the training data."""
    draws = (np.random.default_rng((seed, step, 1)) for step in range(8))
    return float(np.mean([experiment.loss(model, *experiment.batch(rng)).item() for rng in draws]))


def plot(losses: dict[int, Sequence[float]], limit: float, title: str, path: Path) -> None:
    """Plots the loss of every step, a line for each seed."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for seed, values in losses.items():
        axes.plot(np.arange(1, len(values) + 1), values, linewidth=0.8, label=f"seed {seed}")
    axes.axhline(limit, color="0.5", linestyle=":", label=f"{limit}")
    axes.set(title=title, xlabel="step", ylabel="loss in training", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(experiment: Experiment, what: str) -> None:
    """The command of an experiment: trains a model for each seed and writes table.md and loss.png. Exits with 1 if a
    loss on held-out data is not below the limit."""
    script = Path(sys.argv[0])
    parser = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for checkpoints, table and picture")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=experiment.steps)
    options = parser.parse_args()
    try:
        import matplotlib  # here, to fail before the training if it is missing

        matplotlib.use("agg")
        if options.steps < 1 or min(options.seeds) < 0:
            raise ValueError(f"steps must be at least 1 and seeds at least 0, got {options.steps} and {options.seeds}")
        runs = {n: train(experiment, options.out / f"seed-{n}", n, options.steps) for n in options.seeds}
        plot({n: run.losses for n, run in runs.items()}, experiment.limit, script.stem, options.out / "loss.png")
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"{script.name}: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: run the same command again to continue")
    lines = ["| seed | first loss | held-out loss | seconds |", "|---|---|---|---|"]
    ends = {n: held_out(experiment, run.model, n) for n, run in runs.items()}
    lines += [f"| {n} | {run.losses[0]:.3f} | {ends[n]:.5f} | {run.seconds:.0f} |" for n, run in runs.items()]
    facts, where = backend.device.report(), platform.platform(terse=True)
    lines += ["", f"{options.steps} steps; {facts.device} ({facts.name}), {where}, MLX {facts.mlx}, mlx-xformer "]
    lines[-1] += f"{__version__}, {time.strftime('%Y-%m-%d')}"
    (options.out / "table.md").write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))
    if max(ends.values()) >= experiment.limit:
        sys.exit(f"{script.name}: the loss must end below {experiment.limit}, got {max(ends.values()):.5f}")
