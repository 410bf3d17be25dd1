"""Configurations of llm_prep's models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ....nn.config import Config
from ....nn.moe import FFNConfig
from ....nn.transformer import LayerConfig

ATTENTION_TYPES = ("mha", "mqa", "gqa")


@dataclass(frozen=True)
class SequenceConfig(Config):
    """The fields of llm_prep's models, checked.

    Attributes:
        input_dim: Channels of an input, I.
        output_dim: Channels of an output, O.
        embed_dim: Channels inside the layers.
        num_layers: Layers; of an encoder-decoder those of the encoder.
        num_heads: Query heads.
        attention_type: "mha", "mqa" with one key/value head, or "gqa" with num_kv_heads of them.
        num_kv_heads: Key/value heads of "gqa", by default half of num_heads; the other types ignore it.
        ffn: The feed-forward network of every layer, by default 4 * embed_dim wide. With a mixture whose capacity
            overflows, what becomes of a position depends on the others of the batch, padding among them.
        max_len: The most positions.
        window: Positions that a position of a causal model sees, its own among them.
        num_decoder_layers: Layers of an encoder-decoder's decoder; by default num_layers.
        vocab_size: A causal model reads tokens by a table (V, I) and gives logits by a head (V, O).

    Raises:
        ValueError: A field is unknown, of the wrong type or out of range; the message names it.
    """

    _what: ClassVar[str] = "the sequence model"
    _parts: ClassVar = {"ffn": FFNConfig}

    input_dim: int
    output_dim: int
    embed_dim: int
    num_layers: int
    num_heads: int
    attention_type: str = "mha"
    num_kv_heads: int | None = None
    ffn: FFNConfig | None = None
    max_len: int = 512
    window: int | None = None
    num_decoder_layers: int | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        self._check_whole("input_dim", "output_dim", "embed_dim", "num_heads", "num_layers", "num_decoder_layers")
        self._check_whole("num_kv_heads", "max_len", "window", "vocab_size")
        self._check_one_of("attention_type", ATTENTION_TYPES)
        self._check_multiple("embed_dim", "num_heads")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads, {self.num_heads}, got {self.kv_heads}")
        if self.ffn is None:
            object.__setattr__(self, "ffn", FFNConfig(self.embed_dim, 4 * self.embed_dim))
        if not isinstance(self.ffn, FFNConfig):
            raise ValueError(f"ffn must be a FFNConfig, got a {type(self.ffn).__name__}")
        if self.ffn.embed_dim != self.embed_dim:
            raise ValueError(f"embed_dim of the ffn must be the model's, {self.embed_dim}, got {self.ffn.embed_dim}")

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        if self.attention_type == "gqa":
            return max(1, self.num_heads // 2) if self.num_kv_heads is None else self.num_kv_heads
        return 1 if self.attention_type == "mqa" else self.num_heads

    @property
    def decoder_layers(self) -> int:
        """num_decoder_layers, resolved."""
        return self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers

    def layer(self, *, causal: bool, cross: bool = False) -> LayerConfig:
        """What the layers are."""
        assert self.ffn is not None  # for the type checker: it has been set
        return LayerConfig(
            self.embed_dim,
            self.num_heads,
            self.ffn.hidden_dim,
            num_kv_heads=self.kv_heads,
            causal=causal,
            window=self.window if causal else None,
            cross=cross,
            moe=self.ffn.mixture() if self.ffn.use_moe else None,
        )


@dataclass(frozen=True)
class SequenceCheckpoint(Config):
    """What a checkpoint is of: "regression", "autoregressive" or "encoder_decoder", and its sizes."""

    model: str
    config: SequenceConfig

    def __post_init__(self) -> None:
        self._check_one_of("model", ("regression", "autoregressive", "encoder_decoder"))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SequenceCheckpoint:
        """The configuration from plain values, in which `model` stands beside the sizes. Files written before name
        num_kv_heads num_groups."""
        values = {"num_kv_heads" if name == "num_groups" else name: value for name, value in values.items()}
        return cls(values.pop("model", None), SequenceConfig.from_dict(values))

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; `from_dict` takes them back."""
        return {"model": self.model, **self.config.to_dict()}
