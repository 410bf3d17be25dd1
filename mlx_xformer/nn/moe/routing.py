"""Where the tokens of a MoE go, and what that is worth: choices, capacity, losses, balancing.

Axes: T tokens, E experts, k experts a token, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from .config import MoEConfig

_TINY = 1e-20  # keeps the sum of sigmoids that all underflow from dividing by 0


@dataclass(frozen=True)
class Routing:
    """The auxiliary record of a MoE: where T tokens went. What it tells is computed when it is asked for.

    logits (T, E); experts, weights (T, k), in no particular order; kept (T, k), or None where nothing can overflow.
    """

    config: MoEConfig
    logits: mx.array
    experts: mx.array
    weights: mx.array
    kept: mx.array | None = None

    @property
    def probabilities(self) -> mx.array:
        """(T, E): the softmax of the logits, or their sigmoids divided by the sum of these."""
        if self.config.router == "softmax":
            return mx.softmax(self.logits, axis=-1)
        scores = mx.sigmoid(self.logits)
        return scores / (scores.sum(axis=-1, keepdims=True) + _TINY)

    @property
    def load(self) -> mx.array:
        """(E,): how many tokens chose each expert, full or not."""
        return chosen(self.experts, self.config.num_experts).sum(axis=0)

    @property
    def dropped(self) -> mx.array:
        """How many of the T k choices found their expert full."""
        return mx.array(0) if self.kept is None else (~self.kept).sum()

    @property
    def balance_loss(self) -> mx.array:
        """The balance loss, alpha E sum_i f_i P_i.

        f_i is the share of the tokens that chose expert i, P_i its mean probability over all tokens. The loss is k
        alpha where both are uniform, and alpha E where k = 1 and all tokens choose one expert. Its gradient is that of
        P alone, as f counts.

        balance="document" is llm_prep's alpha sum_i f_i p_i: f_i the share of the tokens that expert i took, p_i the
        mean weight of those that chose it. It is kept to compare with and does not balance: without overflow it is
        alpha whatever the router does where weights sum to 1, and with overflow it falls as the routing collapses.
        """
        config, tokens = self.config, max(1, len(self.logits))
        if config.balance == "document":
            return config.alpha * (self._taken / tokens * self._mean_weights).sum()
        share = self.load / tokens
        return config.alpha * config.num_experts * (share * self.probabilities.sum(axis=0) / tokens).sum()

    @property
    def _taken(self) -> mx.array:
        """(E,): how many tokens each expert took."""
        return chosen(self.experts, self.config.num_experts, self.kept).sum(axis=0)

    @property
    def _mean_weights(self) -> mx.array:
        """(E,): the mean weight of the tokens that chose an expert, 0 for none."""
        hot = self.experts[..., None] == mx.arange(self.config.num_experts)
        return (hot * self.weights[..., None]).sum(axis=(0, 1)) / mx.maximum(self.load, 1)

    @property
    def z_loss(self) -> mx.array:
        """z_alpha times the mean square of the logarithm of the sum of the logits' exponentials."""
        tokens = len(self.logits)
        if not tokens:
            return mx.array(0.0)
        return self.config.z_alpha * mx.square(mx.logsumexp(self.logits, axis=-1)).sum() / tokens

    @property
    def loss(self) -> mx.array:
        """Both losses."""
        return self.balance_loss + self.z_loss if self.config.z_alpha else self.balance_loss


def chosen(experts: mx.array, num_experts: int, kept: mx.array | None = None) -> mx.array:
    """experts (T, k), no two of a row alike -> (T, E), int: 1 for those of a row, or for those kept."""
    hot = experts[..., None] == mx.arange(num_experts)
    return (hot if kept is None else hot & kept[..., None]).sum(axis=1)


def route(logits: mx.array, config: MoEConfig, selection_bias: mx.array | None = None) -> Routing:
    """Where tokens of these logits (T, E), in float32, go. Which of equal scores is chosen is not defined."""
    softmax = config.router == "softmax"
    scores = logits
    if not softmax:
        scores = mx.sigmoid(logits)
    elif selection_bias is not None or not config.renormalizes:
        scores = mx.softmax(logits, axis=-1)
    experts = mx.stop_gradient(_best(scores if selection_bias is None else scores + selection_bias, config))
    weights = mx.take_along_axis(scores, experts, axis=-1)
    if config.renormalizes and scores is logits:
        weights = mx.softmax(weights, axis=-1)  # is the softmax over all, divided by its sum over the chosen
    elif config.renormalizes:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + _TINY)
    if config.scale != 1:
        weights = weights * config.scale
    taken = config.slots(len(logits))
    kept = None if taken == len(logits) else places(experts, config.num_experts)[0] < taken
    return Routing(config, logits, experts, weights, kept)


def _best(scores: mx.array, config: MoEConfig) -> mx.array:
    """The indices (T, k) of the best of (T, E), from the best groups."""
    k = config.num_experts_per_tok
    if config.groups_per_tok < config.groups:
        grouped = mx.unflatten(scores, -1, (config.groups, config.group_size))  # (T, G, E / G)
        if config.router == "softmax":
            values = grouped.max(axis=-1)
        else:
            values = mx.topk(grouped, min(2, config.group_size), axis=-1).sum(axis=-1)
        groups = mx.argpartition(-values, config.groups_per_tok - 1, axis=-1)[:, : config.groups_per_tok]
        open_ = chosen(groups, config.groups)[..., None] > 0
        scores = mx.flatten(mx.where(open_, grouped, mx.array(-mx.inf, scores.dtype)), -2, -1)
    if k == 1 and len(scores):  # MLX takes no argmax of nothing
        return mx.argmax(scores, axis=-1, keepdims=True)
    return mx.argpartition(-scores, k - 1, axis=-1)[:, :k]


def places(experts: mx.array, num_experts: int) -> tuple[mx.array, mx.array]:
    """experts (T, k) -> how many tokens before it chose the same expert, (T, k), and how many did in all, (E,)."""
    before = mx.cumsum(chosen(experts, num_experts), axis=0)  # (T, E), the token itself counted
    return mx.take_along_axis(before, experts, axis=1) - 1, before[-1]


def balanced_bias(selection_bias: mx.array, load: mx.array, rate: float) -> mx.array:
    """The next selection bias (E,), after a step in which the experts had this load (E,).

    Experts below the mean load gain `rate`, those above lose it (Wang et al. 2024, arXiv 2408.15664).
    """
    load = load.astype(mx.float32)
    return selection_bias + rate * mx.sign(load.mean() - load)
