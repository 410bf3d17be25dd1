"""MoEConfig: what a MoE is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ...backend import activations
from ..config import Config

ROUTERS, OVERFLOWS, BALANCES = ("softmax", "sigmoid"), ("drop", "expert"), ("switch", "document")


@dataclass(frozen=True)
class MoEConfig(Config):
    """The fields of a MoE, checked.

    Attributes:
        embed_dim: Channels of a token.
        hidden_dim: Channels inside an expert.
        num_experts: Experts, E.
        num_experts_per_tok: Experts that a token goes through, k.
        activation: Of the experts, as of GatedFeedForward or FeedForward.
        gated: Whether an expert is a GatedFeedForward, or else a FeedForward.
        bias: Whether the experts have biases.
        router: "softmax" of the scores of all experts, or "sigmoid" of each.
        router_bias: Whether the router's product has a bias.
        selection_bias: Whether a bias (E,) is added to the scores where experts are chosen, but not to the weights:
            auxiliary-loss-free balancing (Wang et al. 2024, arXiv 2408.15664).
        groups: Groups of neighbouring experts, of which the best are chosen first. The score of a group is that of its
            best expert (softmax; DeepSeek-V2, arXiv 2405.04434) or the sum of its two best (sigmoid; DeepSeek-V3,
            arXiv 2412.19437).
        groups_per_tok: Groups from which a token's experts are chosen.
        renormalize: Whether the weights of a token are divided by their sum; by default where k > 1, since with k = 1
            they would be 1 and the router would not learn.
        scale: What all weights are multiplied with.
        shared_dim: Channels inside an expert that every token goes through; 0 for none.
        shared_gate: Whether that expert is weighted by the sigmoid of a product (Qwen2-MoE, arXiv 2407.10671).
        capacity: Tokens that an expert takes, the first in their order; a float is a factor of T k / E, None no limit.
        overflow: What becomes of the tokens beyond: "drop", or "expert", an additional one for all of them.
        alpha: The factor of the balance loss.
        balance: "switch" (Fedus et al. 2021, arXiv 2101.03961) or "document"; see Routing.balance_loss.
        z_alpha: The factor of the z-loss (Zoph et al. 2022, arXiv 2202.08906).

    Raises:
        ValueError: A field is of the wrong type or out of range; the message names it.
    """

    _what: ClassVar[str] = "moe"

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

    def __post_init__(self) -> None:
        self._check_whole("embed_dim", "hidden_dim", "num_experts", "num_experts_per_tok", "groups", "groups_per_tok")
        self._check_whole("shared_dim")
        self._check_flags("gated", "bias", "router_bias", "selection_bias", "renormalize", "shared_gate")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok must be at most num_experts, {self.num_experts}, got {self.num_experts_per_tok}"
            )
        self._check_one_of("activation", activations.GATED if self.gated else activations.ACTIVATIONS)
        self._check_one_of("router", ROUTERS)
        self._check_one_of("overflow", OVERFLOWS)
        self._check_one_of("balance", BALANCES)
        self._check_groups()
        if self.shared_gate and not self.shared_dim:
            raise ValueError(f"shared_gate must be False without shared_dim, got {self.shared_gate}")
        self._check_above_0("scale")
        self._check_from_0("capacity", "alpha", "z_alpha")

    def _check_groups(self) -> None:
        if self.num_experts % self.groups:
            raise ValueError(f"groups must divide num_experts, {self.num_experts}, got {self.groups}")
        if self.groups_per_tok > self.groups:
            raise ValueError(f"groups_per_tok must be at most groups, {self.groups}, got {self.groups_per_tok}")
        if self.num_experts_per_tok > self.groups_per_tok * self.group_size:
            raise ValueError(
                f"groups_per_tok must hold num_experts_per_tok, {self.num_experts_per_tok}, got {self.groups_per_tok} "
                f"of {self.group_size} experts"
            )

    @property
    def group_size(self) -> int:
        """Experts of a group."""
        return self.num_experts // self.groups

    @property
    def renormalizes(self) -> bool:
        """renormalize, resolved."""
        return self.num_experts_per_tok > 1 if self.renormalize is None else self.renormalize

    def slots(self, tokens: int) -> int:
        """How many of so many tokens an expert takes at most."""
        if self.capacity is None:
            return tokens
        if isinstance(self.capacity, int):
            return min(tokens, self.capacity)
        taken = self.capacity * tokens * self.num_experts_per_tok / self.num_experts
        return math.ceil(min(tokens, taken))  # in this order: it may be infinite
