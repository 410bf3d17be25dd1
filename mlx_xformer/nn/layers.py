"""Norms, LayerScale, feed-forward networks and convolutions, all channels-last.

Axes: B batch, T time, F frequencies, C channels, O output channels, K kernel.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..backend import activations, dispatch, fused, norms
from ..backend.products import quantized_product
from .config import check_eps, check_sizes
from .linear import Linear, apply_linear
from .positions import sinusoidal


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis: eps inside the root, biased variance, weight and bias (E,)."""

    def __init__(self, dims: int, eps: float = 1e-5):
        super().__init__()
        check_sizes(dims=dims)
        check_eps(eps)
        self.dims, self.eps = dims, eps
        self.weight = mx.ones((dims,))
        self.bias = mx.zeros((dims,))

    def __call__(self, x: mx.array) -> mx.array:
        """Normalises x (..., E)."""
        return norms.layer_norm(x, self["weight"], self["bias"], self.eps)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis (Zhang and Sennrich 2019, arXiv 1910.07467): eps inside the
    root; weight (E,) is the gain or, with `plus_one`, what the gain is above 1."""

    def __init__(self, dims: int, eps: float = 1e-5, plus_one: bool = False):
        super().__init__()
        check_sizes(dims=dims)
        check_eps(eps)
        self.dims, self.eps, self.plus_one = dims, eps, plus_one
        self.weight = mx.zeros((dims,)) if plus_one else mx.ones((dims,))

    def __call__(self, x: mx.array) -> mx.array:
        """Normalises x (..., E)."""
        gain = 1 + self["weight"].astype(mx.float32) if self.plus_one else self["weight"]
        return norms.rms_norm(x, gain, self.eps)


class WholeRMSNorm(RMSNorm):
    """RMSNorm of the queries or keys of all heads at once, (B, heads, L, D) by weight (heads * D,), as OLMoE has it
    (Muennighoff et al. 2024, arXiv 2409.02060)."""

    def __call__(self, x: mx.array) -> mx.array:
        """Normalises x (B, heads, L, D) over heads and D together."""
        y = super().__call__(mx.flatten(x.swapaxes(1, 2), 2, 3))  # (B, L, heads * D)
        return mx.unflatten(y, -1, (x.shape[1], x.shape[3])).swapaxes(1, 2)


class GroupNorm(nn.Module):
    """Group normalisation as PyTorch's, channels last: consecutive channels form a group, which is normalised
    together with `axes` of the input (by default all but the first and the last)."""

    def __init__(self, num_groups: int, dims: int, eps: float = 1e-5):
        super().__init__()
        check_sizes(num_groups=num_groups, dims=dims)
        check_eps(eps)
        if dims % num_groups:
            raise ValueError(f"num_groups must divide dims, {dims}, got {num_groups}")
        self.num_groups, self.eps = num_groups, eps
        self.weight = mx.ones((dims,))
        self.bias = mx.zeros((dims,))

    def __call__(self, x: mx.array, axes: tuple[int, ...] | None = None) -> mx.array:
        """Normalises x (B, ..., C) over `axes` and the channels of each group."""
        axes = tuple(range(1, x.ndim - 1)) if axes is None else axes
        return norms.normalize(x, self.weight, self.bias, axes=axes, num_groups=self.num_groups, eps=self.eps)


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch. Source: Touvron et al. 2021, arXiv 2103.17239."""

    def __init__(self, dims: int, init: float = 1e-4):
        super().__init__()
        self.scale = mx.full((dims,), init)

    def __call__(self, x: mx.array) -> mx.array:
        """Scales x (..., dims)."""
        if not x.size:  # MLX takes 20 s on a CPU to sum over nothing, for the gradient
            return x
        return x * self.scale


def apply_dropout(x: mx.array, rate: float, key: mx.array | None) -> mx.array:
    """x, each number 0 at this rate by a random key, and else larger by 1 / (1 - rate); x itself without a key."""
    if key is None or not rate:
        return x
    return x * mx.random.bernoulli(1 - rate, x.shape, key).astype(x.dtype) * (1 / (1 - rate))


