"""64 tokens of an encoder-decoder over a source of 256 (width 256, 4 layers a side, 8 heads, hidden 1024, post-norm),
by what is kept from step to step. The most likely token is taken that is none of the last five.

FOLDER holds weights.npz and source.npy, the same for every case.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mlx_xformer.backend import device
from mlx_xformer.models.transformer import Transformer, TransformerConfig
from mlx_xformer.nn.cache import CrossCache
from mlx_xformer.text.decoding import stepping
from mlx_xformer.text.generation import generate

mx = device.mx
THREADS = int(os.environ["BENCH_THREADS"])
TOKENS, SOURCE, VOCABULARY, START = 64, 256, 1000, 1
CONFIG = TransformerConfig(
    VOCABULARY,
    embed_dim=256,
    num_heads=8,
    num_encoder_layers=4,
    num_decoder_layers=4,
    hidden_dim=1024,
    tie_embeddings=False,
)


def _model(folder: Path) -> tuple[Transformer, Any]:
    model = Transformer(CONFIG)
    with np.load(folder / "weights.npz") as stored:
        model.load_weights([(name, mx.array(stored[name])) for name in stored.files])
    model.eval()
    source = mx.array(np.load(folder / "source.npy"))
    mx.eval(model.parameters(), source)
    return model, source


def _case(run: Callable[[], np.ndarray]) -> dict[str, Any]:
    versions = {name: version(name) for name in ("mlx", "mlx-xformer")}
    return {"run": run, "versions": versions, "blas": device.blas, "threads": THREADS, "peak": mx.get_peak_memory}


def _unrepeated(logits: Any, history: Any) -> Any:
    """The sampler. Drawn weights would say one token again and again."""
    return mx.argmax(mx.put_along_axis(logits, history[:, -5:], mx.array(-mx.inf), axis=-1), axis=-1)


def _loop(step: Callable[[list[int]], Any]) -> np.ndarray:
    """step(all tokens so far) gives the logits of the next."""
    found = [START]
    for _ in range(TOKENS):
        found.append(int(_unrepeated(step(found)[:, -1], mx.array([found])).item()))
    return np.array(found[1:])


def no_cache(folder: Path) -> dict[str, Any]:
    """Nothing kept: every step is a full pass over the source and all tokens so far."""
    model, source = _model(folder)
    return _case(lambda: _loop(lambda found: model(source, mx.array([found]), last=1)))


def memory_kept(folder: Path) -> dict[str, Any]:
    """The memory alone, to which every step decodes all tokens so far, as llm_prep's loop does."""
    model, source = _model(folder)

    def run() -> np.ndarray:
        memory = model.encode(source)
        return _loop(lambda found: model.decode(mx.array([found]), memory, last=1))

    return _case(run)


def self_cache(folder: Path) -> dict[str, Any]:
    """The memory and the caches of self-attention; the memory is projected at every step."""
    model, source = _model(folder)

    def run() -> np.ndarray:
        memory, caches = model.encode(source), model.make_caches()
        mx.eval(memory)
        with stepping(model, single=False):  # on all cores, from which projecting the memory gains most
            return _loop(lambda found: model.decode(mx.array([found[-1:]]), memory, caches=caches, last=1))

    return _case(run)


def both_caches(folder: Path) -> dict[str, Any]:
    """And those of cross-attention."""
    model, source = _model(folder)

    def run() -> np.ndarray:
        memory, caches = model.encode(source), model.make_caches()
        given: dict[str, Any] = {"caches": caches, "cross_caches": [CrossCache() for _ in caches]}
        mx.eval(memory)
        with stepping(model, single=False):
            return _loop(lambda found: model.decode(mx.array([found[-1:]]), memory, **given, last=1))

    return _case(run)


def generated(folder: Path) -> dict[str, Any]:
    """generate(), which has both."""
    model, source = _model(folder)

    def run() -> np.ndarray:
        given = model.conditioned(source)
        return np.array([token.id for token in generate(given, [START], max_tokens=TOKENS, sampler=_unrepeated)])

    return _case(run)
