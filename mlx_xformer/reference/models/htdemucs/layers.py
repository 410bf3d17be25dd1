"""The encoder and decoder layers of HTDemucs and their residual branch.

Axes: B batch, T frames or samples, F frequencies, C channels. Spectrogram tensors are (B, T, F, C), waveform
tensors (B, T, C). Source: demucs/hdemucs.py (HEncLayer, HDecLayer), demucs/demucs.py (DConv).
"""

import numpy as np

from ...backend import gelu, glu
from ...nn.layers import Params, conv1d, conv2d, conv_transpose1d, group_norm, layer_scale, linear, sub


def dconv(params: Params, x: np.ndarray, *, depth: int) -> np.ndarray:
    """`abs(depth)` residual layers over T, dilated by 1, 2, 4, ... unless `depth` is negative.

    x (B, T, C) or (B, T, F, C), where every frequency is a sequence of its own, also for the normalisation.
    """
    if x.ndim == 4:
        B, T, F, C = x.shape
        rows = x.transpose(0, 2, 1, 3).reshape(B * F, T, C)
        return dconv(params, rows, depth=depth).reshape(B, F, T, C).transpose(0, 2, 1, 3)
    for d in range(abs(depth)):
        layer = sub(params, f"layers.{d}")
        dilation = 2**d if depth > 0 else 1
        y = conv1d(sub(layer, "conv"), x, padding=dilation, dilation=dilation)  # (B, T, hidden)
        y = gelu(group_norm(sub(layer, "norm1"), y, num_groups=1))
        y = linear(sub(layer, "expand"), y)  # (B, T, 2 C)
        y = glu(group_norm(sub(layer, "norm2"), y, num_groups=1))
        x = x + layer_scale(sub(layer, "layer_scale"), y)
    return x


def _norm(params: Params, name: str, x: np.ndarray, num_groups: int | None) -> np.ndarray:
    return x if num_groups is None else group_norm(sub(params, name), x, num_groups=num_groups)


def _rewrite(params: Params, x: np.ndarray, context: int) -> np.ndarray:
    """The convolution before the GLU, over `context` neighbours on each side: (..., C) -> (..., 2 C)."""
    params = sub(params, "rewrite")
    if context == 0:
        return linear(params, x)
    return conv2d(params, x, padding=context) if x.ndim == 4 else conv1d(params, x, padding=context)


def encoder_layer(
    params: Params,
    x: np.ndarray,
    inject: np.ndarray | None = None,
    *,
    stride: int,
    padding: int,
    norm_groups: int | None = None,
    rewrite: bool = True,
    context: int = 0,
    dconv_depth: int | None = None,
    empty: bool = False,
) -> np.ndarray:
    """Strided convolution over F (or over T for a waveform), GELU, DConv, rewrite and GLU.

    x (B, T, F, C) -> (B, T, F', C') or (B, T, C) -> (B, T', C'). `inject` (B, T, C') is added after the
    convolution. `norm_groups` None: no normalisation. `dconv_depth` None: no DConv. `empty`: conv only.
    """
    conv = sub(params, "conv")
    if x.ndim == 4:
        B, T, F, C = x.shape
        y = conv1d(conv, x.reshape(B * T, F, C), stride=stride, padding=padding)
        y = y.reshape(B, T, *y.shape[1:])  # (B, T, F', C')
    else:
        x = np.pad(x, ((0, 0), (0, -x.shape[1] % stride), (0, 0)))  # T to a multiple of stride
        y = conv1d(conv, x, stride=stride, padding=padding)
    if empty:
        return y
    if inject is not None:
        y = y + (inject[:, :, None, :] if y.ndim == 4 else inject)
    y = gelu(_norm(params, "norm1", y, norm_groups))
    if dconv_depth is not None:
        y = dconv(sub(params, "dconv"), y, depth=dconv_depth)
    if rewrite:
        y = glu(_norm(params, "norm2", _rewrite(params, y, context), norm_groups))
    return y


def decoder_layer(
    params: Params,
    x: np.ndarray,
    skip: np.ndarray | None,
    length: int,
    *,
    stride: int,
    padding: int,
    norm_groups: int | None = None,
    rewrite: bool = True,
    context: int = 1,
    dconv_depth: int | None = None,
    empty: bool = False,
    last: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Add the skip, rewrite and GLU, DConv, transposed convolution cut to size, GELU unless `last`.

    Returns the output and what went into the transposed convolution. `length` is T of a waveform output; over
    frequencies `padding` is cut from both ends. `empty`: from the transposed convolution on.
    """
    y = x
    if not empty:
        y = x + skip
        if rewrite:
            y = glu(_norm(params, "norm1", _rewrite(params, y, context), norm_groups))
        if dconv_depth is not None:
            y = dconv(sub(params, "dconv"), y, depth=dconv_depth)

    conv_tr = sub(params, "conv_tr")
    if y.ndim == 4:
        B, T, F, C = y.shape
        z = conv_transpose1d(conv_tr, y.reshape(B * T, F, C), stride=stride)
        z = z.reshape(B, T, *z.shape[1:])  # (B, T, F', C')
    else:
        z = conv_transpose1d(conv_tr, y, stride=stride)
    z = _norm(params, "norm2", z, norm_groups)  # the statistics include what is cut next
    z = z[:, :, padding : z.shape[2] - padding] if z.ndim == 4 else z[:, padding : padding + length]
    return (z if last else gelu(z)), y
