"""The Transformer: an encoder of a source and a causal decoder of a target that attends to what the encoder gives.

Sources: Vaswani et al. 2017, arXiv 1706.03762; torch.nn.Transformer, which is what stands between the embeddings and
the logits. Axes: B batch, L target positions, S source positions, E embed_dim, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from ..backend.activations import ACTIVATIONS
from ..nn.cache import CacheMaker, CacheOptions, CrossCache, KVCache
from ..nn.checks import check_last, check_tokens, check_vectors, expand_key_mask
from ..nn.config import LIMITS, Config
from ..nn.layers import Embedding, apply_dropout
from ..nn.linear import Linear
from ..nn.transformer import LayerConfig, Stack, last_positions
from .bound import Conditioned, add_positions


@dataclass(frozen=True)
class TransformerConfig(Config):
    """The fields of a Transformer, checked; those with a default are of Vaswani's base model.

    Without encoder layers there is a decoder only, to which a memory is given, and without decoder layers an encoder
    only.

    Attributes:
        vocab_size: Tokens of the target. None: source and target are vectors (embed_dim wide), which get no positions,
            and so is the result, as in torch.nn.Transformer.
        source_vocab_size: Tokens of the source; by default vocab_size.
        embed_dim: Channels of a position.
        num_heads: Heads of each attention.
        num_encoder_layers: Layers of the encoder.
        num_decoder_layers: Layers of the decoder.
        hidden_dim: Channels inside the feed-forward networks.
        activation: Of the networks: "relu", "gelu" or "gelu_tanh".
        norm_first: Whether norms stand before each step (pre-norm), or after the sums (post-norm).
        final_norm: Whether a norm follows each stack, as in torch.nn.Transformer.
        norm_eps: The eps of the layer norms.
        dropout: The probability, in training, that a number is dropped.
        max_len: The most positions of a source or a target.
        tie_embeddings: Whether source, target and logits have one table.

    Raises:
        ValueError: A field is unknown, of the wrong type or out of range; the message names it.
    """

    _what: ClassVar[str] = "the transformer"

    vocab_size: int | None
    source_vocab_size: int | None = None
    embed_dim: int = 512
    num_heads: int = 8
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    hidden_dim: int = 2048
    activation: str = "relu"
    norm_first: bool = False
    final_norm: bool = False
    norm_eps: float = 1e-5
    dropout: float = 0.1
    max_len: int = 5000
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        if self.vocab_size is not None:
            self._check_whole("vocab_size")
        self._check_whole("source_vocab_size", "embed_dim", "num_heads", "hidden_dim", "max_len")
        most = LIMITS["num_layers"][1]
        self._check_whole(num_encoder_layers=(0, most), num_decoder_layers=(0, most))
        self._check_flags("norm_first", "final_norm", "tie_embeddings")
        self._check_rates("dropout")
        self._check_one_of("activation", ACTIVATIONS)
        self._check_multiple("embed_dim", "num_heads")
        self._check_above_0("norm_eps")
        if not self.num_encoder_layers + self.num_decoder_layers:
            raise ValueError("num_encoder_layers and num_decoder_layers must not both be 0")
        if self.source_vocab_size is None:
            return
        if self.vocab_size is None:
            raise ValueError(f"source_vocab_size must come with vocab_size, got {self.source_vocab_size} alone")
        if self.tie_embeddings and self.source_vocab_size != self.vocab_size:
            raise ValueError(
                f"source_vocab_size must be vocab_size, {self.vocab_size}, with tie_embeddings, "
                f"got {self.source_vocab_size}"
            )

    def layer(self, *, decoder: bool) -> LayerConfig:
        """What the layers of either stack are."""
        return LayerConfig(
            self.embed_dim,
            self.num_heads,
            self.hidden_dim,
            activation=self.activation,
            norm_first=self.norm_first,
            norm_eps=self.norm_eps,
            causal=decoder,
            cross=decoder,
            dropout=self.dropout,
        )


class Transformer(CacheMaker, nn.Module):
    """A source and a target to the logits of the tokens after those of the target, or to vectors."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        if config.vocab_size is not None:
            self._make_tables(config.vocab_size)
        if config.num_encoder_layers:
            self.encoder = Stack(config.layer(decoder=False), config.num_encoder_layers, final_norm=config.final_norm)
        if config.num_decoder_layers:
            self.decoder = Stack(config.layer(decoder=True), config.num_decoder_layers, final_norm=config.final_norm)

    def _make_tables(self, vocab_size: int) -> None:
        """Embeddings whose scale leaves the logits of a new model at about 1."""
        config = self.config
        sides = ["embed"] if config.tie_embeddings else ["source_embed", "target_embed"]
        for name, layers in (("source_embed", config.num_encoder_layers), ("target_embed", config.num_decoder_layers)):
            if not layers and name in sides:
                sides.remove(name)
        for name in sides:
            size = config.source_vocab_size or vocab_size if name == "source_embed" else vocab_size
            self[name] = Embedding(size, config.embed_dim)
            self[name].weight = mx.random.normal((size, config.embed_dim)) * config.embed_dim**-0.5
        if not config.tie_embeddings and config.num_decoder_layers:
            self.lm_head = Linear(config.embed_dim, vocab_size, bias=False)

    def __call__(
        self,
        source: mx.array,
        target: mx.array,
        *,
        source_mask: mx.array | None = None,
        target_mask: mx.array | None = None,
        last: int | None = None,
        key: mx.array | None = None,
    ) -> mx.array:
        """source (B, S) and target (B, L) of tokens -> logits (B, L, V), or (B, last, V) of the last positions only;
        without a vocabulary (B, S, E) and (B, L, E) -> (B, L, E). source_mask (B, S), target_mask (B, L): True where
        there is no padding. key: random, for dropout in training."""
        if self.config.vocab_size is not None:
            check_tokens("target", target, self.config.vocab_size)
        keys = [None, None] if key is None else list(mx.random.split(key))
        memory = self.encode(source, source_mask=source_mask, key=keys[0])
        given: dict[str, Any] = {"memory_mask": source_mask, "target_mask": target_mask, "last": last, "key": keys[1]}
        return self.decode(target, memory, **given)

    def encode(self, source: mx.array, *, source_mask: mx.array | None = None, key: mx.array | None = None) -> mx.array:
        """source (B, S), or (B, S, E) without a vocabulary -> the memory (B, S, E)."""
        if "encoder" not in self:
            raise ValueError("encode() needs encoder layers, got num_encoder_layers 0")
        keys = [None, None] if key is None else list(mx.random.split(key))
        x = self._embedded("source", source, self.config.source_vocab_size or self.config.vocab_size, None, keys[0])
        return self.encoder(x, mask=expand_key_mask("source_mask", source_mask, source.shape), key=keys[1])

    def decode(
        self,
        target: mx.array,
        memory: mx.array,
        *,
        memory_mask: mx.array | None = None,
        target_mask: mx.array | None = None,
        caches: Sequence[KVCache] | None = None,
        cross_caches: Sequence[CrossCache] | None = None,
        last: int | None = None,
        key: mx.array | None = None,
        check: bool = True,
    ) -> mx.array:
        """Computes the logits of the token after each of a target, given a memory.

        Args:
            target: Tokens (B, L), from 0 to vocab_size - 1; without a vocabulary vectors (B, L, E). It is causal.
            memory: (B, S, E), what encode() gives.
            memory_mask: (B, S), True where there is no padding; by default everywhere.
            target_mask: (B, L), likewise.
            caches: One for each layer. They hold the positions before the target, which is appended.
            cross_caches: One for each layer, for what is projected of the memory.
            last: Of how many of the last positions to compute the result; by default of all.
            key: The random key of the dropout in training.
            check: Whether to refuse tokens outside the vocabulary, for which the call waits until the tokens are
                computed. A loop that feeds a model its own tokens, as generate() does, goes without.

        Returns:
            Logits (B, L, V), or (B, last, V); without a vocabulary vectors (B, L, E), or (B, last, E).

        Raises:
            ValueError: An argument does not fit, or a token is outside the vocabulary.
        """
        if "decoder" not in self:
            raise ValueError("decode() needs decoder layers, got num_decoder_layers 0")
        check_last(last)
        keys = [None, None] if key is None else list(mx.random.split(key))
        check_vectors("memory", memory, self.config.embed_dim)
        x = self._embedded("target", target, self.config.vocab_size if check else None, caches, keys[0])
        x = self.decoder(
            x,
            memory,
            mask=expand_key_mask("target_mask", target_mask, target.shape),
            memory_mask=expand_key_mask("memory_mask", memory_mask, memory.shape),
            caches=caches,
            cross_caches=cross_caches,
            key=keys[1],
        )
        x = last_positions(x, last)
        if self.config.vocab_size is None:
            return x
        return self.embed.as_linear(x) if self.config.tie_embeddings else self.lm_head(x)

    def _embedded(
        self, side: str, x: mx.array, size: int | None, caches: Sequence[KVCache] | None, key: mx.array | None
    ) -> mx.array:
        """Tokens (B, L) of a side, below `size`, as vectors times sqrt(E), with their positions; vectors as they
        are."""
        config = self.config
        if config.vocab_size is None:
            check_vectors(side, x, config.embed_dim)
            return x
        check_tokens(side, x, size)
        table = self.embed if config.tie_embeddings else self[f"{side}_embed"]
        x = add_positions(table(x) * math.sqrt(config.embed_dim), config.max_len, side, caches[0] if caches else None)
        return apply_dropout(x, config.dropout, key) if self.training else x

    def caches_for(self, options: CacheOptions) -> list[KVCache]:
        """See make_caches(): of the layers of the decoder."""
        if "decoder" not in self:
            raise ValueError("make_caches() needs decoder layers, got num_decoder_layers 0")
        return self.decoder.caches_for(options)

    def conditioned(self, source: mx.array, source_mask: mx.array | None = None) -> Conditioned:
        """What generate() takes: the decoder with what the encoder gives of a source (B, S), for one prompt a row.
        ValueError for tokens outside the vocabulary."""
        if self.config.vocab_size is None:
            raise ValueError("conditioned() needs a vocabulary, got vocab_size None")
        return Conditioned(self, self.encode(source, source_mask=source_mask), source_mask)
