"""What a stack is, and an encoder-decoder made of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

# Far beyond any model, and below what would keep a reader of a hostile file busy.
_LARGEST = {"model_dim": 10**6, "key_dim": 10**6, "hidden_dim": 10**7, "num_heads": 10**5, "num_stack": 1000}
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
        for name, limit in _LARGEST.items():
            _check_whole(name, getattr(self, name), limit)
        if self.enc_out_dim is not None:
            _check_whole("enc_out_dim", self.enc_out_dim, 10**6)
        if self.model_dim % self.num_heads:
            raise ValueError(f"model_dim must be a multiple of num_heads, {self.num_heads}, got {self.model_dim}")
        for name in RATES:
            _check_rate(name, getattr(self, name))
        for name in ("causal", "score_dropout"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r:.80}")
        for name, known in (("norm", ("layer", "unbiased")), ("dropout_at", ("branches", "residual"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r:.80}")
        if self.norm == "unbiased" and self.model_dim < 2:
            raise ValueError(f"model_dim must be at least 2 for an unbiased deviation, got {self.model_dim}")
        eps = self.norm_eps
        if not isinstance(eps, (int, float)) or isinstance(eps, bool) or not 0 < eps < float("inf"):
            raise ValueError(f"norm_eps must be a number above 0, got {eps!r:.80}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StackConfig:
        """The configuration from plain values."""
        return cls(**_known("stack", cls, values))

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
        _check_whole("vocab_size", self.vocab_size, 10**8)
        _check_whole("max_len", self.max_len, 10**7)
        _check_rate("embed_dropout", self.embed_dropout)
        if not isinstance(self.stack, StackConfig) or not self.stack.causal:
            raise ValueError(f"stack must be a causal StackConfig, got {self.stack!r:.80}")
        pad = self.padding_idx
        if pad is not None and (type(pad) is not int or not 0 <= pad < self.vocab_size):
            raise ValueError(f"padding_idx must be a token from 0 to {self.vocab_size - 1}, got {pad!r:.80}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EncoderDecoderConfig:
        """The configuration from plain values."""
        values = _known("encoder-decoder", cls, values)
        if isinstance(values["stack"], dict):
            values["stack"] = StackConfig.from_dict(values["stack"])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; `from_dict` takes them back."""
        return dataclasses.asdict(self)


def _known(what: str, kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """A copy of values, which are all of `kind` and all that it must have."""
    fields = dataclasses.fields(kind)
    if unknown := sorted(values.keys() - {field.name for field in fields}):
        raise ValueError(f"the {what} has no option named {', '.join(unknown)}")
    if missing := [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values]:
        raise ValueError(f"{', '.join(missing)} must be given")
    return dict(values)


def _check_whole(name: str, value: Any, limit: int) -> None:
    if type(value) is not int or not 1 <= value <= limit:
        raise ValueError(f"{name} must be a whole number from 1 to {limit}, got {value!r:.80}")


def _check_rate(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, got {value!r:.80}")
