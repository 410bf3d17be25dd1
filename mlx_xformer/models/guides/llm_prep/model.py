"""The models of llm_prep: a pooled regression, an autoregressive model of sequences, an encoder-decoder.

Source: venkatvi/llm_prep, transformer/README.md. Post-norm layers with ReLU on learned projections of vectors with
sinusoidal positions. What is causal there by name only is causal here, and caches are objects that a call is given.
Axes: B batch, L positions, S source positions, I input_dim, E embed_dim, O output_dim, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ....nn.cache import CacheMaker, CacheOptions, CrossCache, KVCache
from ....nn.checks import check_last, check_tokens, check_vectors, expand_key_mask
from ....nn.layers import Embedding
from ....nn.linear import Linear
from ....nn.moe import Routing
from ....nn.transformer import Stack, last_positions
from ...bound import Conditioned, add_positions
from .config import SequenceCheckpoint, SequenceConfig


class TransformerModel(nn.Module):
    """A sequence to one vector: the mean of its positions behind the layers, projected."""

    def __init__(self, config: SequenceConfig):
        super().__init__()
        for name in ("window", "vocab_size", "num_decoder_layers"):
            if getattr(config, name) is not None:
                raise ValueError(f"{name} must be None: a regression is not causal, got {getattr(config, name)}")
        self.config = config
        self.input_proj = Linear(config.input_dim, config.embed_dim)
        self.stack = Stack(config.layer(causal=False), config.num_layers)
        self.out_proj = Linear(config.embed_dim, config.output_dim)

    def __call__(self, x: mx.array, *, mask: mx.array | None = None, routings: list[Routing] | None = None) -> mx.array:
        """x (B, L, I) -> (B, O). mask (B, L): True where there is no padding, which is neither attended to nor part of
        the mean; a row of nothing else has the mean 0. routings gets where a mixture's tokens went."""
        check_vectors("x", x, self.config.input_dim)
        keys = expand_key_mask("mask", mask, x.shape)
        y = add_positions(self.input_proj(x), self.config.max_len, "x")
        y = self.stack(y, mask=keys, routings=routings)
        counted = mx.ones((*y.shape[:2],), y.dtype) if mask is None else mask.astype(y.dtype)
        weights = counted / mx.maximum(counted.sum(axis=1, keepdims=True), 1)
        return self.out_proj((weights[:, None] @ y)[:, 0])  # a product, as long sums in sequence round too much


class AutoregressiveTransformerModel(CacheMaker, nn.Module):
    """A sequence to what follows each of its positions. It is causal. With a vocabulary generate() takes it."""

    def __init__(self, config: SequenceConfig):
        super().__init__()
        if config.num_decoder_layers is not None:
            raise ValueError(f"num_decoder_layers must be None: there is one stack, got {config.num_decoder_layers}")
        self.config = config
        self.input_proj = Linear(config.input_dim, config.embed_dim)
        self.stack = Stack(config.layer(causal=True), config.num_layers)
        self.out_proj = Linear(config.embed_dim, config.output_dim)
        _add_vocabulary(self, config)

    def __call__(
        self,
        x: mx.array,
        *,
        caches: Sequence[KVCache] | None = None,
        last: int | None = None,
        routings: list[Routing] | None = None,
        check: bool = True,
    ) -> mx.array:
        """x (B, L, I) -> (B, L, O), or tokens (B, L) -> logits (B, L, V); with `last` of so many last positions only.
        `caches`, one a layer, have what came before, and get x. check: whether to refuse tokens outside the
        vocabulary, for which the call waits until they are computed."""
        check_last(last)
        y = self.input_proj(_vectors(self, "x", x, check))
        y = add_positions(y, self.config.max_len, "x", caches[0] if caches else None)
        return _answer(self, self.stack(y, caches=caches, routings=routings), last)

    def generate_next_token(self, x: mx.array, *, caches: Sequence[KVCache] | None = None) -> mx.array:
        """What follows x (B, L, I), of which the caches then need not be told again: (B, 1, O), or logits (B, 1, V)."""
        if x.ndim < 2 or not x.shape[1]:
            raise ValueError(f"x must hold at least one position, got shape {x.shape}")
        return self(x, caches=caches, last=1)

    def generate(self, x: mx.array, steps: int, *, caches: Sequence[KVCache] | None = None) -> mx.array:
        """x (B, L, I) goes on by as many vectors, each fed back alone: (B, steps, O). caches: from make_caches(), by
        default without options."""
        caches = self.make_caches() if caches is None else caches
        return _fed_back(self.config, x, steps, lambda x: self.generate_next_token(x, caches=caches))

    def caches_for(self, options: CacheOptions) -> list[KVCache]:
        """See make_caches()."""
        return self.stack.caches_for(options)


