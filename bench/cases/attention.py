"""Attention: windows against a mask, causal against MLX's function, the module against MLX's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cases.parts import case, draw, mx, nn
from mlx_xformer import MultiHeadAttention, attention
from mlx_xformer.nn.masks import causal_mask, sliding_mask

PAIRS = {  # part: (the plain form, ours), functions below
    "window 512 of 4096 against MLX's function with the mask": ("mlx_window", "banded_window"),
    "window 512 of 4096 against ours with the mask": ("masked_window", "banded_window"),
    "causal 2048": ("mlx_causal", "our_causal"),
    "module, 4 x 256 x 512": ("mlx_module_short", "our_module_short"),
    "module, 1 x 1024 x 512": ("mlx_module_long", "our_module_long"),
}


def _window_mask() -> Any:
    return sliding_mask(4096, 4096, 512) & causal_mask(4096, 4096)


def mlx_window(_: Path) -> dict[str, Any]:
    function, mask = mx.fast.scaled_dot_product_attention, _window_mask()
    return case(lambda q: function(q, q, q, scale=0.125, mask=mask), draw(1, 8, 4096, 64))


def masked_window(_: Path) -> dict[str, Any]:
    mask = _window_mask()
    return case(lambda q: attention(q, q, q, mask=mask), draw(1, 8, 4096, 64))


def banded_window(_: Path) -> dict[str, Any]:
    return case(lambda q: attention(q, q, q, causal=True, window=512), draw(1, 8, 4096, 64))


def mlx_causal(_: Path) -> dict[str, Any]:
    function = mx.fast.scaled_dot_product_attention
    return case(lambda q: function(q, q, q, scale=0.125, mask="causal"), draw(1, 8, 2048, 64))


def our_causal(_: Path) -> dict[str, Any]:
    return case(lambda q: attention(q, q, q, causal=True), draw(1, 8, 2048, 64))


def _mlx_module(*shape: int) -> dict[str, Any]:
    module = nn.MultiHeadAttention(512, 8, bias=True)
    mx.eval(module.parameters())
    return case(lambda x: module(x, x, x), draw(*shape))


def mlx_module_short(_: Path) -> dict[str, Any]:
    return _mlx_module(4, 256, 512)


def mlx_module_long(_: Path) -> dict[str, Any]:
    return _mlx_module(1, 1024, 512)


def _our_module(*shape: int) -> dict[str, Any]:
    module = MultiHeadAttention(512, 8)
    mx.eval(module.parameters())
    return case(module, draw(*shape))


def our_module_short(_: Path) -> dict[str, Any]:
    return _our_module(4, 256, 512)


def our_module_long(_: Path) -> dict[str, Any]:
    return _our_module(1, 1024, 512)
