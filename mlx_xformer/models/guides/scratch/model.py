"""EncoderDecoder: tokens that listen to a continuous memory. Axes: B batch, L positions, S positions of a memory,
E model_dim, M enc_out_dim, V vocab_size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ....nn.cache import CacheMaker, CacheOptions, CrossCache, KVCache
from ....nn.checks import check_last, check_range, check_tokens, expand_key_mask
from ....nn.layers import Embedding, apply_dropout
from ....nn.linear import Linear
from ....nn.transformer import last_positions
from ...bound import Conditioned, add_positions
from .blocks import TransformerStack, needed
from .config import EncoderDecoderConfig


class EncoderDecoder(CacheMaker, nn.Module):
    """Tokens, and a memory that they listen to, to the logits of the tokens after them."""

    def __init__(self, config: EncoderDecoderConfig):
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.stack.model_dim)
        if config.padding_idx is not None:
            self.embed.weight[config.padding_idx] = 0
        self.decoder = TransformerStack(config.stack)
        self.unembed = Linear(config.stack.model_dim, config.vocab_size)

    def __call__(
        self,
        target: mx.array,
        memory: mx.array | None = None,
        *,
        mask: mx.array | None = None,
        memory_mask: mx.array | None = None,
        caches: Sequence[KVCache] | None = None,
        cross_caches: Sequence[CrossCache] | None = None,
        last: int | None = None,
        key: mx.array | None = None,
        check: bool = True,
    ) -> mx.array:
        """Computes the logits of the token after each of a target, given a memory.

        Args:
            target: Tokens (B, L), from 0 to vocab_size - 1. It is causal.
            memory: (B, S, M), if the blocks attend to one.
            mask: Which positions may be attended to, True = attend, broadcast to (B, H, L, L).
            memory_mask: (B, S), True where there is no padding; by default everywhere.
            caches: One for each block. They hold the tokens before these, and these are appended.
            cross_caches: One for each block, for what is projected of the memory.
            last: Of how many of the last positions to compute the logits; by default of all.
            key: The random key of the dropout in training.
            check: Whether to refuse tokens outside the vocabulary, for which the call waits until the tokens are
                computed. A loop that feeds a model its own tokens, as generate() does, goes without.

        Returns:
            Logits (B, L, V), or (B, last, V).

        Raises:
            ValueError: An argument does not fit, or a token is outside the vocabulary.
        """
        check_tokens("target", target, self.config.vocab_size if check else None)
        check_last(last)
        seen = None if memory is None else expand_key_mask("memory_mask", memory_mask, memory.shape)
        first, second = (None, None) if key is None else mx.random.split(key)
        x = self.embedded(target, caches[0] if caches else None, first)
        given: dict[str, Any] = {"mask": mask, "memory_mask": seen, "caches": caches, "cross_caches": cross_caches}
        x = self.decoder(x, memory, **given, key=second)
        return self.unembed(last_positions(x, last))

    decode = __call__  # what generation given a memory calls

    def embedded(self, target: mx.array, cache: KVCache | None = None, key: mx.array | None = None) -> mx.array:
        """(B, L) -> (B, L, E): embeddings and the positions after those of a cache, with dropout in training."""
        config = self.config
        x = self.embed(target)
        if config.padding_idx is not None:
            x = mx.where((target == config.padding_idx)[..., None], mx.stop_gradient(x), x)
        x = add_positions(x, config.max_len, "target", cache)
        if self.training and config.embed_dropout:
            x = apply_dropout(x, config.embed_dropout, needed(key))
        return x

    def loss(self, target: mx.array, memory: mx.array | None = None, **options: Any) -> mx.array:
        """Teacher forcing: the mean cross-entropy, in nats, of every token of (B, L + 1) but the first by what is
        before it; padding is passed over. options: of a call."""
        check_tokens("target", target, self.config.vocab_size)
        if target.shape[1] < 2:
            raise ValueError(f"target must hold at least two tokens a row, got shape {target.shape}")
        logits = self(target[:, :-1], memory, **options, check=False)
        return cross_entropy(logits, target[:, 1:], self.config.padding_idx)

    def caches_for(self, options: CacheOptions) -> list[KVCache]:
        """See make_caches()."""
        return [KVCache.from_options(options) for _ in self.decoder.blocks]

    def conditioned(self, memory: mx.array, memory_mask: mx.array | None = None) -> Conditioned:
        """What generate() takes: the model with a memory (B, S, M), a prompt for each row."""
        return Conditioned(self, memory, memory_mask)


def cross_entropy(logits: mx.array, labels: mx.array, padding_idx: int | None = None) -> mx.array:
    """The mean of -log softmax(logits)[label], in nats, over the labels that are no padding.

    Args:
        logits: (B, L, V).
        labels: (B, L), from 0 to V - 1, or padding_idx.
        padding_idx: The label, if any, of what is passed over.

    Returns:
        A float32 number; 0 if all labels are padding.

    Raises:
        ValueError: A label is out of range.
    """
    check_range("labels", labels, logits.shape[-1], padding_idx)
    counts = mx.ones(labels.shape, mx.bool_) if padding_idx is None else labels != padding_idx
    labels = mx.where(counts, labels, 0)  # a padding_idx may be none of the V
    logits = logits.astype(mx.float32)
    picked = mx.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    each = mx.logsumexp(logits, axis=-1) - picked
    if padding_idx is None:
        return mx.mean(each)
    return mx.sum(mx.where(counts, each, 0)) / mx.maximum(mx.sum(counts), 1)
