"""What the experiments share: a loop with AdamW that shows a bar, saves and goes on, a table and a picture of losses.

Everything a step draws comes from seed and step, so that a run that was stopped ends with the numbers of one that was
not. Ctrl-C stops after the step at hand; the same command goes on from there."""

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
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_xformer.backend import device  # isort: skip (before MLX, whose BLAS it chooses)

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from tqdm import tqdm

EVERY = 100  # steps from one saving to the next
Batch = tuple[mx.array, ...]


@dataclass(frozen=True)
class Experiment:
    """make() draws a fresh model, batch(rng) what a step sees, loss(model, *batch) is made small. limit: what it is
    below, on data held out, after `steps`."""

    make: Callable[[], nn.Module]
    batch: Callable[[np.random.Generator], Batch]
    loss: Callable[..., mx.array]
    steps: int
    limit: float
    rate: float = 3e-3


@dataclass
class Run:
    """A model and what trains it, after as many steps as there are losses."""

    model: nn.Module
    optimizer: optim.Optimizer
    losses: list[float]
    seconds: float = 0.0

    def save(self, path: Path, facts: dict[str, int]) -> None:
        """All of it in one file, which takes the place of the last when it is whole."""
        parts = {"model": self.model.parameters(), "optimizer": self.optimizer.state, "losses": mx.array(self.losses)}
        fresh = path.with_name("fresh.safetensors")
        told = {"facts": json.dumps(facts), "seconds": str(self.seconds)}
        mx.save_safetensors(str(fresh), dict(tree_flatten(parts)), told)
        fresh.replace(path)

    def load(self, path: Path, facts: dict[str, int]) -> None:
        """What `save` wrote. ValueError if that was another run, or is damaged."""
        try:
            arrays, told = mx.load(str(path), return_metadata=True)
            known = json.loads(told["facts"])
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"{path}: no state of a run ({' '.join(str(error).split())[:160]})") from None
        if known != facts:
            raise ValueError(f"OUT must be new, or of the same seed and steps, {facts}, got {told['facts']} in {path}")
        parts: Any = tree_unflatten(list(arrays.items()))
        self.model.update(parts["model"])
        self.optimizer.state = parts["optimizer"]
        self.losses, self.seconds = parts["losses"].tolist(), float(told["seconds"])


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """A list that Ctrl-C makes longer, instead of ending the program."""
    stopped: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: stopped.append(number))
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def train(experiment: Experiment, folder: Path, seed: int, steps: int) -> Run:
    """Trains into a folder, or goes on there. KeyboardInterrupt, with all saved, after Ctrl-C."""
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
    """The mean loss of 8 batches that training does not see."""
    draws = (np.random.default_rng((seed, step, 1)) for step in range(8))
    return float(np.mean([experiment.loss(model, *experiment.batch(rng)).item() for rng in draws]))


def plot(losses: dict[int, Sequence[float]], limit: float, title: str, path: Path) -> None:
    """The loss of every step, a line a seed."""
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
    """The command of an experiment: trains a model a seed, writes table.md and loss.png. Exits 1 above the limit."""
    script = Path(sys.argv[0])
    parser = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for checkpoints, table and picture")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=experiment.steps)
    options = parser.parse_args()
    try:
        import matplotlib  # before anything is trained

        matplotlib.use("agg")
        if options.steps < 1 or min(options.seeds) < 0:
            raise ValueError(f"steps must be at least 1 and seeds at least 0, got {options.steps} and {options.seeds}")
        runs = {n: train(experiment, options.out / f"seed-{n}", n, options.steps) for n in options.seeds}
        plot({n: run.losses for n, run in runs.items()}, experiment.limit, script.stem, options.out / "loss.png")
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"{script.name}: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: the same command goes on from here")
    lines = ["| seed | first loss | loss held out | seconds |", "|---|---|---|---|"]
    ends = {n: held_out(experiment, run.model, n) for n, run in runs.items()}
    lines += [f"| {n} | {run.losses[0]:.3f} | {ends[n]:.5f} | {run.seconds:.0f} |" for n, run in runs.items()]
    facts, where = device.report(), platform.platform(terse=True)
    lines += ["", f"{options.steps} steps; {facts.device} ({facts.name}), {where}, MLX {facts.mlx}, mlx-xformer "]
    lines[-1] += f"{version('mlx-xformer')}, {time.strftime('%Y-%m-%d')}"
    (options.out / "table.md").write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))
    if max(ends.values()) >= experiment.limit:
        sys.exit(f"{script.name}: the loss must end below {experiment.limit}, got {max(ends.values()):.5f}")
