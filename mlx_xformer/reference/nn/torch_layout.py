"""PyTorch's nn.MultiheadAttention, batch first. Axes: N batch, L queries, S keys, E embed_dim, H heads, D head_dim."""

import numpy as np

from .attention import attention, attention_weights
from .layers import Params, linear, sub


def multihead_attention(
    params: Params,
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    *,
    num_heads: int,
    key_padding_mask: np.ndarray | None = None,
    attn_mask: np.ndarray | None = None,
    add_zero_attn: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """query (N, L, E), key (N, S, ...), value (N, S, ...) -> (N, L, E), and the weights averaged over the heads.

    Parameters: q_proj, k_proj, v_proj, out_proj, and bias_k, bias_v (1, 1, E): one more position. add_zero_attn: one of
    zeros. key_padding_mask (N, S) and attn_mask (L, S): boolean, True = ignore; the added positions are seen by all.
    """
    N, L = query.shape[:2]
    projected = [linear(sub(params, f"{n}_proj"), x) for n, x in zip("qkv", (query, key, value), strict=True)]
    ignored = np.zeros((N, L, key.shape[1]), bool)
    for mask in (None if key_padding_mask is None else key_padding_mask[:, None], attn_mask):
        ignored = ignored if mask is None else ignored | mask
    more = []
    if "bias_k" in params:
        more.append((params["bias_k"], params["bias_v"]))
    if add_zero_attn:
        more.append((np.zeros_like(projected[0][:1, :1]),) * 2)
    for pair in more:
        for place, x in zip((1, 2), pair, strict=True):
            projected[place] = np.concatenate([projected[place], np.repeat(x, N, axis=0)], axis=1)
        ignored = np.concatenate([ignored, np.zeros((N, L, 1), bool)], axis=2)
    q, k, v = (x.reshape(N, x.shape[1], num_heads, -1).swapaxes(1, 2) for x in projected)  # (N, H, length, D)
    allowed = ~ignored[:, None]
    out = attention(q, k, v, mask=allowed).swapaxes(1, 2).reshape(N, L, -1)
    return linear(sub(params, "out_proj"), out), attention_weights(q, k, mask=allowed).mean(axis=1)
