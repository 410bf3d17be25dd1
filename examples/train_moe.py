"""Trains a small mixture of experts on a book, byte by byte: python examples/train_moe.py OUT
Then: mlx-xformer generate OUT/model "I had called upon my friend"

Ctrl-C stops after the current step, and the same command continues. examples/compare_moe.py shows what the balance
loss does."""

import argparse
import json
import lzma
import signal
import sys
import time
from pathlib import Path
from typing import Any

from mlx_xformer.backend import device  # noqa: F401  isort: skip (must come before MLX)

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import tokenizers
from mlx.utils import tree_flatten, tree_unflatten
from tqdm import tqdm

from mlx_xformer.models.causal_lm import CausalLM, CausalLMConfig
from mlx_xformer.models.causal_lm.model import auxiliary_loss
from mlx_xformer.nn.moe import MoEConfig
from mlx_xformer.storage import save_checkpoint

BOOK = Path(__file__).parent / "sherlock_holmes.txt.xz"
NOTES, STATE = "training.json", "state.safetensors"
SIZES = {"embed_dim": 64, "num_layers": 3, "num_heads": 4, "hidden_dim": 128}
ALPHA = 0.02  # weight of the balance loss
LENGTH, BATCH = 128, 16  # bytes of a text, texts in a batch
RATE, WARMUP = 3e-3, 30  # the highest learning rate, and the steps that it takes to reach it


def byte_tokenizer() -> tokenizers.Tokenizer:
    """Makes a tokenizer with one token for each byte."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    library = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    return library


def read(path: Path) -> list[np.ndarray]:
    """Reads a text: the tokens for training, and those of its last tenth, which are held out."""
    try:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
            tokens = np.array(byte_tokenizer().encode(file.read()).ids)
    except (UnicodeError, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{path}: not a UTF-8 text ({error})") from None
    if len(tokens) < 20 * LENGTH:
        raise ValueError(f"the text must have at least {20 * LENGTH} bytes, got {len(tokens)} in {path}")
    return np.split(tokens, [len(tokens) * 9 // 10])


def losses(model: CausalLM, rows: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Bytes (B, L + 1) -> the total loss, its cross-entropy, and how many bytes each expert received (layers, E)."""
    routings = []
    logits = model(rows[:, :-1], routings=routings)
    entropy = nn.losses.cross_entropy(logits, rows[:, 1:], reduction="mean")
    return entropy + auxiliary_loss(routings), entropy, mx.stack([routing.load for routing in routings])


def measure(model: CausalLM, tokens: np.ndarray) -> dict:
    """The loss on a text, and for each layer the load of its busiest expert divided by the mean load."""
    rows = mx.array(tokens[: len(tokens) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1))
    parts = [losses(model, part)[1:] for part in mx.split(rows, list(range(64, len(rows), 64)))]
    load = sum(np.array(load) for _, load in parts)
    sizes = [min(64, len(rows) - 64 * i) for i in range(len(parts))]
    entropy = np.average([entropy.item() for entropy, _ in parts], weights=sizes)
    return {"held_out": float(entropy), "imbalance": (load.max(axis=1) / load.mean(axis=1)).tolist()}


def prepare(alpha: float, steps: int) -> tuple[CausalLM, optim.AdamW]:
    """Makes a model with random weights and its optimizer."""
    moe = MoEConfig(SIZES["embed_dim"], SIZES["hidden_dim"], num_experts=8, num_experts_per_tok=2, alpha=alpha)
    model = CausalLM(CausalLMConfig(vocab_size=256, tie_embeddings=True, moe=moe, **SIZES))
    warm, fall = optim.linear_schedule(0, RATE, WARMUP), optim.cosine_decay(RATE, max(1, steps - WARMUP), RATE / 10)
    optimizer = optim.AdamW(optim.join_schedules([warm, fall], [WARMUP]), weight_decay=0.01)
    optimizer.init(model.trainable_parameters())
    return model, optimizer


