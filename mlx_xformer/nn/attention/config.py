"""AttentionConfig: what an Attention is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..config import Config
from ..positions import buckets_by_distance
from ..rotary import Rotary

PROJECTIONS, NORMS = ("q", "k", "v", "out"), ("rms", "layer", "rms_whole")


@dataclass(frozen=True)
class AttentionConfig(Config):
    """The fields of an Attention, checked; unless given, those with a default None follow from others.

    Attributes:
        embed_dim: Channels of x.
        num_heads: Query heads.
        num_kv_heads: Key/value heads: num_heads, the default, is multi-head attention, 1 multi-query attention, and
            anything between that divides num_heads grouped-query attention.
        head_dim: Channels of a head's queries and keys; by default embed_dim / num_heads.
        value_dim: Channels of a head's values; by default head_dim.
        kv_dim: Channels of the source of keys and values; by default embed_dim.
        v_dim: Channels of the source of values; by default kv_dim.
        out_dim: Channels of the result; by default embed_dim.
        bias: Whether the projections have biases, or the names among q, k, v, out of those that have one.
        qk_norm: "rms" or "layer", a norm of each head's queries and keys, or "rms_whole", of all heads' at once.
        norm_eps: The eps of these norms.
        rotary: Rotary positions of queries and keys, for self-attention.
        alibi: Whether ALiBi's bias is added to the scores.
        relative: (num_buckets, max_distance) of T5's relative positions.
        causal: Whether a query attends to no key after its own position.
        window: Hides the keys so many or more positions away, to either side.
        sinks: Whether each head has the learned score of a key without a value.
        softcap: The bound of the scores.
        scale: What the scores are multiplied with; by default 1 / sqrt(head_dim).
        dropout: The probability, in training, that a weight is dropped.

    Raises:
        ValueError: A field is of the wrong type or out of range; the message names it.
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
