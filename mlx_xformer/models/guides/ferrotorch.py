"""An attention layer alone, as a checkpoint can hold it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...nn import config as fields
from ...nn.attention.layer import Attention

_LIMITS = dict.fromkeys(("embed_dim", "num_heads", "num_kv_heads"), (1, fields.WIDTH))


@dataclass(frozen=True)
class AttentionLayerConfig:
    """Sizes of the layer. num_kv_heads is num_heads unless given; bias: of all projections, or of none. ValueError
    names the field that is unknown, of the wrong type or out of range."""

    embed_dim: int
    num_heads: int
    num_kv_heads: int | None = None
    bias: bool = True
    causal: bool = False

    def __post_init__(self) -> None:
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        fields.check_whole(self, _LIMITS)
        fields.check_flags(self, "bias", "causal")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AttentionLayerConfig:
        """The configuration from plain values."""
        return fields.read(cls, "the attention layer", values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; `from_dict` takes them back."""
        return dataclasses.asdict(self)


class AttentionLayer(Attention):
    """Attention by a configuration that JSON can hold."""

    def __init__(self, config: AttentionLayerConfig):
        options = {"num_kv_heads": config.num_kv_heads, "bias": config.bias, "causal": config.causal}
        super().__init__(config.embed_dim, config.num_heads, **options)
        self.layer_config = config
