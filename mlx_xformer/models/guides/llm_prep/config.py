"""Configurations of llm_prep's models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ....nn import config as fields
from ....nn.moe.layer import FFNConfig
from ....nn.transformer import LayerConfig

ATTENTION_TYPES = ("mha", "mqa", "gqa")
_LIMITS = {
    "input_dim": (1, fields.WIDTH),
    "output_dim": (1, fields.WIDTH),
    "embed_dim": (1, fields.WIDTH),
    "num_heads": (1, fields.WIDTH),
    "num_layers": (1, fields.LAYERS),
    "num_decoder_layers": (1, fields.LAYERS),
    "num_groups": (1, fields.WIDTH),
    "max_len": (1, 10**8),
    "window": (1, 10**8),
    "vocab_size": (1, fields.VOCABULARY),
}
_OPTIONAL = ("num_decoder_layers", "num_groups", "window", "vocab_size")


@dataclass(frozen=True)
class SequenceConfig:
    """Sizes of the models of llm_prep. ValueError names a field that does not fit.

    attention_type: "mha", "mqa" with one key/value head, or "gqa" with num_groups of them (half of num_heads unless
    given); num_groups is of no use to the others. ffn: of every layer, by default 4 embed_dim wide; with a MoE whose
    capacity overflows, what becomes of a position depends on the others of the batch, padding among them. max_len: the
    most positions. window: how many a causal model sees, its own among them. num_decoder_layers: of an encoder-decoder,
    by default num_layers. vocab_size: a causal model reads tokens by a table (V, I) and gives logits by a head (V, O).
    """

    input_dim: int
    output_dim: int
    embed_dim: int
    num_layers: int
    num_heads: int
    attention_type: str = "mha"
    num_groups: int | None = None
    ffn: FFNConfig | None = None
    max_len: int = 512
    window: int | None = None
    num_decoder_layers: int | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        fields.check_whole(self, _LIMITS, _OPTIONAL)
        fields.check_one_of(self, "attention_type", ATTENTION_TYPES)
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, {self.num_heads}, got {self.embed_dim}")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_groups must divide num_heads, {self.num_heads}, got {self.kv_heads}")
        if self.ffn is None:
            object.__setattr__(self, "ffn", FFNConfig(self.embed_dim, 4 * self.embed_dim))
        if not isinstance(self.ffn, FFNConfig):
            raise ValueError(f"ffn must be a FFNConfig, got a {type(self.ffn).__name__}")
        if self.ffn.embed_dim != self.embed_dim:
            raise ValueError(f"embed_dim of the ffn must be the model's, {self.embed_dim}, got {self.ffn.embed_dim}")
        fields.check_whole(self.ffn, {"hidden_dim": (1, 10 * fields.WIDTH), "num_experts": (0, 4096)})

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        if self.attention_type == "gqa":
            return max(1, self.num_heads // 2) if self.num_groups is None else self.num_groups
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

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SequenceConfig:
        """The configuration from plain values."""
        values = dict(values)
        if isinstance(values.get("ffn"), dict):
            values["ffn"] = fields.read(FFNConfig, "ffn", values["ffn"])
        return fields.read(cls, "the sequence model", values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; `from_dict` takes them back."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class SequenceCheckpoint:
    """What a checkpoint is of: "regression", "autoregressive" or "encoder_decoder", and its sizes."""

    model: str
    config: SequenceConfig

    def __post_init__(self) -> None:
        fields.check_one_of(self, "model", ("regression", "autoregressive", "encoder_decoder"))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SequenceCheckpoint:
        """The configuration from plain values, in which `model` stands beside the sizes."""
        values = dict(values)
        return cls(values.pop("model", None), SequenceConfig.from_dict(values))

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; `from_dict` takes them back."""
        return {"model": self.model, **self.config.to_dict()}