def train(out: Path, text: Path, alpha: float, seed: int, steps: int) -> dict:
    """Trains a model and saves it in a folder, or continues the run that is there. Returns the measurements, which are
    also saved as training.json."""
    if steps < 1 or not 0 <= seed < 2**63:
        raise ValueError(f"steps must be at least 1 and seed from 0 to 2^63 - 1, got {steps} and {seed}")
    given = {"text": text.name, "alpha": alpha, "seed": seed, "steps": steps}
    record, state = load_run(out, given)
    if "held_out" in record:
        return record
    seen, held = read(text)
    mx.random.seed(seed)
    model, optimizer = prepare(alpha, steps)
    if state:
        model.update(state["model"])
        optimizer.state = state["optimizer"]
    out.mkdir(parents=True, exist_ok=True)
    save_run(out, model, optimizer, record)  # fails now, rather than after the training, if it cannot be written
    run_steps(model, optimizer, seen, record, out)
    if len(record["loss"]) < steps:
        raise KeyboardInterrupt
    record |= measure(model, held)
    extras = {"tokenizer.json": byte_tokenizer().to_str().encode()}
    weights, config = dict(tree_flatten(model.parameters())), model.config.to_dict()
    save_checkpoint(out / "model", weights, family="causal_lm", config=config, provenance=given, extras=extras)
    (out / NOTES).write_text(json.dumps(record))
    (out / STATE).unlink()
    return record


def load_run(out: Path, given: dict) -> tuple[dict, Any]:
    """Loads the measurements of a run so far, and the state of its model and optimizer if it is unfinished."""
    record, state = {**given, "loss": [], "load": [], "seconds": 0.0}, {}
    try:
        if (out / STATE).exists():
            state, metadata = mx.load(str(out / STATE), return_metadata=True)
            record = json.loads(metadata["record"])
        elif (out / NOTES).exists():
            record = json.loads((out / NOTES).read_text())
            record["held_out"]  # the last one; without it the file is incomplete
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"OUT must be new, or hold a run that can be read, got {out} ({error})") from None
    if any(record.get(name) != given[name] for name in given):
        raise ValueError(f"OUT must be new, or of the same text, loss, seed and steps, got {out}")
    return record, tree_unflatten(list(state.items())) if state else None


def save_run(out: Path, model: CausalLM, optimizer: optim.AdamW, record: dict) -> None:
    """Saves the run in one file, which replaces the last one when it is complete."""
    fresh, state = out / f"new-{STATE}", {"model": model.parameters(), "optimizer": optimizer.state}
    try:
        mx.save_safetensors(str(fresh), dict(tree_flatten(state)), {"record": json.dumps(record)})
    except RuntimeError as error:
        raise OSError(str(error)) from None
    fresh.replace(out / STATE)


def run_steps(model: CausalLM, optimizer: optim.AdamW, seen: np.ndarray, record: dict, out: Path) -> None:
    """Trains until the last step or Ctrl-C, and saves the run. A step's random texts depend on seed and step only."""
    stopped: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: stopped.append(number))
    gradient, began = nn.value_and_grad(model, losses), time.monotonic() - record["seconds"]
    done, steps = len(record["loss"]), record["steps"]
    with tqdm(range(done, steps), out.name, steps, initial=done, unit="step") as bar:
        for step in bar:
            at = np.random.default_rng((record["seed"], step)).integers(0, len(seen) - LENGTH, (BATCH, 1))
            (_, entropy, load), change = gradient(model, mx.array(seen[at + np.arange(LENGTH + 1)]))
            optimizer.update(model, change)
            mx.eval(model.parameters(), optimizer.state, entropy, load)
            record["loss"].append(entropy.item())
            record["load"].append(load.tolist())
            bar.set_postfix(loss=f"{entropy.item():.2f}", refresh=False)
            if stopped:
                break
    record["seconds"] = time.monotonic() - began
    save_run(out, model, optimizer, record)
    signal.signal(signal.SIGINT, before)


def main() -> None:
    first, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(description=first, epilog=rest, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the model and what was measured")
    parser.add_argument("--balance", action=argparse.BooleanOptionalAction, default=True, help="the balance loss (on)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--text", type=Path, default=BOOK, help="UTF-8, may be compressed with xz (default: a book)")
    options = parser.parse_args()
    try:
        record = train(options.out, options.text, ALPHA * options.balance, options.seed, options.steps)
    except (OSError, ValueError) as error:
        sys.exit(f"train_moe.py: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: run the same command again to continue")
    print(f"{record['seconds']:.0f} s; on text held out: loss {record['held_out']:.3f} nats a byte, ", end="")
    print(f"busiest expert {max(record['imbalance']):.2f} times the mean")


if __name__ == "__main__":
    main()
