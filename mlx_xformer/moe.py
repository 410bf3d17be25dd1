"""Mixture of experts: a router chooses, for every token, which of several feed-forward networks it goes through.

Axes: T tokens, D embed_dim, H hidden_dim, E experts, k experts a token, C capacity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from . import kernels
from .layers import FeedForward, GatedFeedForward


@dataclass(frozen=True)
class MoEConfig:
    """What a MoE is.

    activation, gated, bias: of the experts, GatedFeedForward's or FeedForward's. router: "softmax" over all experts, or
    "sigmoid" of each. router_bias: whether the router's product has a bias. selection_bias: a bias (E,) of each expert's
    score where experts are chosen, which the weights do not have (auxiliary-loss-free balancing, Wang et al. 2024,
    arXiv 2408.15664). groups, groups_per_tok: experts are chosen from the best groups only (DeepSeek-V2 and V3).
    renormalize: whether a token's weights are divided by their sum; None: where k > 1, as with k = 1 the router would
    not learn. scale: of all weights. shared_dim: the width of an expert that every token goes through, 0 for none;
    shared_gate: whether it is weighted by the sigmoid of a product. capacity: how many tokens an expert takes, in their
    order; a float is a factor of T k / E; None: all. overflow: what becomes of the others, "drop" or "expert", which is
    one more. alpha: of the balance loss; balance: "switch" (Fedus et al. 2021, arXiv 2101.03961) or "document".
    z_alpha: of the z-loss (Zoph et al. 2022, arXiv 2202.08906).
    """

    embed_dim: int
    hidden_dim: int
    num_experts: int
    num_experts_per_tok: int = 1
    activation: str = "silu"
    gated: bool = True
    bias: bool = False
    router: str = "softmax"
    router_bias: bool = False
    selection_bias: bool = False
    groups: int = 1
    groups_per_tok: int = 1
    renormalize: bool | None = None
    scale: float = 1.0
    shared_dim: int = 0
    shared_gate: bool = False
    capacity: int | float | None = None
    overflow: str = "drop"
    alpha: float = 0.01
    balance: str = "switch"
    z_alpha: float = 0.0

    @property
    def renormalizes(self) -> bool:
        return self.num_experts_per_tok > 1 if self.renormalize is None else self.renormalize

    def slots(self, tokens: int) -> int:
        """How many of so many tokens an expert takes at most."""
        if self.capacity is None:
            return tokens
        if isinstance(self.capacity, int):
            return min(tokens, self.capacity)
        return min(tokens, math.ceil(self.capacity * tokens * self.num_experts_per_tok / self.num_experts))


@dataclass(frozen=True)
class Routing:
    """The auxiliary record of a MoE: where T tokens went. What it tells is computed when it is asked for.

    logits, probabilities (T, E); experts, weights (T, k); kept (T, k), or None where nothing overflows.
    """

    config: MoEConfig
    logits: mx.array
    probabilities: mx.array
    experts: mx.array
    weights: mx.array
    kept: mx.array | None = None

    @property
    def load(self) -> mx.array:
        """(E,): how many tokens chose each expert."""
        return (self.experts[..., None] == mx.arange(self.config.num_experts)).sum(axis=(0, 1))

    @property
    def dropped(self) -> mx.array:
        """How many of the T k choices found their expert full."""
        return mx.array(0) if self.kept is None else (~self.kept).sum()

    @property
    def balance_loss(self) -> mx.array:
        """alpha E sum_i f_i P_i: f_i the share of the tokens that chose expert i, P_i its mean probability over all
        tokens. k alpha where both are uniform; alpha E where k = 1 and all go to one."""
        share = self.load / self.logits.shape[0]
        return self.config.alpha * self.config.num_experts * (share * self.probabilities.mean(axis=0)).sum()

    @property
    def z_loss(self) -> mx.array:
        """z_alpha times the mean square of the logarithm of the sum of the logits' exponentials."""
        return self.config.z_alpha * mx.square(mx.logsumexp(self.logits, axis=-1)).mean()

    @property
    def loss(self) -> mx.array:
        """Both losses."""
        return self.balance_loss + self.z_loss if self.config.z_alpha else self.balance_loss