class EncoderDecoder(CacheMaker, nn.Module):
    """A source and a target to what follows each position of the target, which is causal; the source is seen whole."""

    def __init__(self, config: SequenceConfig):
        super().__init__()
        self.config = config
        self.encoder_input_proj = Linear(config.input_dim, config.embed_dim)
        self.decoder_input_proj = Linear(config.input_dim, config.embed_dim)
        self.encoder = Stack(config.layer(causal=False), config.num_layers)
        self.decoder = Stack(config.layer(causal=True, cross=True), config.decoder_layers)
        self.out_proj = Linear(config.embed_dim, config.output_dim)
        _add_vocabulary(self, config)

    def __call__(
        self,
        source: mx.array,
        target: mx.array,
        *,
        source_mask: mx.array | None = None,
        last: int | None = None,
        routings: list[Routing] | None = None,
    ) -> mx.array:
        """source (B, S, I), target (B, L, I) -> (B, L, O), or target tokens (B, L) -> logits (B, L, V)."""
        _check_tokens(self, "target", target)
        memory = self.encode(source, source_mask=source_mask, routings=routings)
        return self.decode(target, memory, memory_mask=source_mask, last=last, routings=routings)

    def encode(
        self, source: mx.array, *, source_mask: mx.array | None = None, routings: list[Routing] | None = None
    ) -> mx.array:
        """source (B, S, I) -> the memory (B, S, E). source_mask (B, S): True where there is no padding."""
        check_vectors("source", source, self.config.input_dim)
        x = add_positions(self.encoder_input_proj(source), self.config.max_len, "source")
        return self.encoder(x, mask=expand_key_mask("source_mask", source_mask, source.shape), routings=routings)

    def decode(
        self,
        target: mx.array,
        memory: mx.array,
        *,
        memory_mask: mx.array | None = None,
        caches: Sequence[KVCache] | None = None,
        cross_caches: Sequence[CrossCache] | None = None,
        last: int | None = None,
        routings: list[Routing] | None = None,
        check: bool = True,
    ) -> mx.array:
        """As a call, given a memory (B, S, E). `caches`, one a layer, have what came before and get the target;
        cross_caches hold the projected memory. check: whether to refuse tokens outside the vocabulary, for which the
        call waits until they are computed."""
        check_last(last)
        check_vectors("memory", memory, self.config.embed_dim)
        y = self.decoder_input_proj(_vectors(self, "target", target, check))
        y = add_positions(y, self.config.max_len, "target", caches[0] if caches else None)
        seen = expand_key_mask("memory_mask", memory_mask, memory.shape)
        given: dict[str, Any] = {"memory_mask": seen, "caches": caches, "cross_caches": cross_caches}
        return _answer(self, self.decoder(y, memory, **given, routings=routings), last)

    def generate(
        self,
        source: mx.array,
        start: mx.array,
        steps: int,
        *,
        source_mask: mx.array | None = None,
        caches: Sequence[KVCache] | None = None,
    ) -> mx.array:
        """`start` (B, L, I) goes on by as many vectors, each fed back alone: (B, steps, O). caches: from make_caches(),
        by default without options."""
        memory, caches = self.encode(source, source_mask=source_mask), self.make_caches() if caches is None else caches
        cross_caches = [CrossCache() for _ in caches]
        given: dict[str, Any] = {"memory_mask": source_mask, "caches": caches, "cross_caches": cross_caches}
        return _fed_back(self.config, start, steps, lambda x: self.decode(x, memory, **given, last=1))

    def caches_for(self, options: CacheOptions) -> list[KVCache]:
        """See make_caches(): of the layers of the decoder."""
        return self.decoder.caches_for(options)

    def conditioned(self, source: mx.array, source_mask: mx.array | None = None) -> Conditioned:
        """What generate() takes: the decoder with what the encoder gives of a source (B, S, I), a prompt for each
        row."""
        if self.config.vocab_size is None:
            raise ValueError("conditioned() needs a vocabulary, got vocab_size None")
        return Conditioned(self, self.encode(source, source_mask=source_mask), source_mask)


MODELS: dict[str, type[nn.Module]] = {
    "regression": TransformerModel,
    "autoregressive": AutoregressiveTransformerModel,
    "encoder_decoder": EncoderDecoder,
}


def make(checkpoint: SequenceCheckpoint) -> nn.Module:
    """The model of a checkpoint, with fresh weights."""
    kind: Any = MODELS[checkpoint.model]
    return kind(checkpoint.config)


def _add_vocabulary(model: nn.Module, config: SequenceConfig) -> None:
    if config.vocab_size is not None:
        model.embed_tokens = Embedding(config.vocab_size, config.input_dim)
        model.lm_head = Linear(config.output_dim, config.vocab_size)


def _check_tokens(model: nn.Module, name: str, x: mx.array) -> None:
    """ValueError for tokens outside the vocabulary, if there is one."""
    if model.config.vocab_size is not None:
        check_tokens(name, x, model.config.vocab_size)


def _vectors(model: nn.Module, name: str, x: mx.array, check: bool) -> mx.array:
    """Vectors (B, L, I) as they are, tokens (B, L) as rows of the table."""
    if "embed_tokens" in model:
        check_tokens(name, x, model.config.vocab_size if check else None)
        return model.embed_tokens(x)
    check_vectors(name, x, model.config.input_dim)
    return x


def _answer(model: nn.Module, x: mx.array, last: int | None) -> mx.array:
    """What the layers give (B, L, E), of the last positions, as vectors or logits."""
    x = model.out_proj(last_positions(x, last))
    return model.lm_head(x) if "lm_head" in model else x


def _fed_back(config: SequenceConfig, x: mx.array, steps: int, step: Callable[[mx.array], mx.array]) -> mx.array:
    """What `step` makes of x, and then of what it made, so many times: (B, steps, O)."""
    if config.vocab_size is not None or config.output_dim != config.input_dim:
        raise ValueError(
            f"outputs must be inputs to be fed back, {config.input_dim} wide, got {config.output_dim}"
            f"{'' if config.vocab_size is None else ' and a vocabulary, which generate.generate is for'}"
        )
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    found = []
    for _ in range(steps):
        x = step(x)
        mx.async_eval(x)
        found.append(x)
    return mx.concatenate(found, axis=1)
