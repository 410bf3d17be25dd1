"""64 tokens of an encoder-decoder over a source of 256 (width 256, 4 layers a side, 8 heads, hidden 1024, post-norm),
by what is kept from step to step. The most likely token is taken that is none of the last five."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cases.checkouts import START, TOKENS, generate_over, make_encoder_decoder, sample_unrepeated
from cases.common import describe_ours
from mlx_xformer import CrossCache
from mlx_xformer.backend import device

mx = device.mx


def _loop(step: Callable[[list[int]], Any]) -> np.ndarray:
    """step(all tokens so far) gives the logits of the next."""
    found = [START]
    for _ in range(TOKENS):
        found.append(int(sample_unrepeated(step(found)[:, -1], mx.array([found])).item()))
    return np.array(found[1:])


def no_cache(_: Path) -> dict[str, Any]:
    """Nothing kept: every step is a full pass over the source and all tokens so far."""
    model, source = make_encoder_decoder()
    return describe_ours(lambda: _loop(lambda found: model(source, mx.array([found]), last=1)))


def memory_kept(_: Path) -> dict[str, Any]:
    """The memory alone, to which every step decodes all tokens so far."""
    model, source = make_encoder_decoder()

    def run() -> np.ndarray:
        memory = model.encode(source)
        return _loop(lambda found: model.decode(mx.array([found]), memory, last=1))

    return describe_ours(run)


def self_cache(_: Path) -> dict[str, Any]:
    """The memory and the caches of self-attention; the memory is projected at every step."""
    model, source = make_encoder_decoder()

    def run() -> np.ndarray:
        memory, caches = model.encode(source), model.make_caches()
        mx.eval(memory)
        return _loop(lambda found: model.decode(mx.array([found[-1:]]), memory, caches=caches, last=1))

    return describe_ours(run)


def both_caches(_: Path) -> dict[str, Any]:
    """And those of cross-attention."""
    model, source = make_encoder_decoder()

    def run() -> np.ndarray:
        memory, caches = model.encode(source), model.make_caches()
        given: dict[str, Any] = {"caches": caches, "cross_caches": [CrossCache() for _ in caches]}
        mx.eval(memory)
        return _loop(lambda found: model.decode(mx.array([found[-1:]]), memory, **given, last=1))

    return describe_ours(run)


def generated(_: Path) -> dict[str, Any]:
    """generate(), which has both."""
    model, source = make_encoder_decoder()
    return describe_ours(lambda: np.array(generate_over(model, source)))
