"""An attention layer alone, as a checkpoint can hold it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..attention import Attention

# Far beyond any layer, and below what would keep a reader of a hostile file busy.
_LARGEST = {"embed_dim": 10**6, "num_heads": 10**5, "num_kv_heads": 10**5}


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
        for name, limit in _LARGEST.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= limit:
                raise ValueError(f"{name} must be a whole number from 1 to {limit}, got {value!r:.80}")
        for name in ("bias", "causal"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r:.80}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AttentionLayerConfig:
        """The configuration from plain values."""
        fields = dataclasses.fields(cls)
        if unknown := sorted(values.keys() - {field.name for field in fields}):
            raise ValueError(f"the attention layer has no option named {', '.join(unknown)}")
        if missing := [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values]:
            raise ValueError(f"{', '.join(missing)} must be given")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; `from_dict` takes them back."""
        return dataclasses.asdict(self)


class AttentionLayer(Attention):
    """Attention by a configuration that JSON can hold."""

    def __init__(self, config: AttentionLayerConfig):
        options = {"num_kv_heads": config.num_kv_heads, "bias": config.bias, "causal": config.causal}
        super().__init__(config.embed_dim, config.num_heads, **options)