class PositionalEncoding(nn.Module):
    """Adds sinusoidal positions to vectors, then drops some numbers in training (Vaswani et al. 2017, arXiv
    1706.03762): the rows of a batch get the same, the positions of a row do not. There are no parameters."""

    def __init__(self, embed_dim: int, *, max_len: int = 5000, dropout: float = 0.0, max_period: float = 10000.0):
        """Sets the sizes.

        Args:
            embed_dim: Channels E, an odd number of them too.
            max_len: The most positions.
            dropout: The probability, in training, that a number of the sum becomes 0.
            max_period: See sinusoidal().

        Raises:
            ValueError: An argument is out of range.
        """
        super().__init__()
        check_sizes(embed_dim=embed_dim, max_len=max_len)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be a number from 0 to below 1, got {dropout}")
        self.embed_dim, self.max_len, self.dropout, self.max_period = embed_dim, max_len, dropout, max_period

    def __call__(self, x: mx.array, *, offset: int = 0, key: mx.array | None = None) -> mx.array:
        """Adds the positions from `offset` on.

        Args:
            x: Vectors (B, L, E) or (L, E).
            offset: The position of the first of the L vectors.
            key: The random key of the dropout, needed in training unless `dropout` is 0.

        Returns:
            An array of the shape and dtype of x.

        Raises:
            ValueError: x has other axes or channels, a position is not from 0 to max_len - 1, or the key is missing.
        """
        if x.ndim not in (2, 3) or x.shape[-1] != self.embed_dim:
            raise ValueError(f"x must be (B, L, {self.embed_dim}) or (L, {self.embed_dim}), got shape {x.shape}")
        if not 0 <= offset <= self.max_len - x.shape[-2]:
            raise ValueError(
                f"positions must be from 0 to {self.max_len - 1}, got {x.shape[-2]} of them from {offset} on"
            )
        x = x + sinusoidal(x.shape[-2], self.embed_dim, offset=offset, max_period=self.max_period).astype(x.dtype)
        if not (self.training and self.dropout):
            return x
        if key is None:
            raise ValueError("dropout in training needs a random key, got none")
        return apply_dropout(x, self.dropout, key)


class FeedForward(nn.Module):
    """linear1, activation, linear2: (..., E) -> (..., hidden_dim) -> (..., E). Activation: "gelu" (exact),
    "gelu_tanh" or "relu"."""

    def __init__(self, embed_dim: int, hidden_dim: int, activation: str = "gelu", bias: bool = True):
        super().__init__()
        if activation not in activations.ACTIVATIONS:
            known = ", ".join(activations.ACTIVATIONS)
            raise ValueError(f"activation must be one of {known}, got {activation!r}")
        self.activation, self.hidden_dim = activation, hidden_dim
        self.linear1 = nn.Linear(embed_dim, hidden_dim, bias=bias)
        self.linear2 = nn.Linear(hidden_dim, embed_dim, bias=bias)

    def __call__(self, x: mx.array, *, dropout: float = 0.0, key: mx.array | None = None) -> mx.array:
        """dropout: the rate, by a random key, at which numbers in the middle become 0."""
        if not x.size:
            return x
        activation = activations.ACTIVATIONS[self.activation]
        if key is not None and dropout:
            return self.linear2(apply_dropout(activation(self.linear1(x)), dropout, key))
        first, second = self["linear1"], self["linear2"]
        if x.size == x.shape[-1] and type(first) is type(second) is nn.Linear:  # neither is packed
            return apply_linear(second, activation(apply_linear(first, x)))
        tokens = x[None] if x.ndim == 1 else mx.flatten(x, 0, -2)
        network = lambda x: self.linear2(activation(self.linear1(x)))  # noqa: E731
        return dispatch.by_rows(network, tokens, self.hidden_dim).reshape(x.shape)


