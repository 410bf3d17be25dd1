"""PyTorch's nn.MultiheadAttention over attention(): its arguments, polarities and axis orders.

This is the one place where True in a mask means "ignore". Axes: N batch, L queries, S keys, E embed_dim, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..masks import causal_mask
from .core import attention, attention_weights


class MultiheadAttention(nn.Module):
    """torch.nn.MultiheadAttention: its arguments, shapes and mask polarity.

    The parameters are q_proj, k_proj, v_proj, out_proj, bias_k and bias_v (1, 1, E); converters.attention converts
    PyTorch's packed and split ones.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
    ):
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, {num_heads}, got {embed_dim}")
        self.num_heads, self.dropout = num_heads, dropout
        self.add_zero_attn, self.batch_first = add_zero_attn, batch_first
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.k_proj = nn.Linear(embed_dim if kdim is None else kdim, embed_dim, bias=bias)
        self.v_proj = nn.Linear(embed_dim if vdim is None else vdim, embed_dim, bias=bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        if add_bias_kv:
            self.bias_k, self.bias_v = mx.zeros((1, 1, embed_dim)), mx.zeros((1, 1, embed_dim))

    def __call__(
        self,
        query: mx.array,
        key: mx.array,
        value: mx.array,
        *,
        key_padding_mask: mx.array | None = None,
        need_weights: bool = True,
        attn_mask: mx.array | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        static_k: mx.array | None = None,
        static_v: mx.array | None = None,
        dropout_key: mx.array | None = None,
    ) -> tuple[mx.array, mx.array | None]:
        """The output, shaped as query, and the weights before dropout, (N, L, S), or (N, H, L, S) if not averaged.

        query is (L, N, E), key and value are (S, N, ...), or the batch comes first, or there is no N.
        """
        if query.ndim == 2:
            batch = 0 if self.batch_first else 1
            query, key, value = (mx.expand_dims(x, batch) for x in (query, key, value))
            padding = None if key_padding_mask is None else key_padding_mask[None]
            given: dict[str, Any] = {
                "static_k": static_k,
                "static_v": static_v,
                "dropout_key": dropout_key,
                "is_causal": is_causal,
            }
            out, weights = self(
                query,
                key,
                value,
                key_padding_mask=padding,
                attn_mask=attn_mask,
                need_weights=need_weights,
                average_attn_weights=average_attn_weights,
                **given,
            )
            return out.squeeze(batch), None if weights is None else weights[0]
        self._check(query, key, value)
        if not self.batch_first:
            query, key, value = (x.swapaxes(0, 1) for x in (query, key, value))
        N, L, keys = *query.shape[:2], key.shape[1]
        if static_k is not None or static_v is not None:
            keys = self._check_static(static_k, static_v, N)
        q, k, v = self._projected(query, key, value, static_k, static_v)
        if is_causal and attn_mask is None:
            attn_mask = ~causal_mask(L, keys, alignment="upper_left")
        mask, bias = self._masks(key_padding_mask, attn_mask, (N, L, keys), k.shape[2] - keys)
        dropout = self.dropout if self.training else 0.0
        weights = attention_weights(q, k, mask=mask, bias=bias) if need_weights else None
        if weights is None or dropout:
            out = attention(q, k, v, mask=mask, bias=bias, dropout=dropout, key=dropout_key)
        else:
            out = weights @ v
        out = self.out_proj(mx.flatten(out.swapaxes(1, 2), 2, 3))  # (N, H, L, D) -> (N, L, E)
        out = out if self.batch_first else out.swapaxes(0, 1)
        return out, weights.mean(axis=1) if weights is not None and average_attn_weights else weights

    def _masks(
        self, padding: mx.array | None, attn: mx.array | None, shape: tuple[int, int, int], more: int
    ) -> tuple[mx.array | None, mx.array | None]:
        """What attention() takes for PyTorch's masks over (N, L, S): True = attend, and a bias.

        `more` positions stand behind the S, for all to see.
        """
        (N, L, S), H = shape, self.num_heads
        mask, bias = None, None
        for name, given, shapes in (
            ("key_padding_mask", padding, [(N, S)]),
            ("attn_mask", attn, [(L, S), (N * H, L, S)]),
        ):
            if given is None:
                continue
            part = _widened(_checked(name, given, shapes), more)
            if given is padding or part.ndim == 3:
                part = part.reshape((N, 1, 1, S + more) if given is padding else (N, H, L, S + more))
            if part.dtype == mx.bool_:
                mask = ~part if mask is None else mask & ~part
            else:
                bias = part if bias is None else bias + part
        return mask, bias

    def _check(self, query: mx.array, key: mx.array, value: mx.array) -> None:
        batch = 0 if self.batch_first else 1
        for name, x, layer in (("query", query, self.q_proj), ("key", key, self.k_proj), ("value", value, self.v_proj)):
            if x.ndim != 3:
                raise ValueError(f"{name} must have 2 or 3 axes, as many as query, got shape {x.shape}")
            if x.shape[-1] != layer.weight.shape[1]:
                raise ValueError(f"{name} must have {layer.weight.shape[1]} channels, got {x.shape[-1]}")
            if x.shape[batch] != query.shape[batch]:
                raise ValueError(
                    f"{name} must have the batch size of query, {query.shape[batch]}, got {x.shape[batch]}"
                )
        if key.shape[1 - batch] != value.shape[1 - batch]:
            raise ValueError(f"value must have the length of key, {key.shape[1 - batch]}, got {value.shape[1 - batch]}")

    def _check_static(self, k: mx.array | None, v: mx.array | None, N: int) -> int:
        """The length of heads that were projected before."""
        if k is None or v is None or "bias_k" in self:
            raise ValueError("static_k and static_v must be given both, and without learned positions (add_bias_kv)")
        width = self.q_proj.weight.shape[0] // self.num_heads
        for name, x in (("static_k", k), ("static_v", v)):
            if x.ndim != 3 or x.shape != (N * self.num_heads, k.shape[1], width):
                raise ValueError(f"{name} must have shape {(N * self.num_heads, k.shape[1], width)}, got {x.shape}")
        return k.shape[1]

    def _projected(
        self,
        query: mx.array,
        key: mx.array,
        value: mx.array,
        static_k: mx.array | None,
        static_v: mx.array | None,
    ) -> list[mx.array]:
        """Heads (N, H, length, D), with the learned and the zero position at the end."""
        N, H = query.shape[0], self.num_heads
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if "bias_k" in self:
            k, v = (
                mx.concatenate([x, mx.repeat(b, N, axis=0)], axis=1) for x, b in ((k, self.bias_k), (v, self.bias_v))
            )
        heads = [mx.unflatten(x, -1, (H, -1)).swapaxes(1, 2) for x in (q, k, v)]
        for place, static in ((1, static_k), (2, static_v)):
            if static is not None:
                heads[place] = mx.unflatten(static, 0, (N, H))
        if self.add_zero_attn:
            heads[1:] = [mx.pad(x, [(0, 0), (0, 0), (0, 1), (0, 0)]) for x in heads[1:]]
        return heads


def _checked(name: str, mask: mx.array, shapes: Sequence[tuple[int, ...]]) -> mx.array:
    if mask.shape not in shapes:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, got {mask.shape}")
    if mask.dtype != mx.bool_ and not mx.issubdtype(mask.dtype, mx.floating):
        raise ValueError(f"{name} must be boolean or float, got {mask.dtype}")
    return mask


def _widened(mask: mx.array, more: int) -> mx.array:
    """A mask with the positions that were added at the end, which all may see."""
    return mx.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, more)]) if more else mask
