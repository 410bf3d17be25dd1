"""Attention by the names of its kinds, its initial weights, and the bytes of its scores."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypedDict

import mlx.core as mx

from ..rotary import Rotary
from .config import PROJECTIONS
from .layer import Attention

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AttentionOptions(TypedDict, total=False):
    """Keyword arguments of Attention, for the functions that hand them on."""

    head_dim: int | None
    value_dim: int | None
    v_dim: int | None
    out_dim: int | None
    bias: bool | tuple[str, ...]
    qk_norm: str | None
    norm_eps: float
    rotary: Rotary | None
    alibi: bool
    relative: tuple[int, int] | None
    causal: bool
    window: int | None
    sinks: bool
    softcap: float | None
    scale: float | None
    dropout: float


def MultiHeadAttention(
    embed_dim: int, num_heads: int, *, kv_dim: int | None = None, **options: Unpack[AttentionOptions]
) -> Attention:
    """Attention with a key/value head for every query head. The arguments are Attention's."""
    return Attention(embed_dim, num_heads, num_kv_heads=num_heads, kv_dim=kv_dim, **options)


def MultiQueryAttention(
    embed_dim: int, num_heads: int, *, kv_dim: int | None = None, **options: Unpack[AttentionOptions]
) -> Attention:
    """Attention with one key/value head (Shazeer 2019, arXiv 1911.02150). The arguments are Attention's."""
    return Attention(embed_dim, num_heads, num_kv_heads=1, kv_dim=kv_dim, **options)


def GroupedQueryAttention(
    embed_dim: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    *,
    kv_dim: int | None = None,
    **options: Unpack[AttentionOptions],
) -> Attention:
    """Attention whose key/value heads, by default half as many, serve equal groups of query heads.

    Source: Ainslie et al. 2023, arXiv 2305.13245. The arguments are Attention's.
    """
    num_kv_heads = max(1, num_heads // 2) if num_kv_heads is None else num_kv_heads
    return Attention(embed_dim, num_heads, num_kv_heads=num_kv_heads, kv_dim=kv_dim, **options)


def CrossAttention(
    embed_dim: int,
    num_heads: int,
    kv_dim: int | None = None,
    *,
    num_kv_heads: int | None = None,
    **options: Unpack[AttentionOptions],
) -> Attention:
    """Attention to a source of another width, by default of the same. The arguments are Attention's."""
    return Attention(embed_dim, num_heads, num_kv_heads=num_kv_heads, kv_dim=kv_dim, **options)


_KINDS = ("mha", "mqa", "gqa", "cross")


def get_attention(
    kind: str,
    embed_dim: int,
    num_heads: int,
    *,
    num_kv_heads: int | None = None,
    kv_dim: int | None = None,
    **options: Unpack[AttentionOptions],
) -> Attention:
    """Makes the Attention of a kind.

    Args:
        kind: "mha" for MultiHeadAttention, "mqa" for MultiQueryAttention, "gqa" for GroupedQueryAttention or "cross"
            for CrossAttention.
        embed_dim: Channels of x.
        num_heads: Query heads.
        num_kv_heads: Key/value heads; the first two kinds have their own.
        kv_dim: Channels of the source of keys and values; by default embed_dim.
        **options: The other arguments of Attention.

    Returns:
        The layer.

    Raises:
        ValueError: The kind is unknown, or an argument is out of range.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join(_KINDS)}, got {kind!r}")
    if kind == "mha":
        return MultiHeadAttention(embed_dim, num_heads, kv_dim=kv_dim, **options)
    if kind == "mqa":
        return MultiQueryAttention(embed_dim, num_heads, kv_dim=kv_dim, **options)
    if kind == "gqa":
        return GroupedQueryAttention(embed_dim, num_heads, num_kv_heads, kv_dim=kv_dim, **options)
    return CrossAttention(embed_dim, num_heads, kv_dim, num_kv_heads=num_kv_heads, **options)


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
