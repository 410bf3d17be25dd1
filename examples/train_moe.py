"""Trains a small mixture of experts on a book, byte by byte: python examples/train_moe.py OUT
Then: mlx-xformer generate OUT/model "I had called upon my friend"

Ctrl-C stops after the step at hand, and the same command goes on from there. examples/compare_moe.py shows what the
balance loss does."""

import argparse
import json
import lzma
import signal
import sys
import time
from pathlib import Path
from typing import Any

from mlx_xformer.backend import device  # noqa: F401  isort: skip (before MLX, whose BLAS it chooses)

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import tokenizers
from mlx.utils import tree_flatten, tree_unflatten
from tqdm import tqdm

from mlx_xformer.models.causal_lm.model import CausalLM, CausalLMConfig, auxiliary_loss
from mlx_xformer.nn.moe.layer import MoEConfig
from mlx_xformer.storage.checkpoint import save_checkpoint

BOOK = Path(__file__).parent / "sherlock_holmes.txt.xz"
NOTES, STATE = "training.json", "state.safetensors"
SIZES = {"embed_dim": 64, "num_layers": 3, "num_heads": 4, "hidden_dim": 128}
ALPHA, LENGTH, BATCH, RATE, WARMUP = 0.02, 128, 16, 3e-3, 30  # of the loss, bytes, texts a step, learning rate, steps


def byte_tokenizer() -> tokenizers.Tokenizer:
    """A token a byte."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    library = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    return library


def read(path: Path) -> list[np.ndarray]:
    """The tokens of a text, and of its last tenth, which is held out."""
    try:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
            tokens = np.array(byte_tokenizer().encode(file.read()).ids)
    except (UnicodeError, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{path}: no text ({error})") from None
    if len(tokens) < 20 * LENGTH:
        raise ValueError(f"the text must have {20 * LENGTH} bytes at least, got {len(tokens)} in {path}")
    return np.split(tokens, [len(tokens) * 9 // 10])


def losses(model: CausalLM, rows: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Bytes (B, L + 1) -> what is made small, the cross-entropy alone, how many bytes chose each expert (layers, E)."""
    routings = []
    logits = model(rows[:, :-1], routings=routings)
    entropy = nn.losses.cross_entropy(logits, rows[:, 1:], reduction="mean")
    return entropy + auxiliary_loss(routings), entropy, mx.stack([routing.load for routing in routings])


def measure(model: CausalLM, tokens: np.ndarray) -> dict:
    """The loss on a text, and for each layer the load of its busiest expert over the mean load."""
    rows = mx.array(tokens[: len(tokens) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1))
    parts = [losses(model, part)[1:] for part in mx.split(rows, list(range(64, len(rows), 64)))]
    load = sum(np.array(load) for _, load in parts)
    sizes = [min(64, len(rows) - 64 * i) for i in range(len(parts))]
    entropy = np.average([entropy.item() for entropy, _ in parts], weights=sizes)
    return {"held_out": float(entropy), "imbalance": (load.max(axis=1) / load.mean(axis=1)).tolist()}


def prepare(alpha: float, steps: int) -> tuple[CausalLM, optim.AdamW]:
    """A fresh model, and what trains it."""
    moe = MoEConfig(SIZES["embed_dim"], SIZES["hidden_dim"], num_experts=8, num_experts_per_tok=2, alpha=alpha)
    model = CausalLM(CausalLMConfig(vocab_size=256, tie_embeddings=True, moe=moe, **SIZES))
    warm, fall = optim.linear_schedule(0, RATE, WARMUP), optim.cosine_decay(RATE, max(1, steps - WARMUP), RATE / 10)
    optimizer = optim.AdamW(optim.join_schedules([warm, fall], [WARMUP]), weight_decay=0.01)
    optimizer.init(model.trainable_parameters())
    return model, optimizer


def train(out: Path, text: Path, alpha: float, seed: int, steps: int) -> dict:
    """Trains into a folder, or goes on there. Returns what was measured, which training.json keeps."""
    if steps < 1 or not 0 <= seed < 2**63:
        raise ValueError(f"steps must be at least 1 and seed from 0 to 2^63 - 1, got {steps} and {seed}")
    given = {"text": text.name, "alpha": alpha, "seed": seed, "steps": steps}
    record, state = begun(out, given)
    if "held_out" in record:
        return record
    seen, held = read(text)
    mx.random.seed(seed)
    model, optimizer = prepare(alpha, steps)
    if state:
        model.update(state["model"])
        optimizer.state = state["optimizer"]
    out.mkdir(parents=True, exist_ok=True)
    keep(out, model, optimizer, record)  # where this cannot be written it is told now
    advance(model, optimizer, seen, record, out)
    if len(record["loss"]) < steps:
        raise KeyboardInterrupt
    record |= measure(model, held)
    extras = {"tokenizer.json": byte_tokenizer().to_str().encode()}
    weights, config = dict(tree_flatten(model.parameters())), model.config.to_dict()
    save_checkpoint(out / "model", weights, family="causal_lm", config=config, provenance=given, extras=extras)
    (out / NOTES).write_text(json.dumps(record))
    (out / STATE).unlink()
    return record


def begun(out: Path, given: dict) -> tuple[dict, Any]:
    """What is known of a folder's training so far, and the state of what is trained there."""
    record, state = {**given, "loss": [], "load": [], "seconds": 0.0}, {}
    try:
        if (out / STATE).exists():
            state, told = mx.load(str(out / STATE), return_metadata=True)
            record = json.loads(told["record"])
        elif (out / NOTES).exists():
            record = json.loads((out / NOTES).read_text())
            record["held_out"]  # is told last
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"OUT must be new, as what it holds cannot be read, got {out} ({error})") from None
    if any(record.get(name) != given[name] for name in given):
        raise ValueError(f"OUT must be new, or of the same text, loss, seed and steps, got {out}")
    return record, tree_unflatten(list(state.items())) if state else None


def keep(out: Path, model: CausalLM, optimizer: optim.AdamW, record: dict) -> None:
    """Writes where training stands, in one file, which is whole or as it was."""
    fresh, state = out / f"new-{STATE}", {"model": model.parameters(), "optimizer": optimizer.state}
    try:
        mx.save_safetensors(str(fresh), dict(tree_flatten(state)), {"record": json.dumps(record)})
    except RuntimeError as error:
        raise OSError(str(error)) from None
    fresh.replace(out / STATE)


def advance(model: CausalLM, optimizer: optim.AdamW, seen: np.ndarray, record: dict, out: Path) -> None:
    """The steps that a record lacks, or those before Ctrl-C, and keeps what became of them. Which texts a step sees is
    drawn from seed and step."""
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
    keep(out, model, optimizer, record)
    signal.signal(signal.SIGINT, before)


def main() -> None:
    first, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(description=first, epilog=rest, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the model and what was measured")
    parser.add_argument("--balance", action=argparse.BooleanOptionalAction, default=True, help="the balance loss (on)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--text", type=Path, default=BOOK, help="UTF-8, packed with xz or not (a book)")
    options = parser.parse_args()
    try:
        record = train(options.out, options.text, ALPHA * options.balance, options.seed, options.steps)
    except (OSError, ValueError) as error:
        sys.exit(f"train_moe.py: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: the same command goes on from here")
    print(f"{record['seconds']:.0f} s; on text held out: loss {record['held_out']:.3f} nats a byte, ", end="")
    print(f"busiest expert {max(record['imbalance']):.2f} times the mean")


if __name__ == "__main__":
    main()
