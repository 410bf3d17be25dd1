"""A prompt of 512 tokens, and 128 tokens after it, by a random Llama: the same weights for every program.

FOLDER holds float32/ in Hugging Face's layout, ours-float32/ and ours-4-bit/ (our checkpoints) and prompt.npy. mlx-lm
quantizes by itself, with the same function of MLX.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cases.common import describe_mlx, describe_ours, load_openblas

TOKENS = 128  # that are decoded


def _peer(folder: Path, dtype: str, part: str) -> dict[str, Any]:
    """mlx-lm's own loop, which also makes the logprobs of the whole vocabulary."""
    blas = load_openblas()
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

    return describe_mlx({"prefill": prefill, "decode": decode}[part], packages=["mlx-lm"], blas=blas)


def _ours(folder: Path, dtype: str, part: str) -> dict[str, Any]:
    from mlx_xformer import generate, load

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

    return describe_ours({"prefill": prefill, "decode": decode}[part])


peer_prefill_float32 = partial(_peer, dtype="float32", part="prefill")
peer_decode_float32 = partial(_peer, dtype="float32", part="decode")
peer_prefill_4_bit = partial(_peer, dtype="4-bit", part="prefill")
peer_decode_4_bit = partial(_peer, dtype="4-bit", part="decode")
ours_prefill_float32 = partial(_ours, dtype="float32", part="prefill")
ours_decode_float32 = partial(_ours, dtype="float32", part="decode")
ours_prefill_4_bit = partial(_ours, dtype="4-bit", part="prefill")
ours_decode_4_bit = partial(_ours, dtype="4-bit", part="decode")
