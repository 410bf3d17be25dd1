"""How our functions are asked for what PyTorch's functional operations do, by PyTorch's argument names."""

from __future__ import annotations

import math

import mlx.core as mx

from mlx_xformer.backend import activations
from mlx_xformer.converters.attention import load_attention
from mlx_xformer.nn import layers
from mlx_xformer.nn.attention.layer import attention, attention_weights
from mlx_xformer.nn.attention.torch_layout import MultiheadAttention
from mlx_xformer.nn.masks import causal_mask


def last(x: mx.array, axis: int) -> mx.array:
    return mx.moveaxis(x, axis, -1) if x.ndim else x


def heads(x: mx.array, batch: int) -> mx.array:
    """(N, L, E) as one head; (H, L, D) beside a batch as that of every item, if it is not one itself."""
    return x if x.ndim == 4 else x[:, None] if not batch else mx.broadcast_to(x, (batch, *x.shape))


def sdpa(query, key, value, *, attn_mask=None, is_causal=False, dropout_p=0.0, dropout_key=None):
    wide = next((x.shape[0] for x in (query, key, value) if x.ndim == 4), 0)
    q, k, v = (heads(x, wide) for x in (query, key, value))
    mask = causal_mask(q.shape[2], k.shape[2], alignment="upper_left") if is_causal else None
    out = attention(q, k, v, mask=mask, bias=attn_mask, dropout=dropout_p if dropout_key is not None else 0.0,
                    key=dropout_key)  # fmt: skip
    return out if wide else out[:, 0]


def softmax(x, dim):
    """The weights of queries that are 0, whose scores are the bias."""
    rows = last(x, dim)
    bias = mx.reshape(rows, (1, 1, math.prod(rows.shape[:-1]), rows.shape[-1] if rows.ndim else 1))
    nothing = mx.zeros((1, 1, bias.shape[2], 1)), mx.zeros((1, 1, bias.shape[3], 1))
    weights = attention_weights(*nothing, bias=bias).reshape(rows.shape)
    return mx.moveaxis(weights, -1, dim) if rows.ndim else weights


def gelu(x, *, approximate="none"):
    return activations.gelu_tanh(x) if approximate == "tanh" else activations.gelu(x)


def glu(x, dim=-1):
    return mx.moveaxis(activations.glu(last(x, dim)), -1, dim)


def with_affine(module, weight, bias):
    if weight is not None:
        module.weight = weight.flatten()
    if bias is not None:
        module.bias = bias.flatten()
    return module


def layer_norm(x, normalized_shape, weight=None, bias=None, *, eps=1e-5):
    width = math.prod(normalized_shape)
    rows = x.reshape(*x.shape[: x.ndim - len(normalized_shape)], width)
    return with_affine(layers.LayerNorm(width, eps), weight, bias)(rows).reshape(x.shape)


def group_norm(x, num_groups, *, weight=None, bias=None, eps=1e-5):
    module = with_affine(layers.GroupNorm(num_groups, x.shape[1], eps), weight, bias)
    return mx.moveaxis(module(mx.moveaxis(x, 1, -1)), -1, 1)


def number(x):
    return x[0] if isinstance(x, list) else x


def by_groups(convolve, x, weight, bias, groups, outputs):
    """convolve(x (B, T, C), weight, bias) for each group of channels; x is (B, C, T) or (C, T), as in PyTorch."""
    batch = x[None] if x.ndim == 2 else x
    parts = zip(mx.split(batch.swapaxes(1, 2), groups, axis=-1), mx.split(weight, groups, axis=0), strict=True)
    biases = mx.split(mx.zeros((outputs,)) if bias is None else bias, groups)
    out = mx.concatenate([convolve(*part, b) for part, b in zip(parts, biases, strict=True)], axis=-1).swapaxes(1, 2)
    return out[0] if x.ndim == 2 else out


