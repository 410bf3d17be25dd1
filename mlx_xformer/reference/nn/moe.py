"""A mixture of experts as a loop over tokens and experts. Axes: T tokens, D embed_dim, E experts, k experts a token.

`config` is a MoEConfig, of which the fields are read and nothing is called.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import backend
from .layers import feed_forward, gated_feed_forward, linear, sub

Params = Mapping[str, np.ndarray]


@dataclass
class Routing:
    """logits, probabilities (T, E); experts, weights, kept (T, k)."""

    logits: np.ndarray
    probabilities: np.ndarray
    experts: np.ndarray
    weights: np.ndarray
    kept: np.ndarray


def capacity(config: Any, tokens: int) -> int:
    """How many of so many tokens an expert takes at most."""
    if config.capacity is None:
        return tokens
    if isinstance(config.capacity, int):
        return config.capacity
    return math.ceil(config.capacity * tokens * config.num_experts_per_tok / config.num_experts)


def best_groups(scores: np.ndarray, config: Any) -> list[int]:
    """The experts of the groups with the best scores: (E,) -> their indices."""
    size = config.num_experts // config.groups
    members = [list(range(group * size, (group + 1) * size)) for group in range(config.groups)]
    if config.router == "softmax":
        worth = [max(scores[e] for e in group) for group in members]
    else:
        worth = [sum(sorted((scores[e] for e in group), reverse=True)[:2]) for group in members]
    order = sorted(range(config.groups), key=lambda group: -worth[group])
    return [e for group in order[: config.groups_per_tok] for e in members[group]]


def route(params: Params, x: np.ndarray, config: Any) -> Routing:
    """Where tokens x (T, D) go. Of equal scores the expert of the lowest index is chosen."""
    T, E, k = len(x), config.num_experts, config.num_experts_per_tok
    logits = linear(sub(params, "router"), x)  # (T, E)
    if config.router == "softmax":
        scores = probabilities = backend.softmax(logits)
    else:
        scores = backend.sigmoid(logits)
        probabilities = scores / scores.sum(axis=-1, keepdims=True)
    renormalize = k > 1 if config.renormalize is None else config.renormalize

    experts, kept = np.zeros((T, k), int), np.zeros((T, k), bool)
    weights = np.zeros((T, k), x.dtype)
    taken = [0] * E
    for t in range(T):
        biased = scores[t] + params["selection_bias"] if config.selection_bias else scores[t]
        order = sorted(best_groups(biased, config), key=lambda e: (-biased[e], e))
        total = scores[t, order[:k]].sum() if renormalize else 1
        for j, e in enumerate(order[:k]):
            experts[t, j], weights[t, j] = e, scores[t, e] / total * config.scale
            kept[t, j] = taken[e] < capacity(config, T)
            taken[e] += kept[t, j]
    return Routing(logits, probabilities, experts, weights, kept)


def network(params: Params, x: np.ndarray, config: Any) -> np.ndarray:
    """One expert on its own."""
    activation = getattr(backend, config.activation)
    return (gated_feed_forward if config.gated else feed_forward)(params, x, activation=activation)


def moe(params: Params, x: np.ndarray, config: Any) -> tuple[np.ndarray, Routing]:
    """x (..., D) -> the same, and where the tokens went."""
    tokens = x.reshape(-1, x.shape[-1])  # (T, D)
    routing = route(params, tokens, config)
    y = np.zeros_like(tokens)
    for t, token in enumerate(tokens):
        over = np.zeros((), x.dtype)
        for e, weight, kept in zip(routing.experts[t], routing.weights[t], routing.kept[t], strict=True):
            if kept:
                own = {name: stacked[e] for name, stacked in sub(params, "experts").items()}
                y[t] += weight * network(own, token, config)
            else:
                over = over + weight
        if config.overflow == "expert" and over > 0:
            y[t] += over * network(sub(params, "overflow_expert"), token, config)
        if config.shared_dim:
            shared = network(sub(params, "shared_expert"), token, config)
            if config.shared_gate:
                shared = shared * backend.sigmoid(linear(sub(params, "shared_expert_gate"), token))
            y[t] += shared
    return y.reshape(x.shape), routing


def load(routing: Routing, *, kept: bool = False) -> np.ndarray:
    """(E,): how many tokens chose each expert, or were taken by it."""
    counts = np.zeros(routing.logits.shape[1])
    for e, taken in zip(routing.experts.ravel(), routing.kept.ravel(), strict=True):
        counts[e] += taken if kept else 1
    return counts


def balance_loss(routing: Routing, config: Any) -> np.ndarray:
    """alpha E sum_i f_i P_i (Fedus et al. 2021), or llm_prep's alpha sum_i f_i p_i."""
    T, E = routing.logits.shape
    total = np.zeros((), routing.logits.dtype)
    counts, took = load(routing), load(routing, kept=True)
    for e in range(E):
        if config.balance == "switch":
            total = total + E * (counts[e] / T) * routing.probabilities[:, e].mean()
        elif counts[e]:
            total = total + (took[e] / T) * routing.weights[routing.experts == e].mean()
    return (config.alpha * total).astype(routing.logits.dtype)


def z_loss(routing: Routing, config: Any) -> np.ndarray:
    """z_alpha times the mean square of log sum exp of the logits (Zoph et al. 2022)."""
    top = routing.logits.max(axis=-1)
    logarithms = top + np.log(np.exp(routing.logits - top[:, None]).sum(axis=-1))
    return (config.z_alpha * np.square(logarithms).mean()).astype(routing.logits.dtype)
