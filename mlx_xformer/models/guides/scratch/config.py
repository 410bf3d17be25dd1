"""What a stack is, and an encoder-decoder made of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ....nn import config

_LIMITS = {
    "model_dim": (1, config.WIDTH),
    "key_dim": (1, config.WIDTH),
    "hidden_dim": (1, 10 * config.WIDTH),
    "num_heads": (1, config.WIDTH),
    "enc_out_dim": (1, config.WIDTH),
    "num_stack": (1, config.LAYERS),
}
RATES = ("attention_dropout", "ffn_dropout", "block_dropout")


@dataclass(frozen=True)
class StackConfig:
    """What a TransformerStack is. ValueError names the field that is unknown, of the wrong type or out of range.

    key_dim is a head's, whatever model_dim is; a head's values have model_dim / num_heads. enc_out_dim: the width of a
    memory that every block attends to. norm: "layer", or "unbiased" as in UnbiasedLayerNorm. Dropout in training:
    attention_dropout of weights (score_dropout: of the scores before softmax), ffn_dropout of what the network gives,
    and block_dropout of what attentions give, or with dropout_at "residual" of all that leaves a block.
    """

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
        config.check_whole(self, _LIMITS, ("enc_out_dim",))
        if self.model_dim % self.num_heads:
            raise ValueError(f"model_dim must be a multiple of num_heads, {self.num_heads}, got {self.model_dim}")
        config.check_rate(self, *RATES)
        config.check_flags(self, "causal", "score_dropout")
        config.check_one_of(self, "norm", ("layer", "unbiased"))
        config.check_one_of(self, "dropout_at", ("branches", "residual"))
        if self.norm == "unbiased" and self.model_dim < 2:
            raise ValueError(f"model_dim must be at least 2 for an unbiased deviation, got {self.model_dim}")
        eps = self.norm_eps
        if not isinstance(eps, (int, float)) or isinstance(eps, bool) or not 0 < eps < float("inf"):
            raise ValueError(f"norm_eps must be a number above 0, got {eps!r:.80}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StackConfig:
        """The configuration from plain values."""
        return config.read(cls, "the stack", values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; `from_dict` takes them back."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """What an EncoderDecoder is. padding_idx: the token, if any, whose embedding is 0 at first and is not trained, and
    which the loss passes over. max_len: positions there are, at most. embed_dropout: of embeddings with positions."""

    vocab_size: int
    stack: StackConfig
    padding_idx: int | None = 0
    max_len: int = 5000
    embed_dropout: float = 0.1

    def __post_init__(self) -> None:
        config.check_whole(self, {"vocab_size": (1, config.VOCABULARY), "max_len": (1, 10**8)})
        config.check_rate(self, "embed_dropout")
        if not isinstance(self.stack, StackConfig) or not self.stack.causal:
            raise ValueError(f"stack must be a causal StackConfig, got {self.stack!r:.80}")
        pad = self.padding_idx
        if pad is not None and (type(pad) is not int or not 0 <= pad < self.vocab_size):
            raise ValueError(f"padding_idx must be a token from 0 to {self.vocab_size - 1}, got {pad!r:.80}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EncoderDecoderConfig:
        """The configuration from plain values."""
        values = dict(values)
        if isinstance(values.get("stack"), dict):
            values["stack"] = StackConfig.from_dict(values["stack"])
        return config.read(cls, "the encoder-decoder", values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; `from_dict` takes them back."""
        return dataclasses.asdict(self)
