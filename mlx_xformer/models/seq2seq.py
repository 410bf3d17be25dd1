"""The models of document 1: a pooled regression, an autoregressive model of sequences, an encoder-decoder.

Source: venkatvi/llm_prep, transformer/README.md. Post-norm layers with ReLU on learned projections of vectors with
sinusoidal positions. What is causal there by name only is causal here, and caches are objects that a call is given.
Axes: B batch, L positions, S source positions, I input_dim, E embed_dim, O output_dim, V vocab_size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import fields
from ..blocks import LayerConfig, Stack, auxiliary_loss
from ..cache import CrossCache, KVCache
from ..conditioning import Conditioned, check_tokens, check_vectors, key_mask, positioned
from ..kernels import Linear
from ..layers import Embedding
from ..moe import FFNConfig, Routing

__all__ = [
    "AutoregressiveTransformerModel",
    "EncoderDecoder",
    "SequenceConfig",
    "TransformerModel",
    "auxiliary_loss",
]
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
    """Sizes of the models of document 1. ValueError names a field that does not fit.

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


class TransformerModel(nn.Module):
    """A sequence to one vector: the mean of its positions behind the layers, projected."""

    def __init__(self, config: SequenceConfig):
        super().__init__()
        for name in ("window", "vocab_size", "num_decoder_layers"):
            if getattr(config, name) is not None:
                raise ValueError(f"{name} must be None: a regression is not causal, got {getattr(config, name)}")
        self.config = config
        self.input_proj = Linear(config.input_dim, config.embed_dim)
        self.stack = Stack(config.layer(causal=False), config.num_layers)
        self.out_proj = Linear(config.embed_dim, config.output_dim)

    def __call__(self, x: mx.array, *, mask: mx.array | None = None, routings: list[Routing] | None = None) -> mx.array:
        """x (B, L, I) -> (B, O). mask (B, L): True where there is no padding, which is neither attended to nor part of
        the mean; a row of nothing else has the mean 0. routings gets where a mixture's tokens went."""
        check_vectors("x", x, self.config.input_dim)
        keys = key_mask("mask", mask, x.shape)
        y = positioned(self.input_proj(x), self.config.max_len, "x")
        y = self.stack(y, mask=keys, routings=routings)
        counted = mx.ones((*y.shape[:2],), y.dtype) if mask is None else mask.astype(y.dtype)
        weights = counted / mx.maximum(counted.sum(axis=1, keepdims=True), 1)
        return self.out_proj((weights[:, None] @ y)[:, 0])  # a product, as long sums in sequence round too much


class AutoregressiveTransformerModel(nn.Module):
    """A sequence to what follows each of its positions. It is causal. With a vocabulary generate() takes it."""

    def __init__(self, config: SequenceConfig):
        super().__init__()
        if config.num_decoder_layers is not None:
            raise ValueError(f"num_decoder_layers must be None: there is one stack, got {config.num_decoder_layers}")
        self.config = config
        self.input_proj = Linear(config.input_dim, config.embed_dim)
        self.stack = Stack(config.layer(causal=True), config.num_layers)
        self.out_proj = Linear(config.embed_dim, config.output_dim)
        _add_vocabulary(self, config)

    def __call__(
        self,
        x: mx.array,
        *,
        caches: Sequence[KVCache] | None = None,
        last: int | None = None,
        routings: list[Routing] | None = None,
    ) -> mx.array:
        """x (B, L, I) -> (B, L, O), or tokens (B, L) -> logits (B, L, V); with `last` of so many last positions only.
        `caches`, one a layer, have what came before, and get x."""
        y = self.input_proj(_vectors(self, "x", x))
        y = positioned(y, self.config.max_len, "x", caches[0] if caches else None)
        return _answer(self, self.stack(y, caches=caches, routings=routings), last)

    def generate_next_token(self, x: mx.array, *, caches: Sequence[KVCache] | None = None) -> mx.array:
        """What follows x (B, L, I), of which the caches then need not be told again: (B, 1, O), or logits (B, 1, V)."""
        if x.ndim < 2 or not x.shape[1]:
            raise ValueError(f"x must hold at least one position, got shape {x.shape}")
        return self(x, caches=caches, last=1)

    def generate(self, x: mx.array, steps: int, **options: Any) -> mx.array:
        """x (B, L, I) goes on by as many vectors, each fed back alone: (B, steps, O). options: of make_caches."""
        caches = self.make_caches(**options)
        return _fed_back(self.config, x, steps, lambda x: self.generate_next_token(x, caches=caches))

    def make_caches(self, **options: Any) -> list[KVCache]:
        """A cache for each layer; options as Stack's."""
        return self.stack.make_caches(**options)


