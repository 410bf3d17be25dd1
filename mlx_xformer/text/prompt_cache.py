"""Prompt caches on disk: the caches of a model and the tokens that they hold. They fit that model only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..nn.cache import KVCache, RewindError, load_caches, save_caches

if TYPE_CHECKING:
    from ..models.causal_lm.model import CausalLM

_SAMPLES = 64  # values of each parameter that go into a fingerprint


def fingerprint(model: CausalLM) -> str:
    """Returns a digest that differs between models.

    Args:
        model: a language model.

    Returns:
        The SHA-256 of its configuration, of its parameters' names, shapes and dtypes, and of 64 values of each.
    """
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, value in sorted(cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters()))):
        flat = mx.flatten(value)
        sample = mx.contiguous(flat[:: max(1, flat.size // _SAMPLES)][:_SAMPLES])
        digest.update(f"\n{name} {value.shape} {value.dtype}\n".encode())
        digest.update(np.array(mx.view(sample, mx.uint8)).tobytes())
    return digest.hexdigest()


def save_prompt(path: str | Path, model: CausalLM, caches: Sequence[KVCache], tokens: Sequence[int]) -> None:
    """Saves caches and the tokens that they hold, completely or not at all.

    Args:
        path: the safetensors file to write.
        model: the model of the caches.
        caches: one for each layer.
        tokens: the text so far; the caches hold its first `caches[0].length` tokens.

    Raises:
        ValueError: if there are fewer tokens than the caches hold.
        OSError: if the file cannot be written.
    """
    held = list(tokens[: caches[0].length])
    if len(held) < caches[0].length:
        raise ValueError(f"tokens must be all that the caches hold, {caches[0].length}, got {len(held)}")
    save_caches(path, caches, {"model": fingerprint(model), "tokens": json.dumps(held)})


def load_prompt(path: str | Path, model: CausalLM) -> tuple[list[KVCache], list[int]]:
    """Loads caches and the tokens that they hold.

    Args:
        path: a file that `save_prompt` wrote.
        model: the model that the caches must be of.

    Returns:
        The caches, one for each layer, and their tokens.

    Raises:
        ValueError: if the file is not a prompt cache, or that of another model.
        OSError: if it cannot be read.
    """
    caches, metadata = load_caches(path)
    if "model" not in metadata or "tokens" not in metadata:
        raise ValueError(f"{path}: not a prompt cache: it names no model and tokens")
    if metadata["model"] != fingerprint(model):
        raise ValueError(f"{path}: this is the prompt cache of another model")
    try:
        tokens = [int(token) for token in json.loads(metadata["tokens"])]
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{path}: not a prompt cache: its tokens cannot be read") from None
    if any(cache.length != len(tokens) for cache in caches):
        raise ValueError(f"{path}: the caches must hold its {len(tokens)} tokens, got {caches[0].length}")
    return caches, tokens


def reuse(caches: Sequence[KVCache], tokens: Sequence[int], prompt: Sequence[int]) -> int:
    """Prepares caches for a prompt that begins like the tokens they hold.

    They are trimmed to the common beginning, without the prompt's last token, which the model must read for its logits.
    Where a window has moved on too far for that, they are emptied.

    Args:
        caches: one for each layer; they are changed.
        tokens: the tokens that they hold.
        prompt: the tokens of the new prompt.

    Returns:
        How many tokens of the prompt they hold now.
    """
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(tokens, prompt[:-1], strict=False)))
    try:
        for cache in caches:
            cache.trim(cache.length - shared)
    except RewindError:
        for cache in caches:
            cache.reset()
    return caches[0].length
