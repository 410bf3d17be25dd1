"""What a stack is, and an encoder-decoder made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ....nn.config import Config

RATES = ("attention_dropout", "ffn_dropout", "block_dropout")


@dataclass(frozen=True)
class StackConfig(Config):
    """The fields of a TransformerStack, checked.

    Attributes:
        model_dim: Channels of a position. The values of a head have model_dim / num_heads.
        key_dim: Channels of a head's queries and keys.
        hidden_dim: Channels inside the feed-forward networks.
        num_heads: Heads of each attention.
        enc_out_dim: Channels of a memory that every block attends to, if there is one.
        num_stack: Blocks.
        causal: Whether a position attends to none after it.
        norm: "layer", or "unbiased" as in UnbiasedLayerNorm.
        norm_eps: The eps of the norms.
        attention_dropout: The probability, in training, that a weight of attention is dropped.
        ffn_dropout: The same of what a feed-forward network gives.
        block_dropout: The same of what attentions give.
        dropout_at: Where block_dropout acts: at the "branches", or on the "residual", which is all that leaves a block.
        score_dropout: Whether attention_dropout acts on the scores before the softmax instead.

    Raises:
        ValueError: A field is unknown, of the wrong type or out of range; the message names it.
    """

    _what: ClassVar[str] = "the stack"

    model_dim: int
    key_dim: int
    hidden_dim: int
    num_heads: int = 1
    enc_out_dim: int | None = None
    num_stack: int = 1
    causal: bool = False
    norm: str = "layer"
    norm_eps: float = 1e-6
    attention_dropout: float = 0.1
    ffn_dropout: float = 0.1
    block_dropout: float = 0.1
    dropout_at: str = "branches"
    score_dropout: bool = False

    def __post_init__(self) -> None:
        self._check_whole("model_dim", "key_dim", "hidden_dim", "num_heads", "enc_out_dim", "num_stack")
        self._check_multiple("model_dim", "num_heads")
        self._check_rates(*RATES)
        self._check_flags("causal", "score_dropout")
        self._check_one_of("norm", ("layer", "unbiased"))
        self._check_one_of("dropout_at", ("branches", "residual"))
        if self.norm == "unbiased" and self.model_dim < 2:
            raise ValueError(f"model_dim must be at least 2 for an unbiased deviation, got {self.model_dim}")
        self._check_above_0("norm_eps")


@dataclass(frozen=True)
class EncoderDecoderConfig(Config):
    """The fields of an EncoderDecoder, checked.

    Attributes:
        vocab_size: Tokens.
        stack: The blocks, which are causal.
        padding_idx: The token, if any, whose embedding is 0 at first and is not trained, and which the loss ignores.
        max_len: The most positions.
        embed_dropout: The probability, in training, that a number of embeddings with positions is dropped.

    Raises:
        ValueError: A field is unknown, of the wrong type or out of range; the message names it.
    """

    _what: ClassVar[str] = "the encoder-decoder"
    _parts: ClassVar = {"stack": StackConfig}

    vocab_size: int
    stack: StackConfig
    padding_idx: int | None = 0
    max_len: int = 5000
    embed_dropout: float = 0.1

    def __post_init__(self) -> None:
        self._check_whole("vocab_size", "max_len")
        self._check_rates("embed_dropout")
        if not isinstance(self.stack, StackConfig) or not self.stack.causal:
            raise ValueError(f"stack must be a causal StackConfig, got {self.stack!r:.80}")
        pad = self.padding_idx
        if pad is not None and (type(pad) is not int or not 0 <= pad < self.vocab_size):
            raise ValueError(f"padding_idx must be a token from 0 to {self.vocab_size - 1}, got {pad!r:.80}")
