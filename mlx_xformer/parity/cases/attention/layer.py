"""Samples of Attention.

Axes: B batch, L queries, S keys, E embed_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from ....nn.attention import Attention
from ....nn.attention.kinds import initialize
from ....nn.rotary import Rotary
from ....reference.nn import attention as twin
from ....reference.nn.layers import linear, sub
from ...samples import Arrays, Case, Options, Rng, Sample, described, drawn, flat, with_params

E, HEADS = 18, 6
CONFIGS: dict[str, dict[str, Any]] = {
    "multi-head": {},
    "multi-query": {"num_kv_heads": 1},
    "no biases": {"bias": False},
    "some biases": {"bias": ("q", "v"), "num_kv_heads": 2},
    "widths": {"head_dim": 5, "value_dim": 7, "out_dim": 11, "num_kv_heads": 3},
    "rms": {"qk_norm": "rms", "num_kv_heads": 2},
    "rms, whole": {"qk_norm": "rms_whole", "num_kv_heads": 2, "norm_eps": 1e-2},
    "layer norm": {"qk_norm": "layer", "head_dim": 5, "norm_eps": 1e-3},
    "rotary": {"rotary": {"dims": 4, "theta": 100.0}, "head_dim": 6, "causal": True},
    "interleaved": {"rotary": {"dims": 6, "theta": 1e4, "interleaved": True}, "head_dim": 6, "num_kv_heads": 2},
    "alibi": {"alibi": True, "causal": True},
    "alibi, window": {"alibi": True, "window": 3},
    "relative": {"relative": (8, 20)},
    "relative, causal": {"relative": (8, 20), "causal": True},
    "sinks": {"sinks": True, "causal": True},
    "capped": {"softcap": 1.3, "scale": 0.7, "window": 2, "causal": True},
    "everything": {
        "num_kv_heads": 3,
        "head_dim": 4,
        "value_dim": 5,
        "out_dim": 7,
        "bias": ("k", "out"),
        "qk_norm": "rms",
        "rotary": {"dims": 2, "theta": 77.0},
        "alibi": True,
        "relative": (8, 20),
        "causal": True,
        "window": 4,
        "sinks": True,
        "softcap": 2.0,
    },
}
_CALLED = ("mask", "offset", "positions")  # options of the call, not of the module


def _made(options: Options) -> Attention:
    """The module. head_dim, value_dim and biases are what the twin reads off the parameters."""
    rotary = options.get("rotary")
    given = {name: value for name, value in options.items() if name not in _CALLED}
    return Attention(**{"embed_dim": E, "num_heads": HEADS, **given, "rotary": rotary and Rotary(**rotary)})


def _sample(rng: Rng, what: str, options: Options, *shapes: tuple[int, ...], masked: bool = True) -> Sample:
    arrays = dict(zip(("x", "source", "value_source"), (rng.normal(size=shape) for shape in shapes), strict=False))
    B, L, S = *shapes[0][:2], shapes[-1][1]
    called: dict[str, Any] = {}
    if "rotary" in options:
        turn = rng.integers(3)
        places: list[dict[str, Any]] = [{}, {"offset": 5}, {"positions": rng.integers(0, 50, (B, L))}]
        called |= places[turn]
    elif masked:
        called["mask"] = rng.random((B, 1, L, S)) > 0.2
        called["mask"][-1, :, -1:] = False
        if rng.random() < 0.5:
            arrays["bias"] = rng.normal(size=(HEADS, L, S))
    facts = described(
        x=shapes[0], source=shapes[1] if shapes[1:] else None, **dict.fromkeys(called, True), bias="bias" in arrays
    )
    params = drawn(_made(options), rng)
    return Sample(f"{what}: {facts}", arrays, {**options, **called}, params, joint=L > 50)


def _random_config(rng: Rng) -> dict[str, Any]:
    """Any two or three of the options above."""
    names = rng.choice(list(CONFIGS)[:-1], int(rng.integers(2, 4)), replace=False)
    config: dict[str, Any] = {}
    for name in names:
        config |= CONFIGS[name]
    if "rotary" in config:
        config["head_dim"] = 6
    return config


def _samples(rng: Rng) -> Iterator[Sample]:
    for what, options in CONFIGS.items():
        yield _sample(rng, what, options, (2, 7, E), masked=what != "multi-head")
    for G in (1, 2, 6):
        across = {"kv_dim": 10, "num_kv_heads": G}
        yield _sample(rng, "cross", across, (2, 5, E), (2, 7, 10))
        yield _sample(rng, "three", {**across, "v_dim": 11, "value_dim": 4}, (2, 5, E), (2, 7, 10), (2, 7, 11))
    yield _sample(rng, "one token", {"num_kv_heads": 2}, (3, 1, E), masked=False)
    for what, *shapes in (("no tokens", (2, 0, E)), ("an empty source", (2, 3, E), (2, 0, E))):
        yield _sample(rng, what, {}, *shapes, masked=False)
    yield replace(_sample(rng, "views with gaps", {"causal": True}, (2, 7, E)), strided=True)
    for _ in range(14):
        yield _sample(rng, "random", _random_config(rng), (int(rng.integers(1, 4)), int(rng.choice([3, 8, 13])), E))
    large = {"embed_dim": 24, "head_dim": 5, "num_kv_heads": 2}
    yield _sample(rng, "large", large, (1, 197, 24))
    yield _sample(rng, "large, window", {**large, "window": 29, "causal": True, "alibi": True}, (1, 197, 24))


def _one_row(rng: Rng) -> Iterator[Sample]:
    for what, options in CONFIGS.items():
        yield _sample(rng, what, options, (1, 1, E), masked=False)


def _attention(params: dict, arrays: dict, options: Options) -> Any:
    return with_params(_made(options), params)(**arrays, **{name: options[name] for name in _CALLED if name in options})


def _twin(params: dict, arrays: dict, options: Options) -> np.ndarray:
    read_off = ("embed_dim", "head_dim", "value_dim", "out_dim", "kv_dim", "v_dim", "bias", "sinks", "offset")
    kept = {name: value for name, value in options.items() if name not in read_off}
    x = arrays["x"]
    if not x.size or not arrays.get("source", x).size:  # the twin's heads need a position
        nothing = np.zeros((*x.shape[:2], params["out_proj.weight"].shape[1]), x.dtype)
        return linear(sub(params, "out_proj"), nothing)
    kept.setdefault("positions", np.broadcast_to(np.arange(x.shape[1]) + options.get("offset", 0), x.shape[:2]))
    return twin.attention_layer(params, **arrays, num_heads=HEADS, **kept)


# New weights, from the numbers that MLX draws


def _schemes(rng: Rng) -> Iterator[Sample]:
    for scheme in ("torch", "xavier"):
        for options in ({}, {"bias": False}, {"num_kv_heads": 2, "head_dim": 5}, {"kv_dim": 10, "num_kv_heads": 1}):
            params = drawn(_made(options), rng)
            key = rng.integers(0, 2**32, 2, dtype=np.uint32)
            noise = {
                name: np.array(mx.random.uniform(shape=params[f"{name}_proj.weight"].shape, key=part))
                for name, part in zip(("q", "k", "v", "out"), mx.random.split(mx.array(key), 4), strict=True)
            }
            given = {"scheme": scheme, "layer": options, "params": params, "key": key, "noise": noise}
            yield Sample(described(scheme=scheme, **options), {}, given)


def _initialized(params: dict, _: dict, options: Options) -> list[mx.array]:
    layer = _made(options["layer"])
    with_params(layer, {name: mx.array(x) for name, x in options["params"].items()})
    initialize(layer, options["scheme"], key=options["key"])
    made = flat(layer)
    return [made[name] for name in sorted(made)]


def _twin_initialized(_: Arrays, __: Arrays, options: Options) -> list[np.ndarray]:
    made = twin.initialize(options["params"], options["scheme"], options["noise"])
    return [made[name] for name in sorted(made)]


CASES = {
    "Attention": Case(_samples, _attention, _twin, half=4.0, half_vjp=8.0),
    "initialize": Case(_schemes, _initialized, _twin_initialized, constant=True),
    "Attention.step": Case(_one_row, _attention, _twin, half=4.0),
}