class EncoderDecoder(nn.Module):
    """A source and a target to what follows each position of the target, which is causal; the source is seen whole."""

    def __init__(self, config: SequenceConfig):
        super().__init__()
        self.config = config
        self.encoder_input_proj = Linear(config.input_dim, config.embed_dim)
        self.decoder_input_proj = Linear(config.input_dim, config.embed_dim)
        self.encoder = Stack(config.layer(causal=False), config.num_layers)
        self.decoder = Stack(config.layer(causal=True, cross=True), config.decoder_layers)
        self.out_proj = Linear(config.embed_dim, config.output_dim)
        _add_vocabulary(self, config)

    def __call__(
        self,
        source: mx.array,
        target: mx.array,
        *,
        source_mask: mx.array | None = None,
        last: int | None = None,
        routings: list[Routing] | None = None,
    ) -> mx.array:
        """source (B, S, I), target (B, L, I) -> (B, L, O), or target tokens (B, L) -> logits (B, L, V)."""
        memory = self.encode(source, source_mask=source_mask, routings=routings)
        return self.decode(target, memory, memory_mask=source_mask, last=last, routings=routings)

    def encode(
        self, source: mx.array, *, source_mask: mx.array | None = None, routings: list[Routing] | None = None
    ) -> mx.array:
        """source (B, S, I) -> the memory (B, S, E). source_mask (B, S): True where there is no padding."""
        check_vectors("source", source, self.config.input_dim)
        x = positioned(self.encoder_input_proj(source), self.config.max_len, "source")
        return self.encoder(x, mask=key_mask("source_mask", source_mask, source.shape), routings=routings)

    def decode(
        self,
        target: mx.array,
        memory: mx.array,
        *,
        memory_mask: mx.array | None = None,
        caches: Sequence[KVCache] | None = None,
        cross_caches: Sequence[CrossCache] | None = None,
        last: int | None = None,
        routings: list[Routing] | None = None,
    ) -> mx.array:
        """As a call, given a memory (B, S, E). `caches`, one a layer, have what came before and get the target;
        cross_caches hold the projected memory."""
        check_vectors("memory", memory, self.config.embed_dim)
        y = self.decoder_input_proj(_vectors(self, "target", target))
        y = positioned(y, self.config.max_len, "target", caches[0] if caches else None)
        seen = key_mask("memory_mask", memory_mask, memory.shape)
        given: dict[str, Any] = {"memory_mask": seen, "caches": caches, "cross_caches": cross_caches}
        return _answer(self, self.decoder(y, memory, **given, routings=routings), last)

    def generate(
        self, source: mx.array, start: mx.array, steps: int, *, source_mask: mx.array | None = None, **options: Any
    ) -> mx.array:
        """`start` (B, L, I) goes on by as many vectors, each fed back alone: (B, steps, O). options: of make_caches."""
        memory, caches = self.encode(source, source_mask=source_mask), self.make_caches(**options)
        cross_caches = [CrossCache() for _ in caches]
        given: dict[str, Any] = {"memory_mask": source_mask, "caches": caches, "cross_caches": cross_caches}
        return _fed_back(self.config, start, steps, lambda x: self.decode(x, memory, **given, last=1))

    def make_caches(self, **options: Any) -> list[KVCache]:
        """A cache for each layer of the decoder; options as Stack's."""
        return self.decoder.make_caches(**options)

    def conditioned(self, source: mx.array, source_mask: mx.array | None = None) -> Conditioned:
        """What generate() takes: the decoder with what the encoder gives of a source (B, S, I), a prompt for each
        row."""
        if self.config.vocab_size is None:
            raise ValueError("conditioned() needs a vocabulary, got vocab_size None")
        return Conditioned(self, self.encode(source, source_mask=source_mask), source_mask)


def _add_vocabulary(model: nn.Module, config: SequenceConfig) -> None:
    if config.vocab_size is not None:
        model.embed_tokens = Embedding(config.vocab_size, config.input_dim)
        model.lm_head = Linear(config.output_dim, config.vocab_size)


def _vectors(model: nn.Module, name: str, x: mx.array) -> mx.array:
    """Vectors (B, L, I) as they are, tokens (B, L) as rows of the table."""
    if "embed_tokens" in model:
        check_tokens(name, x)
        return model.embed_tokens(x)
    check_vectors(name, x, model.config.input_dim)
    return x


def _answer(model: nn.Module, x: mx.array, last: int | None) -> mx.array:
    """What the layers give (B, L, E), of the last positions, as vectors or logits."""
    if last is not None and last < 0:
        raise ValueError(f"last must be at least 0, got {last}")
    x = model.out_proj(x if last is None or last >= x.shape[1] else x[:, x.shape[1] - last :])
    return model.lm_head(x) if "lm_head" in model else x


def _fed_back(config: SequenceConfig, x: mx.array, steps: int, step: Callable[[mx.array], mx.array]) -> mx.array:
    """What `step` makes of x, and then of what it made, so many times: (B, steps, O)."""
    if config.vocab_size is not None or config.output_dim != config.input_dim:
        raise ValueError(
            f"outputs must be inputs to be fed back, {config.input_dim} wide, got {config.output_dim}"
            f"{'' if config.vocab_size is None else ' and a vocabulary, which generate.generate is for'}"
        )
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    found = []
    for _ in range(steps):
        x = step(x)
        mx.async_eval(x)
        found.append(x)
    return mx.concatenate(found, axis=1)
