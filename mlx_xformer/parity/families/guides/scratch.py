"""The norm, the blocks and the loss of scratch; and the blocks of a stack or encoder-decoder with its own weights, then
all of it, at once and through caches.

Axes: B batch, L positions, S positions of a memory, E model_dim, M enc_out_dim, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ....models.guides.scratch import (
    EncoderDecoder,
    EncoderDecoderConfig,
    StackConfig,
    TransformerBlock,
    TransformerStack,
    UnbiasedLayerNorm,
    cross_entropy,
)
from ....nn.cache import CrossCache
from ....reference.models.guides import scratch as twin
from ...samples import NO_QUOTIENT, Arrays, Case, Options, Rng, Sample, described, drawn, function, signal, with_params
from ..common import CHUNKS, fixed_case, in_chunks, layer_case, table_case, weights_of

_LENGTHS, _MEMORY = (3, sum(CHUNKS)), 7


def _norms(rng: Rng) -> Iterator[Sample]:
    for dims in (3, 5, 24, 48, 255, 511, 1024, 1537):  # at 2 the gradient is 0 but for eps, all rounding
        for shape in ((2, 5), (1,), (3, 2, 1, 2)):
            module = UnbiasedLayerNorm(dims)
            params = drawn(module, rng)
            x = signal(rng, *shape, dims)
            yield Sample(described(dims=dims, shape=x.shape), {"x": x}, {"dims": dims}, params)
    x = signal(rng, 7, 48)
    params = drawn(UnbiasedLayerNorm(48), rng)
    yield Sample("eps=0.1", {"x": x}, {"dims": 48, "eps": 0.1}, params)
    yield Sample("views with gaps", {"x": x}, {"dims": 48}, params, strided=True)
    odd = x.copy()
    odd[3, 5] = np.nan
    yield Sample("NaN", {"x": odd}, {"dims": 48}, params, skip_vjp=NO_QUOTIENT)


def _norm(params: dict, arrays: dict, options: Options) -> Any:
    return with_params(UnbiasedLayerNorm(**options), params)(**arrays)


def _blocks(rng: Rng) -> Iterator[Sample]:
    """Causal and not, with a memory and without, with both norms and with masks."""
    for causal in (False, True):
        for width in (None, 11):
            for norm in ("layer", "unbiased"):
                config = StackConfig(15, 7, 13, num_heads=3, enc_out_dim=width, causal=causal, norm=norm)
                arrays = {"x": rng.normal(size=(2, 5, 15))}
                options: dict[str, Any] = {"config": config}
                if width:
                    arrays["memory"] = rng.normal(size=(2, _MEMORY, 11))
                    options["memory_mask"] = rng.random((2, 1, 1, _MEMORY)) > 0.3
                if norm == "unbiased":
                    options["mask"] = rng.random((2, 1, 5, 5)) > 0.3
                what = described(memory=width, norm=norm, causal=causal, mask=norm == "unbiased")
                yield Sample(what, arrays, options, drawn(TransformerBlock(config), rng), joint=True)


def _block(params: dict, arrays: dict, options: Options) -> Any:
    module = TransformerBlock(options["config"])
    module.eval()
    rest = {name: value for name, value in options.items() if name != "config"}
    return with_params(module, params)(**arrays, **rest)


def _block_twin(params: Arrays, arrays: Arrays, options: Options) -> np.ndarray:
    rest = {name: value for name, value in options.items() if name != "config"}
    return twin.block(params, options["config"], arrays["x"], arrays.get("memory"), **rest)


def _norm_twin(params: Arrays, arrays: Arrays, options: Options) -> np.ndarray:
    return twin.unbiased_layer_norm(params, arrays["x"], options.get("eps", 1e-6))


def _losses(rng: Rng) -> Iterator[Sample]:
    """With padding and without, a text of padding alone, and logits that overflow an exponential."""
    for batch, L, vocab in ((2, 5, 11), (1, 1, 2), (3, 7, 101)):
        for padding in (None, 0, vocab - 1):
            labels = rng.integers(0, vocab, (batch, L))
            labels[-1, L // 2 :] = 0 if padding is None else padding
            facts = described(logits=(batch, L, vocab), padding_idx=padding)
            logits = rng.normal(size=(batch, L, vocab)) * 3
            yield Sample(facts, {"logits": logits}, {"labels": labels, "padding_idx": padding})
    options = {"labels": np.zeros((1, 5), np.int64), "padding_idx": 0}
    yield Sample("padding alone", {"logits": rng.normal(size=(1, 5, 7))}, options)
    options = {"labels": rng.integers(0, 7, (2, 3)), "padding_idx": None}
    yield Sample("logits near 1000", {"logits": rng.normal(size=(2, 3, 7)) + 1000}, options)


CASES = {
    "cross_entropy": Case(
        _losses, function(cross_entropy), function(twin.cross_entropy), result="float32", by_input=True
    ),
    "unbiased_layer_norm": Case(_norms, _norm, _norm_twin),
    "transformer_block": Case(_blocks, _block, _block_twin, half=4.0, half_vjp=12.0),  # 4 a branch, of three
}


# A model with its own weights


def examples() -> dict[str, nn.Module]:
    """Small models by what they are."""
    stack = StackConfig(15, 7, 13, num_heads=3, num_stack=2)
    decoder = StackConfig(15, 7, 13, num_heads=3, num_stack=2, causal=True, enc_out_dim=11)
    unbiased = StackConfig(15, 5, 13, num_heads=5, num_stack=2, causal=True, norm="unbiased")
    return {
        "stack": TransformerStack(stack),
        "encoder-decoder": EncoderDecoder(EncoderDecoderConfig(23, decoder, max_len=29)),
        "decoder alone": EncoderDecoder(EncoderDecoderConfig(23, unbiased, padding_idx=None, max_len=29)),
    }


def cases(model: TransformerStack | EncoderDecoder) -> dict[str, Case]:
    """A case for every block, for all of them and for what follows them; of an encoder-decoder for its table too, and
    for what follows that through caches."""
    weights = weights_of(model)
    if isinstance(model, TransformerStack):

        def whole(x: np.ndarray, memory: np.ndarray | None = None) -> np.ndarray:
            return twin.stack(weights, model.config, x, memory)

        sizes = [_sizes(model.config, 1, L) for L in _LENGTHS]
        return {**_blocks_of(model, ""), "stack": fixed_case(model, whole, sizes, vjp=False)}
    config = model.config

    def at_once(x: mx.array, memory: mx.array | None = None) -> mx.array:
        return model.unembed(model.decoder(x, memory))

    def cached(x: mx.array, memory: mx.array | None = None) -> mx.array:
        caches, cross = model.make_caches(), [CrossCache() for _ in model.decoder.blocks]
        return model.unembed(in_chunks(lambda y: model.decoder(y, memory, caches=caches, cross_caches=cross), x))

    def theirs(x: np.ndarray, memory: np.ndarray | None = None) -> np.ndarray:
        return twin.from_embedded(weights, config, x, memory)

    sizes = [_sizes(config.stack, 1, L) for L in _LENGTHS]
    return {
        "embed": table_case(model.embedded, lambda x: twin.embedded(weights, x), config.vocab_size, _LENGTHS),
        **_blocks_of(model.decoder, "decoder."),
        "logits": fixed_case(at_once, theirs, sizes, vjp=False),
        "logits, cached": fixed_case(cached, theirs, sizes[-1:], vjp=False),
    }


def _blocks_of(stack: TransformerStack, prefix: str) -> dict[str, Case]:
    """A case for each block."""
    config = stack.config

    def theirs(params: Arrays, arrays: Arrays, _: Options) -> np.ndarray:
        return twin.block(params, config, **arrays)

    sizes = [_sizes(config, 2, _LENGTHS[-1])]
    return {f"{prefix}blocks.{i}": layer_case(block, theirs, sizes) for i, block in enumerate(stack.blocks)}


def _sizes(config: StackConfig, B: int, L: int) -> dict[str, tuple[int, ...]]:
    """x (B, L, E) and the memory (B, S, M), if there is one."""
    sizes: dict[str, tuple[int, ...]] = {"x": (B, L, config.model_dim)}
    return sizes if config.enc_out_dim is None else sizes | {"memory": (B, _MEMORY, config.enc_out_dim)}
