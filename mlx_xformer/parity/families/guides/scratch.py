"""Samples of the stack's norm and blocks; and the blocks of a converted stack or encoder-decoder with its own weights,
then all of it, at once and through caches.

Axes: B batch, L positions, S positions of a memory, E model_dim, M enc_out_dim, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ....models.guides.ferrotorch import AttentionLayer
from ....models.guides.scratch import EncoderDecoder, StackConfig, TransformerBlock, TransformerStack, UnbiasedLayerNorm
from ....nn.cache import CrossCache
from ....reference.models.guides import scratch as twin
from ....reference.nn.attention import attention_layer
from ...samples import (
    NO_QUOTIENT,
    Arrays,
    Case,
    Form,
    Options,
    Rng,
    Sample,
    described,
    drawn,
    flat,
    signal,
    with_params,
)

_LENGTHS, _MEMORY = (3, 13), 7
_CHUNKS = (4, 1, 5, 1, 2)  # positions that go through the caches at once, as many as the longest sample has


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


CASES = {
    "unbiased_layer_norm": Case(_norms, _norm, _norm_twin),
    "transformer_block": Case(_blocks, _block, _block_twin, half=4.0, half_vjp=12.0),  # 4 a branch, of three
}


# A checkpoint


def scratch_cases(model: TransformerStack | EncoderDecoder) -> dict[str, Case]:
    """A case for every block, for all of them and for what follows them; of an encoder-decoder for its table too, and
    for what follows that through caches."""
    if isinstance(model, TransformerStack):
        weights = {name: np.array(x) for name, x in flat(model).items()}
        theirs = lambda x, memory: twin.stack(weights, model.config, x, memory)  # noqa: E731
        return {**_own_blocks(model, ""), "stack": _fixed(model, theirs, model.config)}
    config, weights = model.config, {name: np.array(x) for name, x in flat(model).items()}

    def ours(x: mx.array, memory: mx.array | None) -> mx.array:
        return model.unembed(model.decoder(x, memory))

    def cached(x: mx.array, memory: mx.array | None) -> mx.array:
        caches, cross, at, parts = model.make_caches(), [CrossCache() for _ in model.decoder.blocks], 0, []
        for n in _CHUNKS:
            parts.append(model.decoder(x[:, at : at + n], memory, caches=caches, cross_caches=cross))
            at += n
        return model.unembed(mx.concatenate(parts, axis=1))

    def whole(x: np.ndarray, memory: np.ndarray | None) -> np.ndarray:
        return twin.from_embedded(weights, config, x, memory)

    def tokens(rng: Rng) -> Iterator[Sample]:
        for L in _LENGTHS:
            yield Sample(described(tokens=(2, L)), {}, {"tokens": rng.integers(0, config.vocab_size, (2, L))})

    table = Case(
        tokens,
        lambda _, __, options: model.embedded(options["tokens"]),
        lambda _, __, options: twin.embedded(weights, options["tokens"]),
        vjp=False,
    )
    return {
        "embed": table,
        **_own_blocks(model.decoder, "decoder."),
        "logits": _fixed(ours, whole, config.stack),
        "logits, cached": _fixed(cached, whole, config.stack, (sum(_CHUNKS),)),
    }


def attention_cases(model: AttentionLayer) -> dict[str, Case]:
    """The layer with its own weights."""
    own = model.config

    def theirs(params: Arrays, arrays: Arrays, _: Options) -> np.ndarray:
        heads: Options = {"num_heads": own.num_heads, "num_kv_heads": own.kv_heads, "causal": own.causal}
        return attention_layer(params, arrays["x"], **heads)

    return {"attention": _module(model, theirs, (model.config.embed_dim, None))}


def _own_blocks(stack: TransformerStack, prefix: str) -> dict[str, Case]:
    """A case for each block."""
    config = stack.config

    def theirs(params: Arrays, arrays: Arrays, _: Options) -> np.ndarray:
        return twin.block(params, config, arrays["x"], arrays.get("memory"))

    widths = config.model_dim, config.enc_out_dim
    return {f"{prefix}blocks.{i}": _module(block, theirs, widths) for i, block in enumerate(stack.blocks)}


def _inputs(rng: Rng, B: int, L: int, widths: tuple[int, int | None]) -> Arrays:
    arrays = {"x": rng.normal(size=(B, L, widths[0]))}
    if widths[1] is not None:
        arrays["memory"] = rng.normal(size=(B, _MEMORY, widths[1]))
    return arrays


def _module(module: nn.Module, theirs: Form, widths: tuple[int, int | None]) -> Case:
    """A module with its own weights, which are differentiated by as well."""

    def samples(rng: Rng) -> Iterator[Sample]:
        own = {name: np.array(x) for name, x in flat(module).items()}
        arrays = _inputs(rng, 2, _LENGTHS[-1], widths)
        yield Sample(described(**{name: x.shape for name, x in arrays.items()}), arrays, {}, own, joint=True)

    return Case(samples, lambda params, arrays, _: with_params(module, params)(**arrays), theirs)


def _fixed(ours: Any, theirs: Any, config: StackConfig, lengths: tuple[int, ...] = _LENGTHS) -> Case:
    """A function of x (1, L, E) and of the memory (1, S, M) whose weights stay as they are."""

    def samples(rng: Rng) -> Iterator[Sample]:
        for L in lengths:
            arrays = _inputs(rng, 1, L, (config.model_dim, config.enc_out_dim))
            yield Sample(described(**{name: x.shape for name, x in arrays.items()}), arrays)

    def called(form: Any) -> Form:
        return lambda _, arrays, __: form(arrays["x"], arrays.get("memory"))

    return Case(samples, called(ours), called(theirs), vjp=False)
