"""CausalLMConfig: what a CausalLM is, and Quantization: what is packed in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...backend import activations
from ...nn import config
from ...nn.moe.layer import MoEConfig
from ...nn.positions import Rotary, RotaryScaling

# Far beyond any model, and below what would keep a reader of a hostile file busy.
_LIMITS = {
    "vocab_size": (1, 10**8),
    "embed_dim": (1, 10**6),
    "num_layers": (1, 1000),
    "num_heads": (1, 10**5),
    "num_kv_heads": (1, 10**5),
    "head_dim": (1, 10**5),
    "hidden_dim": (1, 10**7),
}
_LARGEST_MOE = {"num_experts": 10**4, "hidden_dim": 10**7, "shared_dim": 10**7}
_ABOVE_0 = (
    *("rope_theta", "local_rope_theta", "norm_eps", "embed_scale"),
    *("attention_scale", "attention_softcap", "logit_softcap"),
)
_FLAGS = ("mlp_bias", "norm_plus_one", "sandwich_norms", "tie_embeddings")
_ROUTING = (".mlp.router", ".mlp.shared_expert_gate")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Quantization:
    """Affine quantization of the matrices: bits and group_size; `layers` names those that have others, or None for
    floats. What routes tokens is floats unless it is named there: a rounded router chooses other experts."""

    bits: int
    group_size: int
    layers: dict[str, tuple[int, int] | None] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        given = [(self.bits, self.group_size), *(pair for pair in self.layers.values() if pair is not None)]
        for bits, group_size in given:
            if bits not in (2, 3, 4, 5, 6, 8) or group_size not in (32, 64, 128):
                raise ValueError(
                    f"quantization must be of 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128, "
                    f"got {bits!r:.20} and {group_size!r:.20}"
                )

    def of(self, name: str) -> tuple[int, int] | None:
        """(bits, group_size) of a layer."""
        return self.layers.get(name, None if name.endswith(_ROUTING) else (self.bits, self.group_size))


@dataclass(frozen=True)
class CausalLMConfig:
    """What a CausalLM is. ValueError names the field that is unknown, of the wrong type or out of range.

    window: positions that the "local" layers of layer_types see, the token's own among them; without layer_types, all
    are. local_rope_theta: their rotary base, without scaling, if they have their own. attention_bias: names among q, k,
    v, out. qk_norm, norm_plus_one, sandwich_norms: RMS norms of each head's queries and keys, or of all heads' at once
    ("whole"); their gain is 1 + weight; another after each attention and feed-forward network. embed_scale,
    attention_scale: what embeddings and scores are multiplied with (1; 1 / sqrt(head_dim)). moe: what is in the place
    of the feed-forward network of every layer but dense_layers. Where an expert's capacity overflows, logits depend on
    the rest of the batch and on how many tokens a cache got at once. dtype: what floats are cast to when loaded; None
    leaves them as stored.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    hidden_dim: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    attention_bias: tuple[str, ...] = ()
    mlp_bias: bool = False
    qk_norm: bool | str = False
    window: int | None = None
    layer_types: tuple[str, ...] | None = None
    rope_theta: float = 10000.0
    rope_scaling: RotaryScaling | None = None
    local_rope_theta: float | None = None
    norm_eps: float = 1e-6
    norm_plus_one: bool = False
    sandwich_norms: bool = False
    activation: str = "silu"
    embed_scale: float | None = None
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    tie_embeddings: bool = False
    moe: MoEConfig | None = None
    dense_layers: tuple[int, ...] = ()
    dtype: str | None = None
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.head_dim is None and type(self.embed_dim) is type(self.num_heads) is int and self.num_heads > 0:
            if self.embed_dim % self.num_heads:
                raise ValueError(f"embed_dim must be a multiple of num_heads, {self.num_heads}, got {self.embed_dim}")
            object.__setattr__(self, "head_dim", self.embed_dim // self.num_heads)
        config.check_whole(self, _LIMITS)
        for name in _ABOVE_0:
            value = getattr(self, name)
            known = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")
            if not known and not (value is None and _DEFAULTS[name] is None):
                raise ValueError(f"{name} must be a number above 0, got {value!r:.80}")
        config.check_flags(self, *_FLAGS)
        self._check_choices()
        self._check_layers()

    def _check_choices(self) -> None:
        config.check_one_of(self, "activation", activations.GATED)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r:.80}")
        if not set(self.attention_bias) <= {"q", "k", "v", "out"}:
            raise ValueError(f"attention_bias must be names among q, k, v, out, got {self.attention_bias!r:.80}")
        if type(self.qk_norm) is not bool and self.qk_norm != "whole":
            raise ValueError(f'qk_norm must be true, false or "whole", got {self.qk_norm!r:.80}')

    def _check_layers(self) -> None:
        if self.window is not None and (type(self.window) is not int or self.window < 1):
            raise ValueError(f"window must be a whole number from 1, got {self.window!r:.80}")
        types = self.layer_types
        if types is not None and (len(types) != self.num_layers or not set(types) <= {"local", "global"}):
            raise ValueError(
                f"layer_types must be local or global for each of {self.num_layers} layers, got {types!r:.80}"
            )
        if types is not None and "local" in types and self.window is None:
            raise ValueError("local layers need a window, got none")
        self._check_mixture()

    def _check_mixture(self) -> None:
        dense, layers = self.dense_layers, range(self.num_layers)
        known = isinstance(dense, (tuple, list)) and all(type(index) is int and index in layers for index in dense)
        if not known or len(set(dense)) != len(dense):
            raise ValueError(
                f"dense_layers must be different numbers below num_layers, {len(layers)}, got {dense!r:.80}"
            )
        if self.qk_norm == "whole" and self.norm_plus_one:
            raise ValueError('norm_plus_one must be false with qk_norm "whole", got true')
        if self.moe is None:
            if dense:
                raise ValueError(f"dense_layers must be empty without a moe, got {dense!r:.80}")
            return
        if not isinstance(self.moe, MoEConfig):
            raise ValueError(f"moe must be a MoEConfig, got a {type(self.moe).__name__}")
        for name, limit in _LARGEST_MOE.items():
            if getattr(self.moe, name) > limit:
                raise ValueError(f"{name} of the moe must be at most {limit}, got {getattr(self.moe, name)}")
        if self.moe.embed_dim != self.embed_dim:
            raise ValueError(f"embed_dim of the moe must be the decoder's, {self.embed_dim}, got {self.moe.embed_dim}")

    def has_mixture(self, index: int) -> bool:
        """Whether layer `index` has the moe."""
        return self.moe is not None and index not in self.dense_layers

    def layer_window(self, index: int) -> int | None:
        """How many positions layer `index` sees; None: all."""
        return self.window if self.layer_types is None or self.layer_types[index] == "local" else None

    def rotary(self, index: int) -> Rotary:
        """The positions of layer `index`."""
        assert self.head_dim is not None  # for the type checker: it has been set
        if self.local_rope_theta is not None and self.layer_window(index) is not None:
            return Rotary(self.head_dim, self.local_rope_theta)
        return Rotary(self.head_dim, self.rope_theta, scaling=self.rope_scaling)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CausalLMConfig:
        """The configuration from plain values."""
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        for name, kind in _PARTS.items():
            if isinstance(values.get(name), dict):
                values[name] = config.read(kind, name, values[name])
        return config.read(cls, "the decoder", values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; `from_dict` takes them back."""
        return dataclasses.asdict(self)


_PARTS: dict[str, type] = {"rope_scaling": RotaryScaling, "moe": MoEConfig, "quantization": Quantization}
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(CausalLMConfig)}
