"""EncoderDecoder: tokens that listen to a continuous memory. Axes: B batch, L positions, S positions of a memory,
E model_dim, M enc_out_dim, V vocab_size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ....nn.cache import CrossCache, KVCache
from ....nn.checks import check_tokens, key_mask
from ....nn.layers import Embedding, dropped
from ....nn.linear import Linear
from ...bound import Conditioned, positioned
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
        self.unembed = Linear(config.stack.model_dim, config.vocab_size)

    def __call__(
        self,
        target: mx.array,
        memory: mx.array | None = None,
        *,
        caches: Sequence[KVCache] | None = None,
        **options: Any,
    ) -> mx.array:
        """As `decode`. Without caches all tokens are looked at first, which waits for them: ValueError for one outside
        the vocabulary."""
        if caches is None:
            check_tokens("target", target, self.config.vocab_size)
        return self.decode(target, memory, caches=caches, **options)

    def decode(
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
    ) -> mx.array:
        """target (B, L), memory (B, S, M) -> logits (B, L, V), or (B, last, V) of the last positions only. mask: which
        positions may be attended to, broadcast to (B, H, L, L); memory_mask (B, S): True where there is no padding.
        `caches`, one a block, have what came before, and get the target; cross_caches hold the projected memory."""
        check_tokens("target", target)
        if last is not None and last < 0:
            raise ValueError(f"last must be at least 0, got {last}")
        seen = None if memory is None else key_mask("memory_mask", memory_mask, memory.shape)
        first, second = (None, None) if key is None else mx.random.split(key)
        x = self.embedded(target, caches[0] if caches else None, first)
        given: dict[str, Any] = {"mask": mask, "memory_mask": seen, "caches": caches, "cross_caches": cross_caches}
        x = self.decoder(x, memory, **given, key=second)
        return self.unembed(x if last is None or last >= x.shape[1] else x[:, x.shape[1] - last :])

    def embedded(self, target: mx.array, cache: KVCache | None = None, key: mx.array | None = None) -> mx.array:
        """(B, L) -> (B, L, E): embeddings and the positions after those of a cache, with dropout in training."""
        config = self.config
        x = self.embed(target)
        if config.padding_idx is not None:
            x = mx.where((target == config.padding_idx)[..., None], mx.stop_gradient(x), x)
        x = positioned(x, config.max_len, "target", cache)
        if self.training and config.embed_dropout:
            x = dropped(x, config.embed_dropout, needed(key))
        return x

    def loss(self, target: mx.array, memory: mx.array | None = None, **options: Any) -> mx.array:
        """Teacher forcing: the mean cross-entropy, in nats, of every token of (B, L + 1) but the first by what is
        before it; padding is passed over. options: of `decode`."""
        check_tokens("target", target)
        if target.shape[1] < 2:
            raise ValueError(f"target must hold at least two tokens a row, got shape {target.shape}")
        logits = self(target[:, :-1], memory, **options)
        return cross_entropy(logits, target[:, 1:], self.config.padding_idx)

    def make_caches(self, **options: Any) -> list[KVCache]:
        """A cache of self-attention for each block. options: of KVCache."""
        return [KVCache(**options) for _ in self.decoder.blocks]

    def conditioned(self, memory: mx.array, memory_mask: mx.array | None = None) -> Conditioned:
        """What generate() takes: the model with a memory (B, S, M), a prompt for each row."""
        return Conditioned(self, memory, memory_mask)


def cross_entropy(logits: mx.array, labels: mx.array, padding_idx: int | None = None) -> mx.array:
    """The mean of -log softmax(logits)[label] over the labels that are no padding; 0 if all are. (B, L, V), (B, L)."""
    logits = logits.astype(mx.float32)
    picked = mx.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    each = mx.logsumexp(logits, axis=-1) - picked
    if padding_idx is None:
        return mx.mean(each)
    counts = labels != padding_idx
    return mx.sum(mx.where(counts, each, 0)) / mx.maximum(mx.sum(counts), 1)