class GatedFeedForward(nn.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202): (..., E) -> (..., hidden_dim) -> (..., E).
    Activation: "silu" or "gelu_tanh"."""

    def __init__(self, embed_dim: int, hidden_dim: int, activation: str = "silu", bias: bool = False):
        super().__init__()
        if activation not in activations.GATED:
            raise ValueError(f"activation must be one of {', '.join(activations.GATED)}, got {activation!r}")
        self.activation = activation
        self.gate_proj = Linear(embed_dim, hidden_dim, bias=bias)
        self.up_proj = Linear(embed_dim, hidden_dim, bias=bias)
        self.down_proj = Linear(hidden_dim, embed_dim, bias=bias)

    def __call__(self, x: mx.array, *, dropout: float = 0.0, key: mx.array | None = None) -> mx.array:
        """dropout: the rate, by a random key, at which numbers in the middle become 0."""
        gate, up = self["gate_proj"](x), self["up_proj"](x)
        return self["down_proj"](apply_dropout(activations.GATED[self.activation](gate, up), dropout, key))


class Embedding(nn.Embedding):
    """nn.Embedding, whose table also makes logits: as_linear(x) is x weight^T."""

    def as_linear(self, x: mx.array) -> mx.array:
        """(..., E) -> (..., V)."""
        return apply_linear(self, x)

    def to_quantized(self, group_size: int | None = None, bits: int | None = None, *_: Any, **__: Any) -> nn.Module:
        """The layer with its table quantized."""
        return QuantizedEmbedding.from_embedding(self, group_size or 64, bits or 4)


class QuantizedEmbedding(nn.QuantizedEmbedding):
    """nn.QuantizedEmbedding in affine mode, likewise."""

    def as_linear(self, x: mx.array) -> mx.array:
        """(..., E) -> (..., V)."""
        packed: Any = (self.weight, self.scales, self.biases)
        return quantized_product(x, *packed, group_size=self.group_size, bits=self.bits)


class DilatedConv1d(nn.Module):
    """Dilated convolution along axis 1 of (B, T, ..., C) that keeps T: one product to K * O columns, then the K
    columns are shifted and added. weight (O, K, C), odd K."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, dilation: int):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.dilation = dilation
        self.weight = mx.random.uniform(-1, 1, (out_channels, kernel_size, in_channels)) * (
            (in_channels * kernel_size) ** -0.5
        )
        self.bias = mx.zeros((out_channels,))

    def __call__(self, x: mx.array) -> mx.array:
        """Returns (B, T, ..., C) as (B, T, ..., O)."""
        O, K, C = self.weight.shape
        T = x.shape[1]
        weight = self.weight.transpose(2, 1, 0).reshape(C, K * O)
        columns = dispatch.by_rows(lambda rows: rows @ weight, mx.flatten(x, 0, -2))
        columns = columns.reshape(*x.shape[:-1], K * O)  # tap-major
        reach = K // 2 * self.dilation
        columns = mx.pad(columns, [(0, 0), (reach, reach)] + [(0, 0)] * (x.ndim - 2))
        taps = mx.split(columns, K, axis=-1)
        out = self.bias
        for i, tap in enumerate(taps):
            out = out + tap[:, i * self.dilation : i * self.dilation + T]
        return out


class ConvTranspose1d(nn.Module):
    """Transposed convolution (B, L, C) -> (B, (L - 1) * stride + K, O), without padding: one product to K * O
    columns, whose stretches of `stride` samples overlap and are added. weight (O, K, C)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int):
        super().__init__()
        self.stride = stride
        self.weight = mx.random.uniform(-1, 1, (out_channels, kernel_size, in_channels)) * (
            (in_channels * kernel_size) ** -0.5
        )
        self.bias = mx.zeros((out_channels,))

    def __call__(self, x: mx.array) -> mx.array:
        """Returns (B, L, C) as (B, (L - 1) * stride + K, O)."""
        O, K, C = self.weight.shape
        phases = -(-K // self.stride)
        weight = mx.pad(self.weight, [(0, 0), (0, phases * self.stride - K), (0, 0)])
        weight = weight.transpose(2, 1, 0).reshape(C, -1)  # (C, phases * stride * O)
        bias = mx.tile(self.bias, self.stride)

        def transposed(x: mx.array) -> mx.array:
            B, L, _ = x.shape
            columns = x @ weight if B > 1 else dispatch.by_rows(lambda rows: rows @ weight, x[0])
            columns = columns.reshape(B, L, phases, self.stride * O)
            # Stretch p of frame l lands on output stretch l + p.
            out = fused.overlap_add(columns.swapaxes(1, 2)) + bias  # (B, L + phases - 1, stride * O)
            return out.reshape(B, -1, O)[:, : (L - 1) * self.stride + K]

        return dispatch.by_rows(transposed, x) if x.shape[0] > 1 else transposed(x)