def conv1d(x, weight, bias=None, *, stride=1, padding=0, dilation=1, groups=1):
    """DilatedConv1d keeps the length: its kernel gets an odd number of taps, its input the padding."""
    stride, dilation, K = number(stride), number(dilation), weight.shape[2]
    total = dilation * (K - 1) if padding == "same" else 0
    left, right = (total // 2, total - total // 2) if isinstance(padding, str) else [number(padding)] * 2

    def convolve(x, weight, bias):
        module = layers.DilatedConv1d(x.shape[2], weight.shape[0], K + 1 - K % 2, dilation)
        module.weight = mx.pad(weight.swapaxes(1, 2), [(0, 0), (0, 1 - K % 2), (0, 0)])
        module.bias = bias
        out = module(mx.pad(x, [(0, 0), (left, right), (0, 0)]))
        first = module.weight.shape[1] // 2 * dilation
        length = x.shape[1] + left + right - dilation * (K - 1)
        return out[:, first : first + length : stride]

    return by_groups(convolve, x, weight, bias, groups, weight.shape[0])


def conv_transpose1d(x, weight, bias=None, *, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    """ConvTranspose1d neither dilates nor cuts: zeros between the taps, then what padding takes and adds."""
    stride, padding, extra, dilation = (number(n) for n in (stride, padding, output_padding, dilation))

    def convolve(x, weight, bias):
        C, O, K = weight.shape
        taps = mx.pad(weight[..., None], [(0, 0)] * 3 + [(0, dilation - 1)]).reshape(C, O, -1)
        taps = taps[..., : dilation * (K - 1) + 1]
        module = layers.ConvTranspose1d(C, O, taps.shape[2], stride)
        module.weight, module.bias = taps.transpose(1, 2, 0), bias
        out = module(x)
        length = (x.shape[1] - 1) * stride - 2 * padding + taps.shape[2] + extra
        missing = max(0, padding + length - out.shape[1])
        out = mx.concatenate([out, mx.broadcast_to(bias, (len(out), missing, O))], axis=1)
        return out[:, padding : padding + length]

    return by_groups(convolve, x, weight, bias, groups, weight.shape[1] * groups)


def multi_head_attention_forward(
    query, key, value, embed_dim, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v, add_zero_attn, dropout_p,
    out_proj_weight, out_proj_bias, *, training=True, key_padding_mask=None, need_weights=True, attn_mask=None,
    use_separate_proj_weight=False, q_proj_weight=None, k_proj_weight=None, v_proj_weight=None, static_k=None,
    static_v=None, average_attn_weights=True, is_causal=False, dropout_key=None,
):  # fmt: skip
    tensors = {"in_proj_weight": in_proj_weight, "in_proj_bias": in_proj_bias}
    widths = {}
    if use_separate_proj_weight:
        tensors = {"in_proj_bias": in_proj_bias, "q_proj_weight": q_proj_weight}
        tensors |= {"k_proj_weight": k_proj_weight, "v_proj_weight": v_proj_weight}
        widths = {"kdim": k_proj_weight.shape[1], "vdim": v_proj_weight.shape[1]}
    tensors |= {"out_proj.weight": out_proj_weight, "out_proj.bias": out_proj_bias}
    if bias_k is not None:
        tensors |= {"bias_k": bias_k.reshape(1, 1, -1), "bias_v": bias_v.reshape(1, 1, -1)}
    module = MultiheadAttention(
        embed_dim, num_heads, dropout=dropout_p, bias=in_proj_bias is not None, add_bias_kv=bias_k is not None,
        add_zero_attn=add_zero_attn, **widths,
    )  # fmt: skip
    load_attention(
        module,
        {name: value for name, value in tensors.items() if value is not None},
        "pytorch-split" if use_separate_proj_weight else "pytorch",
    )
    module.train(training and dropout_key is not None)
    out, weights = module(
        query, key, value, key_padding_mask=key_padding_mask, need_weights=need_weights, attn_mask=attn_mask,
        average_attn_weights=average_attn_weights, is_causal=is_causal, static_k=static_k, static_v=static_v,
        dropout_key=dropout_key,
    )  # fmt: skip
    return out if weights is None else (out, weights)
