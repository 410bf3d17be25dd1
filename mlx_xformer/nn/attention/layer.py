"""Attention: the projections around attention(), for every head grouping, width, position scheme and source.

Axes: B batch, H query heads, G key/value heads, L queries, S keys, E embed_dim, D head_dim, Dv value_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..cache import CrossCache, KVCache, View
from ..layers import LayerNorm, RMSNorm, WholeRMSNorm
from ..linear import Linear
from ..positions import alibi_by_distance, buckets_by_distance
from .config import PROJECTIONS, AttentionConfig
from .core import attention, attention_weights

__all__ = [
    "Attention",
    "AttentionConfig",
    "CrossAttention",
    "GroupedQueryAttention",
    "MultiHeadAttention",
    "MultiQueryAttention",
    "attention",
    "attention_score_bytes",
    "attention_weights",
    "get_attention",
    "initialize",
]
_NORMS: dict[str, Callable[..., nn.Module]] = {"rms": RMSNorm, "layer": LayerNorm, "rms_whole": WholeRMSNorm}


class Attention(nn.Module):
    """q_proj, k_proj, v_proj, attention(), out_proj: self-attention of x (B, L, E), or cross-attention from x to a
    source (B, S, kv_dim), values from another (B, S, v_dim) if given -> (B, L, out_dim). Without a batch axis in all of
    them, the result has none either. The options are those of AttentionConfig."""

    def __init__(self, embed_dim: int, num_heads: int, **options: Any):
        super().__init__()
        config: Any = AttentionConfig(
            embed_dim, num_heads, **options
        )  # Any: its fields are set, though declared optional
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
        """mask, bias: see attention(). causal: instead of the configuration's. offset, positions: where x is, for
        rotary positions (see Rotary). key: random, for the dropout of a module in training.

        cache: a KVCache has the positions before x, which follow it and attend to them and causally to one another,
        and then has x too; a CrossCache holds the source, which is projected when it is a new array. With a KVCache
        mask and bias are of the S positions that it shows, or of all so far."""
        if x.ndim == 2 and not isinstance(cache, CrossCache):
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
            if source is not None and x.shape[1] == 1:  # as a CrossCache has them: other strides round otherwise
                pair = mx.contiguous(pair[0]), mx.contiguous(pair[1])
        view = cache.append(*pair, window=config.window) if isinstance(cache, KVCache) else View(*pair, {})
        options = self._options(q, view, mask, bias, causal)
        dropout = self.config.dropout if self.training else 0.0
        out = attention(q, view.keys, view.values, **options, dropout=dropout, key=key)
        out = out if out.shape[2] == 1 else out.swapaxes(1, 2)  # (B, H, L, Dv) -> (B, L, H, Dv)
        out = out.reshape(*x.shape[:2], config.num_heads * config.widths[1])
        return self.out_proj(out)

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
        q = _heads(self.q_proj(x), config.num_heads)
        q = q if config.qk_norm is None else self.q_norm(q)
        return q if config.rotary is None else config.rotary(q, offset=offset, positions=positions)

    def _keys(
        self, x: mx.array, source: mx.array | None, offset: int | mx.array, positions: mx.array | None
    ) -> mx.array:
        config, keys = self.config, x if source is None else source
        _check("source", keys, config.kv_dim, x)
        k = _heads(self.k_proj(keys), config.kv_heads)
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
        if values.shape[1] != k.shape[2]:
            raise ValueError(f"value_source must have the length of source, {k.shape[2]}, got {values.shape[1]}")
        return k, _heads(self.v_proj(values), self.config.kv_heads)

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
            raise ValueError(f"offset must be 0 with a KVCache, which tells it, got {offset}")
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


def initialize(layer: Attention, scheme: str, *, key: mx.array) -> None:
    """Draws new weights from `key`, and sets the biases of projections to 0. "xavier": each projection uniform within
    sqrt(6 / (in + out)). "torch": as torch.nn.MultiheadAttention, whose packed q, k and v are one matrix with three
    times the outputs, and whose output is uniform within 1 / sqrt(in)."""
    if scheme not in ("torch", "xavier"):
        raise ValueError(f'scheme must be "torch" or "xavier", got {scheme!r}')
    projections = {name: getattr(layer, f"{name}_proj") for name in PROJECTIONS}
    rows = sum(projections[name].weight.shape[0] for name in "qkv")
    packed = len({projections[name].weight.shape[1] for name in "qkv"}) == 1
    for (name, projection), seed in zip(projections.items(), mx.random.split(key, 4), strict=True):
        made, given = projection.weight.shape
        bound = math.sqrt(6 / (given + made))
        if scheme == "torch":
            bound = given**-0.5 if name == "out" else math.sqrt(6 / (given + rows)) if packed else bound
        projection.weight = mx.random.uniform(-bound, bound, projection.weight.shape, key=seed)
        if "bias" in projection:
            projection.bias = mx.zeros_like(projection.bias)


def _check(name: str, x: mx.array, width: int | None, query: mx.array) -> None:
    if x.ndim != 3:
        raise ValueError(f"{name} must be (batch, length, channels), got shape {x.shape}")
    if x.shape[0] != query.shape[0]:
        raise ValueError(f"{name} must have the batch size of x, {query.shape[0]}, got {x.shape[0]}")
    if x.shape[-1] != width:
        raise ValueError(f"{name} must have {width} channels, got {x.shape[-1]}")


def _last(x: mx.array, S: int) -> mx.array:
    """The last S columns of a mask or bias of all positions so far."""
    return x[..., -S:] if x.ndim and x.shape[-1] > S else x


def _heads(x: mx.array, heads: int) -> mx.array:
    """(B, L, heads * D) -> (B, heads, L, D)."""
    if x.shape[1] == 1:
        return x.reshape(x.shape[0], heads, 1, x.shape[-1] // heads)
    return mx.unflatten(x, -1, (heads, x.shape[-1] // heads)).swapaxes(1, 2)


def MultiHeadAttention(embed_dim: int, num_heads: int, **options: Any) -> Attention:
    """Attention with a key/value head for every query head."""
    return Attention(embed_dim, num_heads, num_kv_heads=num_heads, **options)


def MultiQueryAttention(embed_dim: int, num_heads: int, **options: Any) -> Attention:
    """Attention with one key/value head (Shazeer 2019, arXiv 1911.02150)."""
    return Attention(embed_dim, num_heads, num_kv_heads=1, **options)


def GroupedQueryAttention(embed_dim: int, num_heads: int, num_kv_heads: int | None = None, **options: Any) -> Attention:
    """Attention whose key/value heads, by default half as many, serve equal groups of query heads (Ainslie et al. 2023,
    arXiv 2305.13245)."""
    num_kv_heads = max(1, num_heads // 2) if num_kv_heads is None else num_kv_heads
    return Attention(embed_dim, num_heads, num_kv_heads=num_kv_heads, **options)


def CrossAttention(embed_dim: int, num_heads: int, kv_dim: int | None = None, **options: Any) -> Attention:
    """Attention to a source of another width, by default of the same."""
    return Attention(embed_dim, num_heads, kv_dim=kv_dim, **options)


_KINDS: dict[str, Callable[..., Attention]] = {
    "mha": MultiHeadAttention,
    "mqa": MultiQueryAttention,
    "gqa": GroupedQueryAttention,
    "cross": CrossAttention,
}


def get_attention(kind: str, embed_dim: int, num_heads: int, **options: Any) -> Attention:
    """The Attention of a kind: "mha", "mqa", "gqa" or "cross". num_kv_heads is of no use to the first two."""
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join(_KINDS)}, got {kind!r}")
    if kind in ("mha", "mqa"):
        options.pop("num_kv_heads", None)
    return _KINDS[kind](embed_dim, num_heads, **options)


def attention_score_bytes(
    length: int, *, num_heads: int = 8, dtype: mx.Dtype = mx.float32, batch: int = 1, keys: int | None = None
) -> int:
    """Bytes of the scores of one attention from `length` queries to as many `keys` (unless given), where they are held
    at once: batch * num_heads * length * keys numbers. `attention` holds fewer wherever it can.

    Source: the attention memory table of MetalAudio's transformer guide, which is for one item in float32.
    """
    keys = length if keys is None else keys
    sizes = {"length": length, "num_heads": num_heads, "batch": batch, "keys": keys}
    for name, size in sizes.items():
        if size < 0:
            raise ValueError(f"{name} must be at least 0, got {size}")
    return batch * num_heads * length * keys * dtype.size
