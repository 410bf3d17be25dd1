"""CausalLMConfig: what a CausalLM is, and Quantization: what is packed in it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from ...backend import activations
from ...nn.config import Config
from ...nn.moe import MoEConfig
from ...nn.rotary import Rotary, RotaryScaling

_ROUTING = (".mlp.router", ".mlp.shared_expert_gate")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Quantization(Config):
    """Affine quantization of the matrices: bits and group_size; `layers` names those that have others, or None for
    floats. What routes tokens is floats unless it is named there: a rounded router chooses other experts."""

    _what: ClassVar[str] = "quantization"

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
class CausalLMConfig(Config):
    """The fields of a CausalLM, checked.

    Attributes:
        vocab_size: Tokens, V.
        embed_dim: Channels of a token.
        num_layers: Blocks.
        num_heads: Query heads.
        hidden_dim: Channels inside the feed-forward networks.
        num_kv_heads: Key/value heads; by default num_heads.
        head_dim: Channels of a head; by default embed_dim / num_heads.
        attention_bias: The names among q, k, v, out of the projections that have a bias.
        mlp_bias: Whether the feed-forward networks have biases.
        qk_norm: Whether there are RMS norms of each head's queries and keys; "whole" for norms of all heads' at once.
        window: Positions that a token sees, its own among them, in the "local" layers; without layer_types in all.
        layer_types: "local" or "global" for each layer.
        rope_theta: The base of the rotary positions.
        rope_scaling: How they are slowed to reach further.
        local_rope_theta: The base of local layers, without scaling; by default as of the others.
        norm_eps: The eps of the RMS norms.
        norm_plus_one: Whether their gain is 1 + weight.
        sandwich_norms: Whether a norm follows each attention and feed-forward network too.
        activation: Of the gated feed-forward networks, "silu" or "gelu_tanh".
        embed_scale: What embeddings are multiplied with; by default 1.
        attention_scale: What scores are multiplied with; by default 1 / sqrt(head_dim).
        attention_softcap: The bound of the scores.
        logit_softcap: The bound of the logits.
        tie_embeddings: Whether the logits are products with the table of embeddings.
        moe: A mixture of experts in place of the feed-forward network of every layer but dense_layers. Where the
            capacity of an expert overflows, logits depend on the rest of the batch and on how many tokens a cache got
            at once.
        dense_layers: The numbers of the layers without a mixture.
        dtype: What floats are cast to when a checkpoint is loaded; None leaves them as stored.
        quantization: Which matrices are packed, and how.

    Raises:
        ValueError: A field is of the wrong type or out of range; the message names it.
    """

    _what: ClassVar[str] = "the language model"
    _parts: ClassVar = {"rope_scaling": RotaryScaling, "moe": MoEConfig, "quantization": Quantization}

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
        self._check_whole("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        self._check_whole("hidden_dim", "window")
        self._check_above_0("rope_theta", "local_rope_theta", "norm_eps", "embed_scale")
        self._check_above_0("attention_scale", "attention_softcap", "logit_softcap")
        self._check_flags("mlp_bias", "norm_plus_one", "sandwich_norms", "tie_embeddings")
        self._check_choices()
        self._check_layers()

    def _check_choices(self) -> None:
        self._check_one_of("activation", activations.GATED)
        self._check_one_of("dtype", DTYPES)
        if not set(self.attention_bias) <= {"q", "k", "v", "out"}:
            raise ValueError(f"attention_bias must be names among q, k, v, out, got {self.attention_bias!r:.80}")
        if type(self.qk_norm) is not bool and self.qk_norm != "whole":
            raise ValueError(f'qk_norm must be true, false or "whole", got {self.qk_norm!r:.80}')

    def _check_layers(self) -> None:
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
        if self.moe.embed_dim != self.embed_dim:
            raise ValueError(f"embed_dim of the moe must be the model's, {self.embed_dim}, got {self.moe.embed_dim}")

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
