"""Mixture of experts: a router chooses, for every token, which of several feed-forward networks it goes through.

Axes: T tokens, D embed_dim, H hidden_dim, E experts, k experts a token, C capacity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from ...backend import dispatch
from ..config import LIMITS, Config
from ..layers import FeedForward, GatedFeedForward
from ..linear import Linear
from . import grouping
from .config import MoEConfig
from .experts import Experts
from .routing import Routing, route

# The form that products take, by what bench/run.py --mixture and its like measured.
_FEW = 8  # choices, or as many as there are experts if these are more, that a CPU multiplies one by one
_SORTED = 64  # choices from which a GPU gains by sorting
_PADDED = 1.15  # how many rows "dispatch" may have for one of "blocks", whose products are smaller


def block_rows(choices: int, num_experts: int) -> int:
    """The rows of a group, which grow with the root of what an expert gets: padding and small products cost alike."""
    rows = 8
    while rows < 64 and rows * rows * num_experts < 4 * choices:
        rows *= 2
    return rows


def layout(config: MoEConfig, tokens: int, *, half: bool, training: bool) -> str:
    """The form that a mixture's products take.

    "gather": each choice by itself; "sorted": so, in the order of the experts; "dispatch": a group of as many rows as
    an expert may take for each; "blocks": as many groups as are filled.
    """
    choices, taken = tokens * config.num_experts_per_tok, config.slots(tokens)
    if not dispatch.on_cpu():
        if training and taken < tokens:
            return "dispatch"
        return "sorted" if choices >= _SORTED else "gather"
    if not training and choices <= (config.num_experts // 2 if half else max(_FEW, config.num_experts)):
        return "gather"
    rows = block_rows(choices, config.num_experts)
    blocks = grouping.num_groups(choices, config.num_experts, rows) * rows
    return "dispatch" if config.num_experts * taken <= _PADDED * blocks else "blocks"


def _network(config: MoEConfig, hidden_dim: int) -> nn.Module:
    """One expert on its own."""
    kind: Any = GatedFeedForward if config.gated else FeedForward
    return kind(config.embed_dim, hidden_dim, config.activation, bias=config.bias)


class MoE(nn.Module):
    """Experts, and a router that weighs k of them for every token. The options are those of MoEConfig.

    A capacity makes what becomes of a token depend on the tokens before it, in the whole batch: a row may come out
    otherwise in another batch, and a step of cached decoding otherwise than in a full pass, unless nothing overflows.
    The router's product is in float32. train() and eval() choose the faster form of the products, with one result.
    """

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.config = config
        self.router = Linear(config.embed_dim, config.num_experts, bias=config.router_bias)
        if config.selection_bias:
            self.selection_bias = mx.zeros((config.num_experts,))
        self.experts = Experts(config)
        if config.capacity is not None and config.overflow == "expert":
            self.overflow_expert = _network(config, config.hidden_dim)
        if config.shared_dim:
            self.shared_expert = _network(config, config.shared_dim)
            if config.shared_gate:
                self.shared_expert_gate = Linear(config.embed_dim, 1, bias=False)
        if config.selection_bias:
            self.freeze(recurse=False, keys="selection_bias")  # has no gradient, see balanced_bias

    def __call__(self, x: mx.array) -> tuple[mx.array, Routing]:
        """x (..., D) -> the same, and where the tokens went."""
        config = self.config
        if not x.ndim or x.shape[-1] != config.embed_dim:
            raise ValueError(f"x must be (..., embed_dim), {config.embed_dim} wide, got {x.shape}")
        tokens = x if x.ndim == 2 else x[None] if x.ndim == 1 else mx.flatten(x, 0, -2)
        routing = self.route(tokens)
        y = self.mixed(tokens, routing)
        if "overflow_expert" in self and routing.kept is not None:
            over = mx.where(routing.kept, mx.array(0.0), routing.weights).sum(axis=-1, keepdims=True)
            y = y + self.overflow_expert(tokens) * over  # once for each token, whatever number of its experts is full
        if "shared_expert" in self:
            shared = self.shared_expert(tokens)
            if "shared_expert_gate" in self:
                shared = shared * mx.sigmoid(self.shared_expert_gate(tokens))
            y = y + shared
        y = y.astype(mx.result_type(x, self.experts.dtype))
        return y if x.ndim == 2 else y.reshape(x.shape), routing

    def route(self, x: mx.array) -> Routing:
        """Where tokens x (T, D) go."""
        return route(self.router(x.astype(mx.float32)), self.config, self.get("selection_bias"))

    def mixed(self, x: mx.array, routing: Routing) -> mx.array:
        """x (T, D) -> the same, of the experts that had room."""
        config, T, experts = routing.config, len(x), routing.experts
        taken = config.slots(T)
        if not taken:
            return mx.zeros(x.shape, x.dtype)
        how = layout(config, T, half=x.dtype != mx.float32, training=self.training)
        if how == "dispatch":
            table = grouping.dispatch(experts, config.num_experts, taken)
        elif how == "blocks":
            table = grouping.blocks(experts, config.num_experts, block_rows(experts.size, config.num_experts))
        weights = routing.weights
        if routing.kept is not None and how != "dispatch":
            weights = mx.where(routing.kept, weights, mx.array(0.0))
        if how in ("dispatch", "blocks"):
            return grouping.collect(self.experts.grouped(grouping.spread(x, table), table.experts), weights, table)
        y = self.experts(x[:, None], experts) if how == "gather" else self.experts.sorted(x, experts)
        return (y * weights[..., None]).sum(axis=1)


@dataclass(frozen=True)
class FFNConfig(Config):
    """A feed-forward network with ReLU as llm_prep has it, or with use_moe a MoE of such networks, whose weights sum
    to 1 where topk > 1. ValueError names a field that does not fit.

    capacity: tokens of an expert, or as a float a factor of what it gets on average (see MoEConfig): 1.25 of it, not
    0.25, lets most tokens through. renormalize: see MoEConfig; true with topk 1 is what llm_prep's code does, whose
    router does not learn.
    """

    _what: ClassVar[str] = "ffn"

    embed_dim: int
    hidden_dim: int
    use_moe: bool = False
    num_experts: int = 0
    capacity: int | float | None = None
    alpha: float = 0.01
    topk: int = 1
    renormalize: bool | None = None

    def __post_init__(self) -> None:
        most = LIMITS["num_experts"][1]
        self._check_whole("embed_dim", "hidden_dim", num_experts=(0, most), topk=(1, most))
        self._check_flags("use_moe")
        if not self.use_moe:
            return
        if self.num_experts < 1:
            raise ValueError(f"num_experts must be at least 1 with use_moe, got {self.num_experts}")
        if self.topk > self.num_experts:
            raise ValueError(f"topk must be from 1 to num_experts, {self.num_experts}, got {self.topk}")
        self.mixture()

    def mixture(self) -> MoEConfig:
        """What the MoE is."""
        return MoEConfig(
            self.embed_dim,
            self.hidden_dim,
            self.num_experts,
            self.topk,
            activation="relu",
            gated=False,
            bias=True,
            router_bias=True,
            renormalize=self.renormalize,
            capacity=self.capacity,
            overflow="expert",
            alpha=self.alpha,
        )

    def make(self) -> nn.Module:
        """The layer: a FeedForward, or a MoE."""
        return MoE(self.mixture()) if self.use_moe else FeedForward(self.embed_dim, self.hidden_dim, "relu")
