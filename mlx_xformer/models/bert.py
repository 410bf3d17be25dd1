"""BERT: tokens to a vector for each, by an encoder that sees both sides; and vectors of whole sentences.

Sources: Devlin et al. 2019, arXiv 1810.04805; names as in transformers' BertModel where ours have no others; sentences
by Reimers and Gurevych 2019, arXiv 1908.10084. Axes: B batch, L tokens, E embed_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from ..backend.activations import ACTIVATIONS
from ..nn.checks import check_mask, check_tokens, expand_key_mask
from ..nn.config import Config
from ..nn.layers import LayerNorm
from ..nn.linear import Linear
from ..nn.transformer import LayerConfig, Stack


@dataclass(frozen=True)
class BertConfig(Config):
    """The fields of a Bert, checked.

    Attributes:
        vocab_size: Tokens.
        embed_dim: Channels of a token.
        num_layers: Layers.
        num_heads: Heads of each attention.
        hidden_dim: Channels inside the feed-forward networks.
        max_positions: The most tokens of a text.
        num_token_types: Kinds of segments.
        activation: Of the networks: "gelu", "gelu_tanh" or "relu".
        norm_eps: The eps of the layer norms.
        pooler: Whether there is a layer on the first token, see Bert.pool.

    Raises:
        ValueError: A field is unknown, of the wrong type or out of range; the message names it.
    """

    _what: ClassVar[str] = "the BERT"

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    hidden_dim: int
    max_positions: int = 512
    num_token_types: int = 2
    activation: str = "gelu"
    norm_eps: float = 1e-12
    pooler: bool = True

    def __post_init__(self) -> None:
        self._check_whole("vocab_size", "embed_dim", "num_layers", "num_heads", "hidden_dim")
        self._check_whole("max_positions", "num_token_types")
        self._check_multiple("embed_dim", "num_heads")
        self._check_one_of("activation", ACTIVATIONS)
        self._check_above_0("norm_eps")
        self._check_flags("pooler")

    @property
    def layer(self) -> LayerConfig:
        """What each layer is."""
        sizes = self.embed_dim, self.num_heads, self.hidden_dim
        return LayerConfig(*sizes, activation=self.activation, norm_eps=self.norm_eps)


class Embeddings(nn.Module):
    """The vectors of a token, of its place and of its segment, added and normed."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.embed_dim)
        self.position_embeddings = nn.Embedding(config.max_positions, config.embed_dim)
        self.token_type_embeddings = nn.Embedding(config.num_token_types, config.embed_dim)
        self.norm = LayerNorm(config.embed_dim, config.norm_eps)

    def __call__(self, tokens: mx.array, token_types: mx.array) -> mx.array:
        """(B, L) each -> (B, L, E)."""
        places = self.position_embeddings.weight[: tokens.shape[1]]
        return self.norm(self.word_embeddings(tokens) + self.token_type_embeddings(token_types) + places)


class Bert(nn.Module):
    """Tokens to a vector for each."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Stack(config.layer, config.num_layers)
        if config.pooler:
            self.pooler = Linear(config.embed_dim, config.embed_dim)

    def __call__(
        self, tokens: mx.array, *, mask: mx.array | None = None, token_types: mx.array | None = None
    ) -> mx.array:
        """tokens (B, L) -> (B, L, E). mask (B, L): True where a token is valid, all by default; what others become is
        of no use. token_types (B, L): which segment each is of, the first by default."""
        config = self.config
        check_tokens("tokens", tokens, config.vocab_size)
        if tokens.shape[1] > config.max_positions:
            raise ValueError(f"tokens must be at most {config.max_positions} a text, got {tokens.shape[1]}")
        token_types = mx.zeros_like(tokens) if token_types is None else token_types
        check_tokens("token_types", token_types, config.num_token_types)
        if token_types.shape != tokens.shape:
            raise ValueError(f"token_types must have the shape of tokens, {tokens.shape}, got {token_types.shape}")
        keys = expand_key_mask("mask", mask, tokens.shape)
        return self.encoder(self.embeddings(tokens, token_types), mask=keys)

    def pool(self, hidden: mx.array) -> mx.array:
        """What the model gives, (B, L, E), to one vector a text, (B, E): tanh of a layer on its first token."""
        if not self.config.pooler:
            raise ValueError("pool() needs a BERT with a pooler, got one without")
        return mx.tanh(self.pooler(hidden[:, 0]))


def pool_mean(hidden: mx.array, mask: mx.array) -> mx.array:
    """The mean of the valid tokens of each text: hidden (B, L, E), mask (B, L), True = valid -> (B, E). That of a text
    without any is 0."""
    check_mask("mask", mask, hidden.shape[:2])
    valid = mask.astype(hidden.dtype)[:, None]  # (B, 1, L)
    count = mx.maximum(valid.sum(axis=-1), 1)  # (B, 1)
    return (valid @ mx.where(mask[..., None], hidden, mx.array(0, hidden.dtype)))[:, 0] / count


def normalize(x: mx.array) -> mx.array:
    """x (..., E) to length 1; what is 0 stays so."""
    return x / mx.maximum(mx.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
