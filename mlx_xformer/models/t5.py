"""T5: an encoder of a text and a decoder that answers it; also T5 1.1 and FLAN-T5, by configuration.

Source: Raffel et al. 2020, arXiv 1910.10683, as transformers has it: norms without bias or mean before every step,
scores that are not scaled, and to all layers of a side the same bias by distance. Axes: B batch, S tokens of the text,
L tokens of the answer, H heads, E embed_dim, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from ..backend.activations import ACTIVATIONS, GATED
from ..nn.cache import CacheMaker, CacheOptions, CrossCache, KVCache
from ..nn.checks import check_last, check_tokens, expand_key_mask
from ..nn.config import Config
from ..nn.layers import Embedding, apply_dropout
from ..nn.linear import Linear
from ..nn.positions import buckets_by_distance
from ..nn.transformer import LayerConfig, Stack, last_positions
from .bound import Conditioned


@dataclass(frozen=True)
class T5Config(Config):
    """The fields of a T5, checked.

    Attributes:
        vocab_size: Tokens, V.
        embed_dim: Channels of a token.
        num_layers: Layers of the encoder.
        num_heads: Heads of each attention.
        head_dim: Channels of a head.
        hidden_dim: Channels inside the feed-forward networks.
        num_decoder_layers: Layers of the decoder; by default num_layers.
        activation: Of the networks: "relu", "gelu" or "gelu_tanh"; gated "silu" or "gelu_tanh".
        gated: Whether the networks are gated.
        num_buckets: See relative_buckets().
        max_distance: See relative_buckets().
        norm_eps: The eps of the RMS norms.
        tie_embeddings: Whether the logits are products with the table of embeddings.
        scale_logits: Whether what is multiplied there is divided by sqrt(embed_dim), as in models whose logits were
            tied in training.
        dropout: The probability, in training, that a number is dropped.
        start_token: What an answer begins with.

    Raises:
        ValueError: A field is unknown, of the wrong type or out of range; the message names it.
    """

    _what: ClassVar[str] = "the T5"

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    head_dim: int
    hidden_dim: int
    num_decoder_layers: int | None = None
    activation: str = "relu"
    gated: bool = False
    num_buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    scale_logits: bool = True
    dropout: float = 0.0
    start_token: int = 0

    def __post_init__(self) -> None:
        if self.num_decoder_layers is None:
            object.__setattr__(self, "num_decoder_layers", self.num_layers)
        self._check_whole("vocab_size", "embed_dim", "num_layers", "num_heads", "head_dim", "hidden_dim")
        self._check_whole("num_decoder_layers", "num_buckets", "max_distance")
        self._check_flags("gated", "tie_embeddings", "scale_logits")
        self._check_one_of("activation", GATED if self.gated else ACTIVATIONS)
        self._check_above_0("norm_eps")
        self._check_rates("dropout")
        if type(self.start_token) is not int or not 0 <= self.start_token < self.vocab_size:
            raise ValueError(f"start_token must be from 0 to {self.vocab_size - 1}, got {self.start_token!r:.80}")
        for bidirectional in (True, False):
            self.buckets(1, 1, bidirectional=bidirectional)

    def buckets(self, L: int, S: int, *, bidirectional: bool) -> mx.array:
        """See positions.buckets_by_distance."""
        sizes = {"num_buckets": self.num_buckets, "max_distance": self.max_distance}
        return buckets_by_distance(L, S, **sizes, bidirectional=bidirectional)

    @property
    def encoder(self) -> LayerConfig:
        """What each layer of the encoder is."""
        return self._layer()

    @property
    def decoder(self) -> LayerConfig:
        """What each layer of the decoder is."""
        return self._layer(causal=True, cross=True)

    def _layer(self, **more: Any) -> LayerConfig:
        return LayerConfig(
            self.embed_dim,
            self.num_heads,
            self.hidden_dim,
            head_dim=self.head_dim,
            activation=self.activation,
            gated=self.gated,
            norm="rms",
            norm_first=True,
            norm_eps=self.norm_eps,
            bias=False,
            ffn_bias=False,
            scale=1.0,
            dropout=self.dropout,
            **more,
        )


class Side(nn.Module):
    """The encoder or the decoder: layers in a row, a norm, and what all of them add to scores by distance."""

    def __init__(self, config: T5Config, layer: LayerConfig, num_layers: int):
        super().__init__()
        self.config = config
        self.stack = Stack(layer, num_layers, final_norm=True)
        self.relative = nn.Embedding(config.num_buckets, config.num_heads)

    def __call__(
        self,
        x: mx.array,
        memory: mx.array | None = None,
        *,
        caches: Sequence[KVCache] | None = None,
        key: mx.array | None = None,
        **options: Any,
    ) -> mx.array:
        """As Stack, x (B, L, E) -> the same. With caches x follows what they hold."""
        rate = self.config.dropout if self.training else 0.0
        first, inner, last = [None] * 3 if key is None else mx.random.split(key, 3)
        held = caches[0].length if caches else 0
        bias = self.bias(x.shape[1], held + x.shape[1])
        x = self.stack(apply_dropout(x, rate, first), memory, bias=bias, caches=caches, key=inner, **options)
        return apply_dropout(x, rate, last)

    def bias(self, L: int, S: int) -> mx.array:
        """What is added to the scores of the last L of S positions, (H, L, S)."""
        bidirectional = not self.stack.config.causal
        by_distance = self.relative(self.config.buckets(L, S, bidirectional=bidirectional)).T  # (H, S + L - 1)
        ahead = mx.arange(S)[None] - mx.arange(L)[:, None] + (L - 1)
        return mx.take(by_distance, ahead, axis=1)


class T5(CacheMaker, nn.Module):
    """A text and the beginning of an answer to the logits of the answer's next tokens."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        assert config.num_decoder_layers is not None  # for the type checker: the configuration has set it
        self.shared = Embedding(config.vocab_size, config.embed_dim)
        self.encoder = Side(config, config.encoder, config.num_layers)
        self.decoder = Side(config, config.decoder, config.num_decoder_layers)
        if not config.tie_embeddings:
            self.lm_head = Linear(config.embed_dim, config.vocab_size, bias=False)

    def __call__(
        self, source: mx.array, tokens: mx.array, *, mask: mx.array | None = None, key: mx.array | None = None
    ) -> mx.array:
        """source (B, S), tokens (B, L), which begin with the start token -> logits (B, L, V) of the tokens after each.
        mask (B, S): True where the source is valid. key: random, for dropout in training."""
        keys = [None] * 2 if key is None else mx.random.split(key, 2)
        check_tokens("tokens", tokens, self.config.vocab_size)
        memory = self.encode(source, mask=mask, key=keys[0])
        return self.decode(tokens, memory, memory_mask=mask, key=keys[1])

    def encode(self, source: mx.array, *, mask: mx.array | None = None, key: mx.array | None = None) -> mx.array:
        """source (B, S) -> the memory (B, S, E) that answers attend to."""
        check_tokens("source", source, self.config.vocab_size)
        return self.encoder(self.shared(source), mask=expand_key_mask("mask", mask, source.shape), key=key)

    def decode(
        self,
        tokens: mx.array,
        memory: mx.array,
        *,
        memory_mask: mx.array | None = None,
        caches: Sequence[KVCache] | None = None,
        cross_caches: Sequence[CrossCache] | None = None,
        last: int | None = None,
        key: mx.array | None = None,
        check: bool = True,
    ) -> mx.array:
        """Computes the logits of the token after each, given a memory.

        Args:
            tokens: (B, L), from 0 to vocab_size - 1.
            memory: (B, S, E), what encode() gives.
            memory_mask: (B, S), True where the memory is valid; by default everywhere.
            caches: One for each layer. They hold the tokens before these, and these are appended.
            cross_caches: One for each layer, for what is projected of the memory.
            last: Of how many of the last positions to compute the logits; by default of all.
            key: The random key of the dropout in training.
            check: Whether to refuse tokens outside the vocabulary, for which the call waits until the tokens are
                computed. A loop that feeds a model its own tokens, as generate() does, goes without.

        Returns:
            Logits (B, L, V), or (B, last, V).

        Raises:
            ValueError: An argument does not fit, or a token is outside the vocabulary.
        """
        check_tokens("tokens", tokens, self.config.vocab_size if check else None)
        if memory.ndim != 3 or memory.shape[::2] != (len(tokens), self.config.embed_dim):
            expected = f"({len(tokens)}, S, {self.config.embed_dim})"
            raise ValueError(f"memory must be {expected}, the batch of the tokens by embed_dim, got {memory.shape}")
        memory_mask = expand_key_mask("memory_mask", memory_mask, memory.shape)
        check_last(last)
        more: dict[str, Any] = {"memory_mask": memory_mask, "caches": caches, "cross_caches": cross_caches, "key": key}
        x = self.decoder(self.shared(tokens), memory, **more)
        return self.logits(last_positions(x, last))

    def logits(self, x: mx.array) -> mx.array:
        """What the decoder gives, (B, L, E) -> (B, L, V)."""
        if self.config.scale_logits:
            x = x * self.config.embed_dim**-0.5
        return self.shared.as_linear(x) if self.config.tie_embeddings else self.lm_head(x)

    def caches_for(self, options: CacheOptions) -> list[KVCache]:
        """See make_caches(): of the layers of the decoder, whose bias by distance needs keep 0."""
        return self.decoder.stack.caches_for(options)

    def conditioned(self, source: mx.array, *, mask: mx.array | None = None) -> Conditioned:
        """The model given texts (B, S), see encode, for generate() (of one) or batch_generate(): an answer begins with
        [config.start_token]."""
        return Conditioned(self, self.encode(source, mask=mask), mask)
