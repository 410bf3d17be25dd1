"""An attention layer alone, as a checkpoint can hold it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from ...nn.attention.layer import Attention
from ...nn.config import Config


@dataclass(frozen=True)
class AttentionLayerConfig(Config):
    """The fields of an AttentionLayer, checked.

    Attributes:
        embed_dim: Channels of a position.
        num_heads: Query heads.
        num_kv_heads: Key/value heads; by default num_heads.
        bias: Whether all projections have biases, or none.
        causal: Whether a position attends to none after it.

    Raises:
        ValueError: A field is unknown, of the wrong type or out of range; the message names it.
    """

    _what: ClassVar[str] = "the attention layer"

    embed_dim: int
    num_heads: int
    num_kv_heads: int | None = None
    bias: bool = True
    causal: bool = False

    def __post_init__(self) -> None:
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        self._check_whole("embed_dim", "num_heads", "num_kv_heads")
        self._check_flags("bias", "causal")


class AttentionLayer(Attention):
    """Attention by a configuration that JSON can hold."""

    def __init__(self, config: AttentionLayerConfig):
        sizes = config.embed_dim, config.num_heads
        super().__init__(*sizes, num_kv_heads=config.num_kv_heads, bias=config.bias, causal=config.causal)
        self.layer_config = config

    @property
    def is_gqa(self) -> bool:
        """Whether query heads share key/value heads."""
        return self.config.is_gqa

    def forward_2d(self, x: mx.array) -> mx.array:
        """Multi-head self-attention of one sequence without a batch axis.

        Args:
            x: (L, E).

        Returns:
            (L, E).

        Raises:
            ValueError: x has other axes or channels, or the layer has grouped key/value heads.
        """
        if self.is_gqa:
            raise ValueError(
                f"forward_2d needs a key/value head for every query head, {self.config.num_heads}, "
                f"got {self.config.kv_heads}"
            )
        if x.ndim != 2:
            raise ValueError(f"x must be (length, channels), got shape {x.shape}")
        return self(x)
