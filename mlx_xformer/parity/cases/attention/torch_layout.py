"""Samples of PyTorch's nn.MultiheadAttention. Axes: N batch, L queries, S keys, E embed_dim."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np

from ....nn.attention.torch_layout import MultiheadAttention
from ....reference.nn.torch_layout import multihead_attention
from ...samples import Case, Options, Rng, Sample, described, drawn, layer

_MASKS = ("key_padding_mask", "attn_mask")


def _sample(rng: Rng, N: int, L: int, S: int, masks: tuple[str, ...], **options: Any) -> Sample:
    options = {"embed_dim": 12, "num_heads": 4, "batch_first": True, **options}
    widths = (12, options.get("kdim", 12), options.get("vdim", 12))
    arrays = {
        name: rng.normal(size=(N, length, width))
        for name, length, width in zip(("query", "key", "value"), (L, S, S), widths, strict=True)
    }
    params = drawn(MultiheadAttention(**options), rng)
    called: dict[str, Any] = {}
    if "key_padding_mask" in masks:
        called["key_padding_mask"] = np.arange(S) >= rng.integers(0, S + 1, N)[:, None]
        called["key_padding_mask"][-1] = True  # an item of padding alone
    if "attn_mask" in masks:
        called["attn_mask"] = rng.random((L, S)) > 0.6
    shown = {name: value for name, value in options.items() if name not in ("embed_dim", "num_heads", "batch_first")}
    facts = described(N=N, L=L, S=S, **shown, **dict.fromkeys(masks, True))
    return Sample(facts, arrays, {**options, **called}, params, joint=L > 50)


def _samples(rng: Rng) -> Iterator[Sample]:
    options: list[dict[str, Any]] = [
        {},
        {"bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"kdim": 9, "vdim": 10},
        {"kdim": 9, "vdim": 10, "add_bias_kv": True, "add_zero_attn": True},
    ]
    for given, masks in product(options, ((), _MASKS[:1], _MASKS[1:], _MASKS)):
        yield _sample(rng, 3, 5, 7, masks, **given)
    yield _sample(rng, 1, 1, 1, ())
    yield _sample(rng, 1, 101, 103, _MASKS)


def _twin(params: dict, arrays: dict, options: Options) -> Any:
    kept = {name: options[name] for name in ("num_heads", "add_zero_attn", *_MASKS) if name in options}
    return multihead_attention(params, **arrays, **kept)


CASES = {"MultiheadAttention": Case(_samples, layer(MultiheadAttention, *_MASKS), _twin, half=4.0, half_vjp=8.0)}
