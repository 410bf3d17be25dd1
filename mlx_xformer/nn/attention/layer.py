"""Attention: the projections around attention(), for every head grouping, width, position scheme and source.

Axes: B batch, H query heads, G key/value heads, L queries, S keys, E embed_dim, D head_dim, Dv value_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..cache import CrossCache, KVCache, View
from ..layers import LayerNorm, RMSNorm, WholeRMSNorm
from ..linear import Linear
from ..positions import alibi_by_distance, buckets_by_distance
from ..rotary import Rotary
from .config import AttentionConfig
from .core import attention, attention_weights

_NORMS: dict[str, Callable[..., nn.Module]] = {"rms": RMSNorm, "layer": LayerNorm, "rms_whole": WholeRMSNorm}


class Attention(nn.Module):
    """Self-attention or cross-attention with its projections: q_proj, k_proj, v_proj, attention(), out_proj."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        kv_dim: int | None = None,
        v_dim: int | None = None,
        out_dim: int | None = None,
        bias: bool | tuple[str, ...] = True,
        qk_norm: str | None = None,
        norm_eps: float = 1e-6,
        rotary: Rotary | None = None,
        alibi: bool = False,
        relative: tuple[int, int] | None = None,
        causal: bool = False,
        window: int | None = None,
        sinks: bool = False,
        softcap: float | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
    ):
        """Makes the layer of an AttentionConfig with these fields.

        Args:
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
            ValueError: An argument is of the wrong type or out of range; the message names it.
        """
        super().__init__()
        config: Any = AttentionConfig(  # Any: its fields are set, though declared optional
            embed_dim,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            kv_dim=kv_dim,
            v_dim=v_dim,
            out_dim=out_dim,
            bias=bias,
            qk_norm=qk_norm,
            norm_eps=norm_eps,
            rotary=rotary,
            alibi=alibi,
            relative=relative,
            causal=causal,
            window=window,
            sinks=sinks,
            softcap=softcap,
            scale=scale,
            dropout=dropout,
        )
        self.config: AttentionConfig = config
        head_dim, value_dim = config.widths
        sizes = {
            "q": (config.embed_dim, config.num_heads * head_dim),
            "k": (config.kv_dim, config.kv_heads * head_dim),
            "v": (config.v_dim, config.kv_heads * value_dim),
            "out": (config.num_heads * value_dim, config.out_dim),
        }
        for name, (given, made) in sizes.items():
            setattr(self, f"{name}_proj", Linear(given, made, bias=name in config.bias))
        if config.qk_norm is not None:
            for name, heads in (("q_norm", config.num_heads), ("k_norm", config.kv_heads)):
                dims = head_dim * (heads if config.qk_norm == "rms_whole" else 1)
                setattr(self, name, _NORMS[config.qk_norm](dims, config.norm_eps))
        if config.relative is not None:
            self.relative = nn.Embedding(config.relative[0], config.num_heads)
        if config.sinks:
            self.sinks = mx.zeros((config.num_heads,))

    @property
    def scale(self) -> float:
        """What scores are multiplied with: the configuration's, or 1 / sqrt(head_dim)."""
        return self.config.widths[0] ** -0.5 if self.config.scale is None else self.config.scale

    def __call__(
        self,
        x: mx.array,
        source: mx.array | None = None,
        value_source: mx.array | None = None,
        *,
        mask: mx.array | None = None,
        bias: mx.array | None = None,
        causal: bool | None = None,
        offset: int | mx.array = 0,
        positions: mx.array | None = None,
        key: mx.array | None = None,
        cache: KVCache | CrossCache | None = None,
    ) -> mx.array:
        """Attends from x to itself, or to a source.

        Args:
            x: (B, L, E), or (L, E) without a batch axis; then no other array has one.
            source: What keys are projected from, (B, S, kv_dim), and values too unless they have a source of their own.
                By default x.
            value_source: What values are projected from, (B, S, v_dim).
            mask: Boolean, True = attend, broadcast to (B, H, L, S). With a KVCache, over the S positions that it shows,
                or over all so far; likewise the bias.
            bias: Floats that are added to the scores, broadcast likewise.
            causal: Instead of the configuration's.
            offset: The position of the first of x, for rotary positions.
            positions: Instead, the position of each, (L,) or (B, L).
            key: The random key of the dropout in training.
            cache: A KVCache has the positions before x, which follows them and attends to them and causally to itself,
                and then has x too. A CrossCache holds what is projected of the source, anew when it is another array.

        Returns:
            (B, L, out_dim), or (L, out_dim).

        Raises:
            ValueError: The arguments do not fit together or do not fit the configuration.
        """
        step = x.shape[:-1] == (1,) and isinstance(cache, (KVCache, CrossCache))  # which lifting would only slow
        if x.ndim == 2 and not step and not isinstance(cache, CrossCache):
            for name, y in (("source", source), ("value_source", value_source)):
                if y is not None and y.ndim != 2:
                    raise ValueError(f"{name} must be (length, channels), as x is, got shape {y.shape}")
            lift = lambda y: None if y is None else y[None]  # noqa: E731
            given: dict[str, Any] = {"mask": mask, "bias": bias, "causal": causal, "offset": offset}
            given |= {"positions": positions, "key": key, "cache": cache}
            return self(x[None], lift(source), lift(value_source), **given)[0]
        config = self.config
        if isinstance(cache, KVCache):
            self._check_cached(source, value_source, mask, bias, causal, offset, cache)
            offset, causal = cache.offset, True
        elif cache is not None and (source is None or value_source is not None):
            raise ValueError("a CrossCache needs a source and no value_source")
        pair: tuple[mx.array, mx.array]
        q = self._queries(x, source, offset, positions)
        if isinstance(cache, CrossCache) and source is not None:  # else refused above
            pair = cache.get(source, lambda memory: self._keys_and_values(x, memory, None, 0, None))
        else:
            pair = self._keys_and_values(x, source, value_source, offset, positions)
            if source is not None and q.shape[2] == 1:  # as a CrossCache has them: other strides round otherwise
                pair = mx.contiguous(pair[0]), mx.contiguous(pair[1])
        view = cache.append(*pair, window=config.window) if isinstance(cache, KVCache) else View(*pair, {})
        options = self._options(q, view, mask, bias, causal)
        dropout = self.config.dropout if self.training else 0.0
        out = attention(q, view.keys, view.values, **options, dropout=dropout, key=key)
        out = out if out.shape[2] == 1 else out.swapaxes(1, 2)  # (B, H, L, Dv) -> (B, L, H, Dv)
        out = out.reshape(*x.shape[:-1], config.num_heads * config.widths[1])
        return self["out_proj"](out)

    def weights(
        self,
        x: mx.array,
        source: mx.array | None = None,
        *,
        mask: mx.array | None = None,
        bias: mx.array | None = None,
        causal: bool | None = None,
        offset: int | mx.array = 0,
        positions: mx.array | None = None,
        average: bool = False,
    ) -> mx.array:
        """The attention weights (B, H, L, S), or averaged over the heads (B, L, S), for x (B, L, E). Without a batch
        axis in x and source the result has none either."""
        if x.ndim == 2:
            given: dict[str, Any] = {"mask": mask, "bias": bias, "causal": causal, "offset": offset}
            given |= {"positions": positions, "average": average}
            return self.weights(x[None], None if source is None else source[None], **given)[0]
        q = self._queries(x, source, offset, positions)
        k = self._keys(x, source, offset, positions)
        return attention_weights(q, k, **self._options(q, View(k, k, {}), mask, bias, causal), average=average)

    def _queries(
        self, x: mx.array, source: mx.array | None, offset: int | mx.array, positions: mx.array | None
    ) -> mx.array:
        config = self.config
        _check("x", x, config.embed_dim, x)
        if config.rotary is not None and source is not None:
            raise ValueError("rotary positions need self-attention, got a source")
        if config.rotary is None and positions is not None:
            raise ValueError("positions need an Attention with rotary positions, got one without")
        q = _heads(self["q_proj"](x), config.num_heads)
        q = q if config.qk_norm is None else self.q_norm(q)
        return q if config.rotary is None else config.rotary(q, offset=offset, positions=positions)

    def _keys(
        self, x: mx.array, source: mx.array | None, offset: int | mx.array, positions: mx.array | None
    ) -> mx.array:
        config, keys = self.config, x if source is None else source
        _check("source", keys, config.kv_dim, x)
        k = _heads(self["k_proj"](keys), config.kv_heads)
        k = k if config.qk_norm is None else self.k_norm(k)
        return k if config.rotary is None else config.rotary(k, offset=offset, positions=positions)

    def _keys_and_values(
        self,
        x: mx.array,
        source: mx.array | None,
        value_source: mx.array | None,
        offset: int | mx.array,
        positions: mx.array | None,
    ) -> tuple[mx.array, mx.array]:
        values = (x if source is None else source) if value_source is None else value_source
        k = self._keys(x, source, offset, positions)
        _check("value_source", values, self.config.v_dim, x)
        if values.shape[-2] != k.shape[2]:
            raise ValueError(f"value_source must have the length of source, {k.shape[2]}, got {values.shape[-2]}")
        return k, _heads(self["v_proj"](values), self.config.kv_heads)

    def _check_cached(
        self,
        source: mx.array | None,
        value_source: mx.array | None,
        mask: mx.array | None,
        bias: mx.array | None,
        causal: bool | None,
        offset: int | mx.array,
        cache: KVCache,
    ) -> None:
        if source is not None or value_source is not None or causal is False:
            raise ValueError("a KVCache needs causal self-attention, got a source or causal=False")
        if isinstance(offset, mx.array) or offset:
            raise ValueError(f"offset must be 0 with a KVCache, which has its own, got {offset}")
        wide = any(y is not None and y.ndim and y.shape[-1] > 1 for y in (mask, bias))
        if cache.keep and (wide or self.config.alibi or self.config.relative):
            raise ValueError(f"a KVCache needs keep 0 for masks and biases that differ by key, got {cache.keep}")

    def _options(
        self, q: mx.array, view: View, mask: mx.array | None, bias: mx.array | None, causal: bool | None
    ) -> dict[str, Any]:
        config, (L, S) = self.config, (q.shape[2], view.keys.shape[2])
        causal = config.causal if causal is None else causal
        far = []
        if config.alibi:
            far.append(alibi_by_distance(config.num_heads, L, S).astype(q.dtype))
        if config.relative is not None:
            count, distance = config.relative
            buckets = buckets_by_distance(L, S, num_buckets=count, max_distance=distance, bidirectional=not causal)
            far.append(self.relative(buckets).T)  # (H, S + L - 1)
        if view.options:  # of a cache, which may show fewer positions than there are so far
            mask, bias = (None if y is None else _last(y, S) for y in (mask, bias))
        seen = view.options.get("mask")
        options = {
            "scale": self.scale,
            "bias": bias,
            "by_distance": sum(far[1:], far[0]) if far else None,
            "causal": causal,
            "window": config.window,
            "sinks": self.sinks if config.sinks else None,
            "softcap": config.softcap,
        }
        if view.options:  # of a cache, which has taken the window into account
            options |= {"window": None, **view.options}
        return {**options, "mask": mask if seen is None else seen if mask is None else mask & seen}


def _check(name: str, x: mx.array, width: int | None, query: mx.array) -> None:
    if x.ndim != 3 and x.shape[:-1] != (1,):
        raise ValueError(f"{name} must be (batch, length, channels), got shape {x.shape}")
    if x.shape[0] != query.shape[0]:
        raise ValueError(f"{name} must have the batch size of x, {query.shape[0]}, got {x.shape[0]}")
    if x.shape[-1] != width:
        raise ValueError(f"{name} must have {width} channels, got {x.shape[-1]}")


def _last(x: mx.array, S: int) -> mx.array:
    """The last S columns of a mask or bias of all positions so far."""
    return x[..., -S:] if x.ndim and x.shape[-1] > S else x


def _heads(x: mx.array, heads: int) -> mx.array:
    """(B, L, heads * D), or (1, heads * D) of a single position -> (B, heads, L, D)."""
    if x.shape[-2] == 1:
        return x.reshape(x.shape[0], heads, 1, x.shape[-1] // heads)
    return mx.unflatten(x, -1, (heads, x.shape[-1] // heads)).swapaxes(1, 2)
