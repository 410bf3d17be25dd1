"""Samples of caches: programs of appends and rewinds, attention to quantized keys and values, layers that go on.

Axes: B batch, H query heads, G key/value heads, L queries, S keys, D head_dim, Dv value_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ...nn.attention.core import attention
from ...nn.attention.layer import Attention
from ...nn.cache import CrossCache, KVCache, Quantized
from ...nn.rotary import Rotary
from ...reference.nn import attention as twin
from ...reference.nn import cache as twin_cache
from ...reference.nn import linear
from ..samples import Case, Options, Rng, Sample, described, drawn, with_params

D, DV = 11, 13
HEADS = {"MHA": (4, 4), "GQA": (6, 2), "MQA": (3, 1)}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "sliding": {"window": 5, "slack": 3},
    "sliding with sinks": {"window": 5, "keep": 2, "slack": 3},
}
PROGRAMS = (  # positions to append, and to rewind by
    (7, 1, 1, 1, 4),
    (3, -2, 1, 9, -3, 2, 1),
    (1, 1, 300, 1, 5, -3, 1),
    (280, 1, 1, -1, 1),
)


# A cache and the attention of what is appended


def _programs(rng: Rng) -> Iterator[Sample]:
    for kind, options in KINDS.items():
        for heads in HEADS:
            for padding in (None, (0, 4, 1)):
                program = PROGRAMS[rng.integers(2)]
                yield _program(rng, heads, {**options, "padding": padding}, program, kind)
    for program in PROGRAMS:
        yield _program(rng, "GQA", {**KINDS["sliding with sinks"], "padding": (2, 0)}, program, "sliding with sinks")
        yield _program(rng, "GQA", {}, program, "full")
    for _ in range(6):
        drawn = {"window": int(rng.integers(1, 9)), "keep": int(rng.integers(4)), "slack": 0}
        yield _program(rng, "GQA", drawn, [int(n) for n in rng.integers(1, 13, 8)], "random")


def _program(rng: Rng, heads: str, kind: Options, program: Sequence[int], what: str) -> Sample:
    (H, G), N = HEADS[heads], sum(n for n in program if n > 0)
    B = len(kind.get("padding") or (0,))
    arrays = {
        "q": rng.normal(size=(B, H, N, D)),
        "k": rng.normal(size=(B, G, N, D)),
        "v": rng.normal(size=(B, G, N, DV)),
    }
    facts = described(heads=heads, **kind, program=program)
    return Sample(f"{what}: {facts}", arrays, {"kind": dict(kind), "program": tuple(program)}, joint=True)


def _run(params: dict, arrays: dict, options: Options) -> list[mx.array]:
    cache, outputs, at = KVCache(**options["kind"]), [], 0
    for n in options["program"]:
        if n < 0:
            cache.trim(-n)
            continue
        q, k, v = (arrays[name][:, :, at : at + n] for name in "qkv")
        view = cache.append(k, v)
        outputs.append(attention(q, view.keys, view.values, **view.options))
        at += n
    return outputs


def _twin_run(params: dict, arrays: dict, options: Options) -> list[np.ndarray]:
    kind, B = dict(options["kind"]), len(arrays["k"])
    padding = kind.pop("padding", None) or (0,) * B
    empty = [arrays[name][:, :, :0] for name in "kv"]
    cache, outputs, at = twin_cache.KVCache(empty[0], empty[1], tuple(padding), **kind), [], 0
    for n in options["program"]:
        if n < 0:
            cache = cache.trim(-n)
            continue
        q, k, v = (arrays[name][:, :, at : at + n] for name in "qkv")
        cache = cache.append(k, v)
        outputs.append(twin.attention(q, cache.keys, cache.values, mask=cache.mask(n)))
        at += n
    return outputs


# Attention to codes, which both sides read in their own way


def _quantized_samples(rng: Rng) -> Iterator[Sample]:
    for bits in (8, 4):
        for heads in HEADS:
            for L, S in ((1, 41), (3, 41), (37, 53), (211, 211)):
                names = [
                    name for name in ("causal", "window", "mask", "bias", "sinks", "softcap") if rng.random() < 0.5
                ]
                yield _quantized_sample(rng, heads, bits, L, S, names)


def _quantized_sample(rng: Rng, heads: str, bits: int, L: int, S: int, names: Sequence[str]) -> Sample:
    (H, G), B = HEADS[heads], 2
    options: dict[str, Any] = {"bits": bits}
    for name, width in (("k", D), ("v", DV)):
        codes = rng.integers(0, 2**bits, (B, G, S, 32)).astype(np.int64)
        scales = (rng.uniform(1, 2, (B, G, S, 1)) * 2 / 2**bits).astype(np.float32)
        biases = (-scales * 2 ** (bits - 1)).astype(np.float32)
        if name == "k":  # the zeros behind a head
            codes[..., width:] = 2 ** (bits - 1)
        options |= {f"{name}_words": linear.pack(codes, bits), f"{name}_scales": scales, f"{name}_biases": biases}
    arrays = {"q": rng.normal(size=(B, H, L, D))}
    if "mask" in names:
        options["mask"] = rng.random((B, 1, L, S)) > 0.3
        options["mask"][-1, :, L // 2] = False
    if "bias" in names:
        arrays["bias"] = rng.normal(size=(H, L, S))
    if "sinks" in names:
        arrays["sinks"] = rng.normal(size=H)
    known = {"causal": True, "window": 17, "softcap": 1.7}
    options |= {name: value for name, value in known.items() if name in names}
    return Sample(
        described(heads=heads, bits=bits, L=L, S=S, **dict.fromkeys(names, True)), arrays, options, joint=True
    )


def _rest(arrays: dict, options: Options) -> dict[str, Any]:
    rest = {name: value for name, value in options.items() if name[:2] not in ("k_", "v_") and name != "bits"}
    return {**rest, **{name: x for name, x in arrays.items() if name != "q"}}


def _quantized(params: dict, arrays: dict, options: Options) -> mx.array:
    k, v = (
        Quantized(
            options[f"{name}_words"], options[f"{name}_scales"], options[f"{name}_biases"], 32, options["bits"], width
        )
        for name, width in (("k", D), ("v", DV))
    )
    return attention(arrays["q"], k, v, **_rest(arrays, options))


def _twin_quantized(params: dict, arrays: dict, options: Options) -> np.ndarray:
    pair = []
    for name, width in (("k", D), ("v", DV)):
        codes = linear.unpack(options[f"{name}_words"], options["bits"])
        scales, biases = (options[f"{name}_{part}"].astype(arrays["q"].dtype) for part in ("scales", "biases"))
        pair.append(linear.dequantize(codes, scales, biases)[..., :width])
    return twin.attention(arrays["q"], *pair, **_rest(arrays, options))


# Layers, token by token and chunk by chunk, which are given what was before in a cache


LAYERS: dict[str, dict[str, Any]] = {
    "rotary": {"rotary": {"dims": 4, "theta": 100.0}, "head_dim": 6},
    "window": {"window": 4, "num_kv_heads": 2, "qk_norm": "rms"},
    "alibi": {"alibi": True, "num_kv_heads": 1},
    "relative, sinks": {"relative": (8, 20), "sinks": True, "softcap": 2.0},
    "cross": {"kv_dim": 10, "num_kv_heads": 3},
}
E, LENGTH = 18, 13


def _made(options: Options) -> Attention:
    rotary = options.get("rotary")
    given = {name: value for name, value in options.items() if name != "chunks"}
    return Attention(**{"embed_dim": E, "num_heads": 6, **given, "rotary": rotary and Rotary(**rotary)})


def _layer_samples(rng: Rng) -> Iterator[Sample]:
    for what, options in LAYERS.items():
        for chunks in ((1,) * LENGTH, (6, 1, 1, 5)):
            arrays = {"x": rng.normal(size=(2, LENGTH, E))}
            if what == "cross":
                arrays["source"] = rng.normal(size=(2, 7, 10))
            given = {**options, "causal": what != "cross", "chunks": chunks}
            yield Sample(
                f"{what}: chunks={chunks}".replace(" ", ""), arrays, given, drawn(_made(given), rng), joint=True
            )


def _layer(params: dict, arrays: dict, options: Options) -> mx.array:
    layer, x = with_params(_made(options), params), arrays["x"]
    cache = CrossCache() if "source" in arrays else KVCache()
    parts, at = [], 0
    for n in options["chunks"]:
        parts.append(layer(x[:, at : at + n], arrays.get("source"), cache=cache))
        at += n
    return mx.concatenate(parts, axis=1)


def _twin_layer(params: dict, arrays: dict, options: Options) -> np.ndarray:
    read_off = ("kv_dim", "head_dim", "sinks", "chunks")
    kept = {name: value for name, value in options.items() if name not in read_off}
    positions = np.broadcast_to(np.arange(LENGTH), arrays["x"].shape[:2])
    return twin.attention_layer(params, **arrays, num_heads=6, positions=positions, **kept)


CASES = {
    "KVCache": Case(_programs, _run, _twin_run, half=4.0, half_vjp=8.0),
    "quantized_attention": Case(_quantized_samples, _quantized, _twin_quantized, half=4.0, half_vjp=8.0),
    "cached_attention": Case(_layer_samples, _layer, _twin_layer, half=4.0, half_vjp=8.0),
}
