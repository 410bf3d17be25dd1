"""Samples of layers and stacks, at once and through caches.

Axes: B batch, L positions, S positions of a memory, E embed_dim, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from ...nn.cache import CrossCache
from ...nn.moe import MoEConfig
from ...nn.transformer import Layer, LayerConfig, Stack
from ...reference.nn import transformer as twin
from ..samples import Arrays, Case, Options, Rng, Sample, described, drawn, with_params

E, HEADS, HIDDEN, MEMORY = 18, 6, 13, 10
_ALL = {"num_experts": 3, "num_experts_per_tok": 3}  # rounding cannot change who is chosen
_MIXTURE: dict[str, Any] = {"activation": "gelu", "gated": False, "bias": True, "router_bias": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "post-norm": {},
    "pre-norm": {"norm_first": True},
    "gelu": {"activation": "gelu"},
    "gelu, tanh": {"activation": "gelu_tanh", "norm_first": True},
    "silu": {"activation": "silu"},
    "gated": {"activation": "silu", "gated": True, "norm_first": True},
    "gated, tanh": {"activation": "gelu_tanh", "gated": True, "ffn_bias": False},
    "rms": {"norm": "rms", "norm_eps": 1e-2},
    "rms, pre-norm": {"norm": "rms", "norm_first": True},
    "no biases": {"bias": False, "ffn_bias": False, "activation": "gelu"},
    "some biases": {"bias": ("q", "v"), "activation": "gelu"},
    "grouped": {"num_kv_heads": 2, "activation": "gelu"},
    "multi-query, pre-norm": {"num_kv_heads": 1, "norm_first": True, "activation": "gelu"},
    "narrow heads, scaled": {"head_dim": 5, "scale": 0.7, "activation": "gelu"},
    "causal": {"causal": True},
    "window": {"window": 2, "activation": "gelu"},
    "causal window, pre-norm": {"causal": True, "window": 3, "norm_first": True, "activation": "gelu"},
    "cross": {"cross": True},
    "cross, pre-norm": {"cross": True, "norm_first": True, "causal": True, "activation": "gelu"},
    "cross, narrow memory": {"cross": True, "memory_dim": MEMORY, "num_kv_heads": 2, "activation": "gelu"},
    "mixture": {"moe": _MIXTURE | _ALL},
    "mixture, pre-norm": {"moe": _MIXTURE | _ALL | {"capacity": 5, "overflow": "expert"}, "norm_first": True},
    "mixture, cross": {"moe": _MIXTURE | _ALL | {"shared_dim": 7}, "cross": True, "causal": True},
    "everything": {
        "num_kv_heads": 3,
        "head_dim": 4,
        "activation": "silu",
        "gated": True,
        "norm": "rms",
        "norm_first": True,
        "norm_eps": 1e-3,
        "bias": ("k", "out"),
        "scale": 0.6,
        "causal": True,
        "window": 4,
        "cross": True,
        "memory_dim": MEMORY,
        "dropout": 0.3,  # which a call without a key, in evaluation, leaves out
    },
}
_CHUNKS = (3, 1, 1, 2)


def config_of(options: Options) -> LayerConfig:
    """The configuration of a sample."""
    given = {name: value for name, value in options.items() if name in LayerConfig.__dataclass_fields__}
    if "moe" in given:
        given["moe"] = MoEConfig(**{"embed_dim": E, "hidden_dim": HIDDEN, **given["moe"]})
    return LayerConfig(**{"embed_dim": E, "num_heads": HEADS, "hidden_dim": HIDDEN, **given})


def _made(options: Options) -> Any:
    config = config_of(options)
    if "num_layers" in options:
        made: Any = Stack(config, options["num_layers"], final_norm=options.get("final_norm", False))
    else:
        made = Layer(config)
    return made.eval()


def _sample(rng: Rng, what: str, options: Options, L: int = 7, *, masked: bool = True, batch: int = 2) -> Sample:
    """Masks leave every position itself, or a memory something, but for one row that sees nothing of its memory."""
    config = config_of(options)
    S, called = 5, {}
    arrays = {"x": rng.normal(size=(batch, L, E))}
    if config.cross:
        arrays["memory"] = rng.normal(size=(batch, S, config.memory_dim or E))
    if masked and L:
        called["mask"] = (rng.random((batch, 1, L, L)) > 0.3) | np.eye(L, dtype=bool)
        arrays["bias"] = rng.normal(size=(HEADS, L, L))
    if masked and config.cross:
        called["memory_mask"] = rng.random((batch, 1, 1, S)) > 0.3
        called["memory_mask"][..., 0], called["memory_mask"][-1] = True, False
    facts = described(x=arrays["x"].shape, **{name: options.get(name) for name in ("num_layers", "final_norm")})
    params = drawn(_made(options), rng)
    for name, value in params.items():
        if value.ndim == 3:  # the matrices of experts
            params[name] = rng.normal(size=value.shape) * value.shape[-1] ** -0.5
        elif config.activation == "relu" and name.endswith("linear1.bias"):  # far from where ReLU has no derivative
            params[name] = rng.uniform(22, 23, value.shape) * rng.choice([-1, 1], value.shape)
    return Sample(f"{what}: {facts}", arrays, {**options, **called}, params, joint=True)


def _layers(rng: Rng) -> Iterator[Sample]:
    for what, options in CONFIGS.items():
        yield _sample(rng, what, options)
    for what in ("pre-norm", "causal", "cross", "everything"):
        yield _sample(rng, f"{what}, unmasked", CONFIGS[what], masked=False)
    yield _sample(rng, "one position", CONFIGS["cross, pre-norm"], 1, masked=False, batch=3)
    yield _sample(rng, "no positions", CONFIGS["gelu"], 0, masked=False)
    yield replace(_sample(rng, "views with gaps", CONFIGS["gelu"]), strided=True)
    chosen = {"moe": _MIXTURE | {"num_experts": 5, "num_experts_per_tok": 2}}
    yield replace(_sample(rng, "mixture, chosen", chosen), skip_half="rounding changes which experts are chosen")


def _stacks(rng: Rng) -> Iterator[Sample]:
    for what, options in CONFIGS.items():
        yield _sample(rng, what, {**options, "num_layers": 2, "final_norm": bool(options.get("norm_first"))})
    yield _sample(rng, "a norm after norms", {**CONFIGS["post-norm"], "num_layers": 1, "final_norm": True})
    yield _sample(rng, "three layers", {**CONFIGS["cross, pre-norm"], "num_layers": 3}, masked=False)


def _cached(rng: Rng) -> Iterator[Sample]:
    for what, options in CONFIGS.items():
        if not options.get("causal"):
            continue
        for G in (1, 2, 6):
            for final in (False, True):
                given = {**options, "num_kv_heads": G, "num_layers": 2, "final_norm": final}
                yield _sample(rng, f"{what}, {G} kv heads", given, sum(_CHUNKS), masked=False)


def _given(options: Options) -> dict[str, Any]:
    return {name: options[name] for name in ("mask", "memory_mask") if name in options}


def _ours(params: dict, arrays: dict, options: Options) -> mx.array:
    return with_params(_made(options), params)(**arrays, **_given(options))


def _theirs(params: Arrays, arrays: Arrays, options: Options) -> np.ndarray:
    form = twin.stack if "num_layers" in options else twin.layer
    if not arrays["x"].size:  # the twin's heads need a position
        return np.zeros_like(arrays["x"])
    return form(params, config_of(options), **arrays, **_given(options))


def _in_chunks(params: dict, arrays: dict, options: Options) -> mx.array:
    made = with_params(_made(options), params)
    caches, x, parts, at = made.make_caches(), arrays["x"], [], 0
    cross = [CrossCache() for _ in caches] if "memory" in arrays else None
    for n in _CHUNKS:
        parts.append(made(x[:, at : at + n], arrays.get("memory"), caches=caches, cross_caches=cross))
        at += n
    return mx.concatenate(parts, axis=1)


CASES = {
    "Layer": Case(_layers, _ours, _theirs, half=4.0, half_vjp=8.0),
    "Stack": Case(_stacks, _ours, _theirs, half=6.0, half_vjp=12.0),
    "Stack.cached": Case(_cached, _in_chunks, _theirs, half=6.0, vjp=False),
}
