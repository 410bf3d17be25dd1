"""Samples of mixtures of experts, and of where their tokens go.

Axes: T tokens, D embed_dim, E experts, k experts a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from ...nn.moe import MoE, MoEConfig
from ...reference.nn import moe as twin
from ..samples import Arrays, Case, Options, Rng, Sample, described, drawn, signal, with_params

D, H = 7, 11
CONFIGS: dict[str, dict[str, Any]] = {
    "one of five": {},
    "two of five": {"num_experts_per_tok": 2},
    "all of three": {"num_experts": 3, "num_experts_per_tok": 3},
    "a single expert": {"num_experts": 1},
    "renormalised": {"num_experts_per_tok": 1, "renormalize": True},
    "not renormalised": {"num_experts_per_tok": 3, "renormalize": False, "scale": 1.7},
    "router bias": {"num_experts_per_tok": 2, "router_bias": True},
    "gated, tanh": {"num_experts_per_tok": 2, "activation": "gelu_tanh", "bias": True},
    "relu": {"num_experts_per_tok": 2, "activation": "relu", "gated": False, "bias": True},
    "gelu": {"num_experts_per_tok": 2, "activation": "gelu", "gated": False},
    "plain, tanh": {"activation": "gelu_tanh", "gated": False, "bias": True},
    "selection bias": {"num_experts_per_tok": 2, "selection_bias": True},
    "sigmoid": {"num_experts_per_tok": 2, "router": "sigmoid", "renormalize": False},
    "sigmoid, biased": {"num_experts_per_tok": 3, "router": "sigmoid", "selection_bias": True, "scale": 2.3},
    "groups": {"num_experts": 15, "num_experts_per_tok": 4, "groups": 5, "groups_per_tok": 2, "renormalize": False},
    "groups of sigmoids": {
        "num_experts": 15,
        "num_experts_per_tok": 3,
        "groups": 5,
        "groups_per_tok": 2,
        "router": "sigmoid",
        "selection_bias": True,
    },
    "groups of one": {"num_experts": 5, "groups": 5, "groups_per_tok": 3, "router": "sigmoid"},
    "shared": {"num_experts_per_tok": 2, "shared_dim": 13},
    "shared, gated": {"num_experts_per_tok": 2, "shared_dim": 13, "shared_gate": True, "bias": True},
    "capacity": {"num_experts_per_tok": 2, "capacity": 3},
    "capacity factor": {"num_experts_per_tok": 2, "capacity": 0.6, "bias": True},
    "capacity to spare": {"num_experts_per_tok": 2, "capacity": 4.9, "overflow": "expert"},
    "overflow": {"capacity": 2, "overflow": "expert"},
    "overflow of several": {"num_experts_per_tok": 3, "capacity": 1.0, "overflow": "expert", "bias": True},
    "no capacity": {"num_experts_per_tok": 2, "capacity": 0, "overflow": "expert"},
    "llm_prep": {
        "num_experts_per_tok": 2,
        "capacity": 3,
        "overflow": "expert",
        "activation": "relu",
        "gated": False,
        "bias": True,
        "router_bias": True,
        "balance": "document",
    },
    "both losses": {"num_experts_per_tok": 2, "alpha": 0.7, "z_alpha": 0.3},
    "everything": {
        "num_experts": 15,
        "num_experts_per_tok": 4,
        "activation": "gelu",
        "gated": False,
        "bias": True,
        "router": "sigmoid",
        "router_bias": True,
        "selection_bias": True,
        "groups": 5,
        "groups_per_tok": 3,
        "scale": 1.3,
        "shared_dim": 13,
        "shared_gate": True,
        "capacity": 1.1,
        "overflow": "expert",
        "z_alpha": 0.2,
    },
}


def _config(options: Options) -> MoEConfig:
    return MoEConfig(**{"embed_dim": D, "hidden_dim": H, "num_experts": 5, **options})


def _params(config: MoEConfig, rng: Rng) -> Arrays:
    """Matrices of all experts of about unit gain; biases that keep ReLU far from 0, where it has no derivative."""
    params = drawn(MoE(config), rng)
    for name, value in params.items():
        if value.ndim == 3:
            params[name] = rng.normal(size=value.shape) * value.shape[-1] ** -0.5
        elif config.activation == "relu" and name.endswith("linear1.bias"):
            params[name] = rng.uniform(22, 23, value.shape) * rng.choice([-1, 1], value.shape)
    return params


def _sample(rng: Rng, what: str, options: Options, *shape: int, evaluated: bool = False, routed: bool) -> Sample:
    config = _config(options)
    facts = described(x=shape, evaluated=evaluated)
    arrays = {"x": signal(rng, *shape, config.embed_dim)}
    params = _params(config, rng)
    if routed:
        params = {name: x for name, x in params.items() if name.startswith(("router.", "selection_bias"))}
    called = {"config": config, "evaluated": evaluated}
    return Sample(f"{what}: {facts}", arrays, called, params, joint=math.prod(shape) > 50)


def _samples(rng: Rng, routed: bool = False) -> Iterator[Sample]:
    for what, options in CONFIGS.items():
        yield _sample(rng, what, options, 13, routed=routed)
        if not routed:
            yield _sample(rng, what, options, 2, 3, evaluated=True, routed=False)
    yield _sample(rng, "one token", {"num_experts_per_tok": 2}, routed=routed)
    if routed:
        for what in ("two of five", "sigmoid, biased", "both losses", "capacity"):
            yield _sample(rng, what, CONFIGS[what], 211, routed=True)
        return
    yield _sample(rng, "one token", {"num_experts_per_tok": 2, "bias": True}, 1, evaluated=True, routed=False)
    yield _sample(rng, "no tokens", {"num_experts_per_tok": 2}, 2, 0, routed=False)
    yield replace(_sample(rng, "views with gaps", {"num_experts_per_tok": 2}, 13, routed=False), strided=True)
    wide = {"embed_dim": 29, "hidden_dim": 31, "num_experts_per_tok": 2}
    for what, options in (
        ("wide", {}),
        ("wide, capacity", {"capacity": 1.25, "bias": True}),
        ("wide, overflow", {"capacity": 40, "overflow": "expert", "gated": False, "activation": "gelu"}),
        ("wide, much capacity", {"capacity": 3.0, "num_experts": 13, "num_experts_per_tok": 3}),
    ):
        for evaluated in (False, True):
            yield _sample(rng, what, {**wide, **options}, 211, evaluated=evaluated, routed=False)


def _made(params: dict, options: Options) -> Any:
    made = MoE(options["config"])
    if options["evaluated"]:
        made.eval()
    return with_params(made, params)


def _mixture(params: dict, arrays: dict, options: Options) -> mx.array:
    return _made(params, options)(arrays["x"])[0]


def _twin_mixture(params: Arrays, arrays: Arrays, options: Options) -> np.ndarray:
    return twin.moe(params, arrays["x"], options["config"])[0]


def _tokens(x: Any) -> Any:
    return x.reshape(-1, x.shape[-1])


def _routing(params: dict, arrays: dict, options: Options) -> list[mx.array]:
    """What a router returns: the weights of all experts (T, E), and its statistics.

    The weights are 0 for experts that were not chosen. The rest are the probabilities, both losses, the load and how
    many choices were dropped.
    """
    config = options["config"]
    routing = _made(params, options).route(_tokens(arrays["x"]))
    hot = routing.experts[..., None] == mx.arange(config.num_experts)
    weights = (hot * routing.weights[..., None]).sum(axis=1)
    counts = [routing.load.astype(mx.float32), routing.dropped.astype(mx.float32)]
    return [weights, routing.probabilities, routing.balance_loss, routing.z_loss, routing.loss, *counts]


def _twin_routing(params: Arrays, arrays: Arrays, options: Options) -> list[np.ndarray]:
    config = options["config"]
    routing = twin.route(params, _tokens(arrays["x"]), config)
    weights = np.zeros_like(routing.logits)
    np.put_along_axis(weights, routing.experts, routing.weights, axis=1)
    losses = [twin.balance_loss(routing, config), twin.z_loss(routing, config)]
    counts = [twin.load(routing), np.float64((~routing.kept).sum())]
    return [weights, routing.probabilities, *losses, losses[0] + losses[1], *counts]


CASES = {
    "MoE": Case(_samples, _mixture, _twin_mixture, half=4.0, half_vjp=8.0),
    "Routing": Case(lambda rng: _samples(rng, routed=True), _routing, _twin_routing, result="float32"),
}
