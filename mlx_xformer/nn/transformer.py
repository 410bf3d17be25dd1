"""Layers of encoders and decoders and stacks of them: post-norm or pre-norm, with any feed-forward network.

Sources: Vaswani et al. 2017, arXiv 1706.03762; where norms and dropouts stand is torch.nn.TransformerEncoderLayer's and
torch.nn.TransformerDecoderLayer's. Axes: B batch, H heads, L positions, S positions of a memory, E embed_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from ..backend.activations import ACTIVATIONS, GATED
from .attention.layer import Attention
from .cache import CacheMaker, CacheOptions, CrossCache, KVCache
from .config import Config
from .layers import FeedForward, GatedFeedForward, LayerNorm, RMSNorm, apply_dropout
from .moe import MoE, MoEConfig, Routing

_NORMS: dict[str, Callable[..., nn.Module]] = {"layer": LayerNorm, "rms": RMSNorm}


@dataclass(frozen=True)
class LayerConfig(Config):
    """The fields of a Layer, checked.

    Attributes:
        embed_dim: Channels of x.
        num_heads: Query heads of both attentions.
        hidden_dim: Channels inside the feed-forward network.
        num_kv_heads: Key/value heads; by default num_heads.
        head_dim: Channels of a head; by default embed_dim / num_heads.
        activation: Of the network: "gelu", "gelu_tanh" or "relu"; gated "silu" or "gelu_tanh".
        gated: Whether the network is a GatedFeedForward.
        norm: "layer" or "rms".
        norm_first: Whether each step takes a norm of what came in (pre-norm), or the sum is normed (post-norm).
        norm_eps: The eps of the norms.
        bias: Whether the projections of attention have biases, or the names among q, k, v, out of those that have one.
        ffn_bias: Whether the network has biases.
        scale: What the scores of both attentions are multiplied with; by default 1 / sqrt(head_dim).
        causal: Whether a position attends to none after it.
        window: Hides the positions so many or more away.
        cross: Whether the layer attends to a memory too.
        memory_dim: Channels of the memory; by default embed_dim.
        dropout: The probability, in training, that a number is dropped: of attention's weights, inside the network,
            and of what each step adds.
        moe: A mixture of experts in place of the network.

    Raises:
        ValueError: A field is of the wrong type or out of range; the message names it.
    """

    _what: ClassVar[str] = "the layer"
    _parts: ClassVar = {"moe": MoEConfig}

    embed_dim: int
    num_heads: int
    hidden_dim: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    activation: str = "relu"
    gated: bool = False
    norm: str = "layer"
    norm_first: bool = False
    norm_eps: float = 1e-5
    bias: bool | tuple[str, ...] = True
    ffn_bias: bool = True
    scale: float | None = None
    causal: bool = False
    window: int | None = None
    cross: bool = False
    memory_dim: int | None = None
    dropout: float = 0.0
    moe: MoEConfig | None = None

    def __post_init__(self) -> None:
        self._check_one_of("norm", _NORMS)
        self._check_one_of("activation", GATED if self.gated else ACTIVATIONS)
        self._check_whole("embed_dim", "num_heads", "hidden_dim", "num_kv_heads", "head_dim", "window", "memory_dim")
        self._check_above_0("norm_eps")
        self._check_rates("dropout")
        if self.memory_dim is not None and not self.cross:
            raise ValueError(f"memory_dim must come with cross, got {self.memory_dim} alone")
        if self.moe is not None and self.moe.embed_dim != self.embed_dim:
            raise ValueError(f"embed_dim of the moe must be the layer's, {self.embed_dim}, got {self.moe.embed_dim}")

    def make_norm(self) -> nn.Module:
        """A norm of the layer's kind."""
        return _NORMS[self.norm](self.embed_dim, self.norm_eps)

    def make_network(self) -> nn.Module:
        """Its feed-forward network, or mixture."""
        if self.moe is not None:
            return MoE(self.moe)
        if self.gated:
            return GatedFeedForward(self.embed_dim, self.hidden_dim, self.activation, bias=self.ffn_bias)
        return FeedForward(self.embed_dim, self.hidden_dim, self.activation, bias=self.ffn_bias)


