"""EncoderDecoder: tokens that listen to a continuous memory. Axes: B batch, L positions, S positions of a memory,
E model_dim, M enc_out_dim, V vocab_size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ... import kernels
from ...cache import CrossCache, KVCache
from ...layers import Embedding, dropped
from ...positions import sinusoidal
from .blocks import TransformerStack, needed
from .config import EncoderDecoderConfig


class EncoderDecoder(nn.Module):
    """Tokens, and a memory that they listen to, to the logits of the tokens after them."""

    def __init__(self, config: EncoderDecoderConfig):
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.stack.model_dim)
        if config.padding_idx is not None:
            self.embed.weight[config.padding_idx] = 0
        self.decoder = TransformerStack(config.stack)
        self.unembed = kernels.Linear(config.stack.model_dim, config.vocab_size)

    def __call__(
        self, tokens: mx.array, memory: mx.array | None = None, *, key: mx.array | None = None, **options: Any
    ) -> mx.array:
        """tokens (B, L), memory (B, S, M) -> logits (B, L, V), as `decode`, after a look at all tokens. ValueError for
        one beyond the vocabulary, where MLX would read on without a word."""
        size = self.config.vocab_size
        wrong = mx.logical_or(tokens < 0, tokens >= size)
        if mx.any(wrong).item():
            got = mx.max(mx.where(wrong, tokens, -(2**31))).item()
            raise ValueError(f"tokens must be from 0 to {size - 1}, got {got}")
        return self.decode(tokens, memory, key=key, **options)

    def decode(
        self,
        tokens: mx.array,
        memory: mx.array | None = None,
        *,
        mask: mx.array | None = None,
        memory_mask: mx.array | None = None,
        caches: Sequence[KVCache] | None = None,
        cross_caches: Sequence[CrossCache] | None = None,
        last: int | None = None,
        key: mx.array | None = None,
    ) -> mx.array:
        """The logits (B, L, V), or (B, last, V) of the last positions only. `caches` have the tokens before, and get
        these. See TransformerBlock for the rest."""
        if tokens.ndim != 2:
            raise ValueError(f"tokens must be (batch, length), got shape {tokens.shape}")
        if last is not None and last < 0:
            raise ValueError(f"last must be at least 0, got {last}")
        first, second = (None, None) if key is None else mx.random.split(key)
        x = self.embedded(tokens, None if caches is None else caches[0], first)
        shared: dict[str, Any] = {"mask": mask, "memory_mask": memory_mask, "key": second}
        x = self.decoder(x, memory, caches=caches, cross_caches=cross_caches, **shared)
        return self.unembed(x if last is None or last >= x.shape[1] else x[:, x.shape[1] - last :])

    def embedded(self, tokens: mx.array, cache: KVCache | None = None, key: mx.array | None = None) -> mx.array:
        """(B, L) -> (B, L, E): embeddings and the positions after those of a cache, with dropout in training."""
        config, L = self.config, tokens.shape[1]
        offset = 0 if cache is None else cache.offset
        padding = 0 if cache is None else min(cache.padding or (0,))
        end = L if cache is None else cache.length - padding + L
        if end > config.max_len:
            raise ValueError(f"tokens must be at most max_len, {config.max_len}, with those cached, got {end}")
        x = self.embed(tokens)
        if config.padding_idx is not None:
            x = mx.where((tokens == config.padding_idx)[..., None], mx.stop_gradient(x), x)
        if isinstance(offset, int):
            x = x + sinusoidal(L, config.stack.model_dim, offset=offset).astype(x.dtype)
        else:  # of every row; those inside its padding are seen by nothing
            at = mx.maximum(offset[:, None] + mx.arange(L), 0)
            x = x + sinusoidal(end, config.stack.model_dim)[at].astype(x.dtype)
        if self.training and config.embed_dropout:
            x = dropped(x, config.embed_dropout, needed(key))
        return x

    def loss(self, tokens: mx.array, memory: mx.array | None = None, **options: Any) -> mx.array:
        """Teacher forcing: the mean cross-entropy, in nats, of every token of (B, L + 1) but the first by what is
        before it; padding is passed over. options: of `decode`."""
        logits = self(tokens[:, :-1], memory, **options)
        return cross_entropy(logits, tokens[:, 1:], self.config.padding_idx)

    def make_caches(self, **options: Any) -> list[KVCache]:
        """A cache of self-attention for each block. options: of KVCache."""
        return [KVCache(**options) for _ in self.decoder.blocks]

    def make_cross_caches(self) -> list[CrossCache]:
        """A cache of the memory for each block."""
        return [CrossCache() for _ in self.decoder.blocks]


def cross_entropy(logits: mx.array, labels: mx.array, padding_idx: int | None = None) -> mx.array:
    """The mean of -log softmax(logits)[label] over the labels that are no padding; 0 if all are. (B, L, V), (B, L)."""
    logits = logits.astype(mx.float32)
    picked = mx.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    each = mx.logsumexp(logits, axis=-1) - picked
    if padding_idx is None:
        return mx.mean(each)
    counts = labels != padding_idx
    return mx.sum(mx.where(counts, each, 0)) / mx.maximum(mx.sum(counts), 1)


class Listener(nn.Module):
    """An EncoderDecoder with the memory of one recording, as generate() takes it: the memory is projected once. Make
    another after training, or for another memory."""

    def __init__(self, model: EncoderDecoder, memory: mx.array, memory_mask: mx.array | None = None):
        super().__init__()
        if memory.ndim != 3 or memory.shape[0] != 1:
            raise ValueError(f"memory must be (1, length, channels), of one row, got shape {memory.shape}")
        self.config, self.model = model.config, model
        self._memory, self._mask, self._cross = memory, memory_mask, model.make_cross_caches()

    def __call__(
        self, tokens: mx.array, *, caches: Sequence[KVCache] | None = None, last: int | None = None
    ) -> mx.array:
        """tokens (1, L) -> logits (1, L, V), or (1, last, V) of the last positions only."""
        options: dict[str, Any] = {"caches": caches, "cross_caches": self._cross, "last": last}
        return self.model.decode(tokens, self._memory, memory_mask=self._mask, **options)

    def make_caches(self, **options: Any) -> list[KVCache]:
        """As EncoderDecoder's."""
        return self.model.make_caches(**options)