class ExpertLinear(nn.Module):
    """The matrices of all experts: weight (E, O, I), bias (E, O) if any."""

    def __init__(self, num_experts: int, given: int, made: int, bias: bool = False):
        super().__init__()
        bound = given**-0.5
        self.weight = mx.random.uniform(-bound, bound, (num_experts, made, given))
        if bias:
            self.bias = mx.zeros((num_experts, made))

    def __call__(self, x: mx.array, experts: mx.array) -> mx.array:
        """x (T, 1 or k, I) through the experts (T, k) -> (T, k, O)."""
        y = mx.gather_mm(x[:, :, None], self.weight.swapaxes(1, 2), rhs_indices=experts)[:, :, 0]
        return y + self.bias[experts] if "bias" in self else y


class Experts(nn.Module):
    """As many feed-forward networks of one kind: gate_proj, up_proj and down_proj, or linear1 and linear2."""

    def __init__(self, config: MoEConfig):
        super().__init__()
        E, D, H = config.num_experts, config.embed_dim, config.hidden_dim
        self.activation, self.gated = config.activation, config.gated
        if config.gated:
            self.gate_proj, self.up_proj = ExpertLinear(E, D, H, config.bias), ExpertLinear(E, D, H, config.bias)
            self.down_proj = ExpertLinear(E, H, D, config.bias)
        else:
            self.linear1, self.linear2 = ExpertLinear(E, D, H, config.bias), ExpertLinear(E, H, D, config.bias)

    def __call__(self, x: mx.array, experts: mx.array) -> mx.array:
        """x (T, 1, D) through the experts (T, k) -> (T, k, D)."""
        activation = kernels.ACTIVATIONS[self.activation]
        if self.gated:
            return self.down_proj(activation(self.gate_proj(x, experts)) * self.up_proj(x, experts), experts)
        return self.linear2(activation(self.linear1(x, experts)), experts)


def _network(config: MoEConfig, hidden_dim: int) -> nn.Module:
    """One expert on its own."""
    kind: Any = GatedFeedForward if config.gated else FeedForward
    return kind(config.embed_dim, hidden_dim, config.activation, bias=config.bias)


class MoE(nn.Module):
    """Experts, and a router that weighs k of them for every token. The options are those of MoEConfig."""

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.config = config
        self.router = kernels.Linear(config.embed_dim, config.num_experts, bias=config.router_bias)
        if config.selection_bias:
            self.selection_bias = mx.zeros((config.num_experts,))
        self.experts = Experts(config)
        if config.capacity is not None and config.overflow == "expert":
            self.overflow_expert = _network(config, config.hidden_dim)
        if config.shared_dim:
            self.shared_expert = _network(config, config.shared_dim)
            if config.shared_gate:
                self.shared_expert_gate = kernels.Linear(config.embed_dim, 1, bias=False)

    def __call__(self, x: mx.array) -> tuple[mx.array, Routing]:
        """x (..., D) -> the same, and where the tokens went."""
        tokens = mx.flatten(x, 0, -2)
        routing = self.route(tokens)
        y = self.experts(tokens[:, None], routing.experts)
        y = (y * routing.weights[..., None]).sum(axis=1)
        return y.reshape(x.shape), routing

    def route(self, x: mx.array) -> Routing:
        """Where tokens x (T, D) go."""
        config = self.config
        logits = self.router(x).astype(mx.float32)
        probabilities = mx.softmax(logits, axis=-1)
        k = config.num_experts_per_tok
        experts = mx.argpartition(-probabilities, k - 1, axis=-1)[:, :k]
        weights = mx.take_along_axis(probabilities, experts, axis=-1)
        if config.renormalizes:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        return Routing(config, logits, probabilities, experts, weights * config.scale)


@dataclass(frozen=True)
class FFNConfig:
    """A feed-forward network with ReLU as document 1 has it, or with use_moe a MoE of such networks."""

    embed_dim: int
    hidden_dim: int
    use_moe: bool = False
    num_experts: int = 0
    capacity: int | float | None = None
    alpha: float = 0.01
    topk: int = 1

    def make(self) -> nn.Module:
        """The layer: a FeedForward, or a MoE."""
        if not self.use_moe:
            return FeedForward(self.embed_dim, self.hidden_dim, "relu")
        return MoE(
            MoEConfig(
                self.embed_dim,
                self.hidden_dim,
                self.num_experts,
                self.topk,
                activation="relu",
                gated=False,
                bias=True,
                router_bias=True,
                capacity=self.capacity,
                overflow="expert",
                alpha=self.alpha,
            )
        )
