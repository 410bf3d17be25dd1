"""Prompt caches on disk: the caches of a model and the tokens they hold, for that model alone."""

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
    """A digest of a model's configuration, of its parameters' names, shapes and dtypes, and of 64 values of each."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, value in sorted(cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters()))):
        flat = mx.flatten(value)
        sample = mx.contiguous(flat[:: max(1, flat.size // _SAMPLES)][:_SAMPLES])
        digest.update(f"\n{name} {value.shape} {value.dtype}\n".encode())
        digest.update(np.array(mx.view(sample, mx.uint8)).tobytes())
    return digest.hexdigest()


def save_prompt(path: str | Path, model: CausalLM, caches: Sequence[KVCache], tokens: Sequence[int]) -> None:
    """Writes what the caches hold of `tokens`, the text so far: its first caches[0].length. Whole or not at all."""
    held = list(tokens[: caches[0].length])
    if len(held) < caches[0].length:
        raise ValueError(f"tokens must be all that the caches hold, {caches[0].length}, got {len(held)}")
    save_caches(path, caches, {"model": fingerprint(model), "tokens": json.dumps(held)})


def load_prompt(path: str | Path, model: CausalLM) -> tuple[list[KVCache], list[int]]:
    """The caches of a file and the tokens that they hold. ValueError, in one line, for those of another model."""
    caches, metadata = load_caches(path)
    if "model" not in metadata or "tokens" not in metadata:
        raise ValueError(f"{path}: not a prompt cache, it names no model and tokens")
    if metadata["model"] != fingerprint(model):
        raise ValueError(f"{path}: the prompt cache of another model")
    try:
        tokens = [int(token) for token in json.loads(metadata["tokens"])]
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{path}: not a prompt cache, its tokens cannot be read") from None
    if any(cache.length != len(tokens) for cache in caches):
        raise ValueError(f"{path}: the caches must hold its {len(tokens)} tokens, got {caches[0].length}")
    return caches, tokens


def reuse(caches: Sequence[KVCache], tokens: Sequence[int], prompt: Sequence[int]) -> int:
    """Rewinds caches that hold `tokens` to what these share with the beginning of a prompt.

    The last token of the prompt is always left to be read, since its logits are needed. The caches are emptied where a
    window has moved on too far.

    Returns:
        How many tokens the caches hold then.
    """
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(tokens, prompt[:-1], strict=False)))
    try:
        for cache in caches:
            cache.trim(cache.length - shared)
    except RewindError:
        for cache in caches:
            cache.reset()
    return caches[0].length
