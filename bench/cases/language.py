"""A prompt of 512 tokens, and 128 tokens after it, by a random Llama: the same weights for every program.

FOLDER holds float32/ in Hugging Face's layout, ours-float32/ and ours-4-bit/ (our checkpoints) and prompt.npy. mlx-lm
quantizes by itself, with the same function of MLX.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from peers import openblas

THREADS = int(os.environ["BENCH_THREADS"])
TOKENS = 128  # that are decoded


def _case(mx: Any, run: Any, packages: tuple[str, ...], blas: str) -> dict[str, Any]:
    versions = {name: version(name) for name in packages}
    return {"run": run, "versions": versions, "blas": blas, "threads": THREADS, "peak": mx.get_peak_memory}


def _peer(folder: Path, dtype: str, part: str) -> dict[str, Any]:
    """mlx-lm's own loop, which also makes the logprobs of the whole vocabulary."""
    blas = openblas()
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache
    from mlx_lm.utils import load_model, quantize_model

    model, config = load_model(folder / "float32")
    if dtype == "4-bit":
        model, _ = quantize_model(model, config, 64, 4)
    mx.eval(model.parameters())
    prompt = np.load(folder / "prompt.npy")

    def prefill() -> None:
        assert not list(generate_step(mx.array(prompt), model, max_tokens=0))

    caches = make_prompt_cache(model)
    for _ in generate_step(mx.array(prompt[:-1]), model, max_tokens=0, prompt_cache=caches):
        pass

    def decode() -> np.ndarray:
        steps = generate_step(mx.array(prompt[-1:]), model, max_tokens=TOKENS, prompt_cache=caches)
        tokens = [token for token, _ in steps]
        trim_prompt_cache(caches, caches[0].offset - len(prompt) + 1)
        return np.array(tokens)

    return _case(mx, {"prefill": prefill, "decode": decode}[part], ("mlx-lm", "mlx"), blas)


def _ours(folder: Path, dtype: str, part: str) -> dict[str, Any]:
    from mlx_xformer import load
    from mlx_xformer.backend import device
    from mlx_xformer.text.generation import generate

    model: Any = load(folder / f"ours-{dtype}")
    prompt = np.load(folder / "prompt.npy").tolist()

    def prefill() -> None:
        next(generate(model, prompt, max_tokens=1))

    caches = model.make_caches()
    next(generate(model, prompt[:-1], max_tokens=1, caches=caches))

    def decode() -> np.ndarray:
        tokens = [token.id for token in generate(model, prompt, max_tokens=TOKENS, caches=caches)]
        for cache in caches:
            cache.trim(cache.length - len(prompt) + 1)
        return np.array(tokens)

    return _case(device.mx, {"prefill": prefill, "decode": decode}[part], ("mlx-xformer", "mlx"), device.blas)


def peer_prefill_float32(folder: Path) -> dict[str, Any]:
    return _peer(folder, "float32", "prefill")


def peer_decode_float32(folder: Path) -> dict[str, Any]:
    return _peer(folder, "float32", "decode")


def peer_prefill_4_bit(folder: Path) -> dict[str, Any]:
    return _peer(folder, "4-bit", "prefill")


def peer_decode_4_bit(folder: Path) -> dict[str, Any]:
    return _peer(folder, "4-bit", "decode")


def ours_prefill_float32(folder: Path) -> dict[str, Any]:
    return _ours(folder, "float32", "prefill")


def ours_decode_float32(folder: Path) -> dict[str, Any]:
    return _ours(folder, "float32", "decode")


def ours_prefill_4_bit(folder: Path) -> dict[str, Any]:
    return _ours(folder, "4-bit", "prefill")


def ours_decode_4_bit(folder: Path) -> dict[str, Any]:
    return _ours(folder, "4-bit", "decode")