class Layer(nn.Module):
    """Attention of x to itself, with `cross` to a memory, and a feed-forward network; each is added to what came in,
    with a norm before it or after the sum."""

    def __init__(self, config: LayerConfig):
        super().__init__()
        self.config = config
        sizes = config.embed_dim, config.num_heads
        shared: dict[str, Any] = {"num_kv_heads": config.num_kv_heads, "head_dim": config.head_dim, "bias": config.bias}
        shared |= {"scale": config.scale, "dropout": config.dropout}
        self.self_attn = Attention(*sizes, causal=config.causal, window=config.window, **shared)
        self.norm1 = config.make_norm()
        if config.cross:
            self.cross_attn = Attention(*sizes, kv_dim=config.memory_dim, **shared)
            self.norm2 = config.make_norm()
        self.mlp = config.make_network()
        self.norm3 = config.make_norm()

    def __call__(
        self,
        x: mx.array,
        memory: mx.array | None = None,
        *,
        mask: mx.array | None = None,
        memory_mask: mx.array | None = None,
        bias: mx.array | None = None,
        cache: KVCache | None = None,
        cross_cache: CrossCache | None = None,
        key: mx.array | None = None,
        routings: list[Routing] | None = None,
    ) -> mx.array:
        """x (B, L, E), memory (B, S, memory_dim) -> (B, L, E). mask, memory_mask: which positions of x and of the
        memory may be attended to, True = attend, broadcast to (B, H, L, L) and (B, H, L, S). bias: added to the scores
        of self-attention. cache, cross_cache: of self-attention (with `causal` only) and of the memory. key: random,
        for dropout in training. routings gets where a mixture's tokens went."""
        if self.config.cross and memory is None:
            raise ValueError("memory must be given to a layer with cross-attention, got none")
        if not self.config.cross and memory is not None:
            raise ValueError("memory must not be given to a layer without cross-attention")
        if cache is not None and not self.config.causal:
            raise ValueError("a cache must be given to causal layers only, got causal=False")
        keys = _keys(key, 6) if self.training and self.config.dropout else [None] * 6
        x = self._step(
            x, self["norm1"], lambda y: self["self_attn"](y, mask=mask, bias=bias, cache=cache, key=keys[0]), keys[1]
        )
        if memory is not None:
            x = self._step(
                x,
                self["norm2"],
                lambda y: self["cross_attn"](y, memory, mask=memory_mask, cache=cross_cache, key=keys[2]),
                keys[3],
            )
        return self._step(x, self["norm3"], lambda y: self._feed(y, keys[4], routings), keys[5])

    def _step(
        self, x: mx.array, norm: nn.Module, form: Callable[[mx.array], mx.array], key: mx.array | None
    ) -> mx.array:
        """x and what `form` makes of it."""
        y = form(norm(x) if self.config.norm_first else x)
        y = x + apply_dropout(y, self.config.dropout, key)
        return y if self.config.norm_first else norm(y)

    def _feed(self, x: mx.array, key: mx.array | None, routings: list[Routing] | None) -> mx.array:
        if not isinstance(self["mlp"], MoE):
            return self["mlp"](x, dropout=0.0 if key is None else self.config.dropout, key=key)
        y, routing = self.mlp(x)
        if routings is not None:
            routings.append(routing)
        return y


def run_layers(
    layers: Sequence[Callable[..., mx.array]],
    x: mx.array,
    *,
    caches: Sequence[KVCache] | None = None,
    cross_caches: Sequence[CrossCache] | None = None,
    key: mx.array | None = None,
    **shared: Any,
) -> mx.array:
    """x through layers, or blocks, one after the other.

    Args:
        layers: Each is called with x, and with its own cache, cross_cache and key where they are given.
        x: (B, L, E).
        caches: Of self-attention, one for each layer.
        cross_caches: Of a memory, one for each layer.
        key: A random key, which is split.
        **shared: What every layer is called with.

    Returns:
        (B, L, E), what the last layer gives.

    Raises:
        ValueError: There are not as many caches as layers.
    """
    count, own = len(layers), dict[str, Any]()
    for name, given in (("caches", caches), ("cross_caches", cross_caches)):
        if given is not None:
            if len(given) != count:
                raise ValueError(f"{name} must be one a layer, {count}, got {len(given)}")
            own[name.removesuffix("s")] = given
    if key is not None:
        own["key"] = mx.random.split(key, count)
    held = caches is not None and (cross_caches is not None or shared.get("memory") is None)
    step = held and x.shape[:2] == (1, 1)
    x = mx.squeeze(x, 0) if step else x  # without a batch axis products of a single row need fewer operations
    for index, layer in enumerate(layers):
        x = layer(x, **{name: of_layers[index] for name, of_layers in own.items()}, **shared)
    return x[None] if step else x


def last_positions(x: mx.array, last: int | None) -> mx.array:
    """The last positions of x (B, L, E), so many or all: (B, last or L, E)."""
    return x if last is None or last >= x.shape[1] else x[:, x.shape[1] - last :]


class Stack(CacheMaker, nn.Module):
    """Layers of one kind in a row, with a norm after the last if `final_norm`."""

    def __init__(self, config: LayerConfig, num_layers: int, *, final_norm: bool = False):
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        self.config = config
        self.layers = [Layer(config) for _ in range(num_layers)]
        if final_norm:
            self.norm = config.make_norm()

    def __call__(
        self,
        x: mx.array,
        memory: mx.array | None = None,
        *,
        mask: mx.array | None = None,
        memory_mask: mx.array | None = None,
        bias: mx.array | None = None,
        caches: Sequence[KVCache] | None = None,
        cross_caches: Sequence[CrossCache] | None = None,
        key: mx.array | None = None,
        routings: list[Routing] | None = None,
    ) -> mx.array:
        """As Layer, with a cache of each kind for every layer."""
        shared: dict[str, Any] = {"memory": memory, "mask": mask, "memory_mask": memory_mask, "bias": bias}
        own: dict[str, Any] = {"caches": caches, "cross_caches": cross_caches, "key": key}
        x = run_layers(self["layers"], x, **own, **shared, routings=routings)
        return self["norm"](x) if "norm" in self else x

    def caches_for(self, options: CacheOptions) -> list[KVCache]:
        """See make_caches()."""
        return [KVCache.from_options(options.within(self.config.window)) for _ in self.layers]


def auxiliary_loss(routings: Sequence[Routing]) -> mx.array:
    """What training adds to the loss of a model: the sum of the losses of its mixtures."""
    return sum((routing.loss for routing in routings), mx.array(0.0))


def _keys(key: mx.array | None, count: int) -> list[mx.array]:
    if key is None:
        raise ValueError("dropout in training needs a random key, got none")
    return list(mx.random.split(key, count))
