"""AttentionConfig: what an Attention is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..config import Config
from ..positions import Rotary, buckets_by_distance

PROJECTIONS, NORMS = ("q", "k", "v", "out"), ("rms", "layer", "rms_whole")


@dataclass(frozen=True)
class AttentionConfig(Config):
    """What an Attention is. ValueError names a field that does not fit.

    num_kv_heads: num_heads is multi-head, 1 multi-query, anything between grouped-query attention. head_dim and
    value_dim are per head. kv_dim, v_dim: widths of the sources of keys and of values (embed_dim; kv_dim). bias: all
    projections, none, or the names among q, k, v, out of those that have one. qk_norm: "rms" or "layer", of every
    head's queries and keys, or "rms_whole", of all heads' at once. relative: T5's (num_buckets, max_distance). sinks: a
    learned score per head. dropout: of weights. causal, window, softcap, scale: see attention().
    """

    _what: ClassVar[str] = "the attention"
    _parts: ClassVar = {"rotary": Rotary}

    embed_dim: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    kv_dim: int | None = None
    v_dim: int | None = None
    out_dim: int | None = None
    bias: bool | tuple[str, ...] = True
    qk_norm: str | None = None
    norm_eps: float = 1e-6
    rotary: Rotary | None = None
    alibi: bool = False
    relative: tuple[int, int] | None = None
    causal: bool = False
    window: int | None = None
    sinks: bool = False
    softcap: float | None = None
    scale: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        set_ = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        self._check_whole("embed_dim", "num_heads", "num_kv_heads", "head_dim", "value_dim")
        self._check_whole("kv_dim", "v_dim", "out_dim", "window")
        if self.head_dim is None:
            self._check_multiple("embed_dim", "num_heads")
        for name, value in (
            ("num_kv_heads", self.num_heads),
            ("head_dim", self.embed_dim // self.num_heads),
            ("kv_dim", self.embed_dim),
            ("out_dim", self.embed_dim),
        ):
            if getattr(self, name) is None:
                set_(name, value)
        set_("value_dim", self.head_dim if self.value_dim is None else self.value_dim)
        set_("v_dim", self.kv_dim if self.v_dim is None else self.v_dim)
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads, {self.num_heads}, got {self.num_kv_heads}")
        if not isinstance(self.bias, (bool, tuple, list)):
            raise ValueError(f"bias must be True, False or names among {', '.join(PROJECTIONS)}, got {self.bias!r}")
        biases = PROJECTIONS if self.bias is True else () if self.bias is False else tuple(self.bias)
        if not set(biases) <= set(PROJECTIONS):
            raise ValueError(f"bias must be True, False or names among {', '.join(PROJECTIONS)}, got {self.bias}")
        set_("bias", biases)
        self._check_one_of("qk_norm", NORMS)
        self._check_above_0("softcap", "norm_eps")
        self._check_flags("alibi", "causal", "sinks")
        self._check_rates("dropout")
        if self.relative is not None:
            try:
                buckets, distance = self.relative
                buckets_by_distance(1, 1, num_buckets=buckets, max_distance=distance, bidirectional=not self.causal)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"relative must be (num_buckets, max_distance), got {self.relative}: {error}"
                ) from None
        if self.rotary is not None and self.rotary.dims > self.widths[0]:
            raise ValueError(f"rotary dims must be at most head_dim, {self.head_dim}, got {self.rotary.dims}")

    @property
    def kv_heads(self) -> int:
        """num_kv_heads, resolved."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def is_gqa(self) -> bool:
        """Whether query heads share key/value heads: grouped-query attention, of which multi-query is the extreme."""
        return self.kv_heads < self.num_heads

    @property
    def widths(self) -> tuple[int, int]:
        """head_dim and value_dim, resolved."""
        head_dim = self.embed_dim // self.num_heads if self.head_dim is None else self.head_dim
        return head_dim, head_dim if self.value_dim is None else self.value_dim
