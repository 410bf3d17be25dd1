"""Expert parallelism: the experts of mixtures spread over the processes that mlx.launch started, for inference.

Axes: T tokens, D embed_dim, E experts, k experts a token, n processes, N choices of a process's own experts.
"""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from .layer import MoE
from .routing import Routing


def spread(model: nn.Module, group: mx.distributed.Group) -> None:
    """Replaces every MoE of a model by a SpreadMoE.

    Each of the n processes of a group keeps E / n experts, in the order of the ranks; the memory of the others is
    freed.
    """
    mixtures = [(name, module) for name, module in model.named_modules() if name and isinstance(module, MoE)]
    if not mixtures:
        raise ValueError(f"model must have layers that are a MoE, got a {type(model).__name__} without")
    for _, moe in mixtures:
        _check(moe, group)
    for name, moe in mixtures:
        model.update_modules(tree_unflatten([(name, SpreadMoE(moe, group))]))


def _check(moe: MoE, group: mx.distributed.Group) -> None:
    if isinstance(moe, SpreadMoE):
        raise ValueError("moe must have all its experts, got one that is spread already")
    if moe.config.num_experts % group.size():
        raise ValueError(
            f"num_experts must be a multiple of the number of processes, {group.size()}, got {moe.config.num_experts}"
        )


class SpreadMoE(MoE):
    """One process's part of a MoE, with its share of the experts; without gradient.

    Each process computes what its own experts make of the tokens that chose them, and the sum goes to all processes.
    All the rest is computed by every process.
    """

    def __init__(self, moe: MoE, group: mx.distributed.Group):
        _check(moe, group)
        nn.Module.__init__(self)
        self.group, self.config = group, moe.config
        count = moe.config.num_experts // group.size()
        self.first = group.rank() * count
        self.own = dataclasses.replace(  # of a choice by itself
            moe.config, num_experts=count, num_experts_per_tok=1, groups=1, groups_per_tok=1, capacity=None
        )
        for part in moe.experts.modules():
            for name in [name for name, value in part.items() if isinstance(value, mx.array)]:
                # A slice would keep the whole alive. One by one, so that a model whose weights are still on the disk
                # never has all of them in memory.
                part[name] = mx.contiguous(part[name][self.first : self.first + count])
                mx.eval(part[name])
        for name, value in moe.items():
            self[name] = value
        self.freeze()
        self.eval()

    def mixed(self, x: mx.array, routing: Routing) -> mx.array:
        """x (T, D) -> the same, of the experts that had room, in float32."""
        experts, first = routing.experts, self.first
        mine = (experts >= first) & (experts < first + self.own.num_experts)
        if routing.kept is not None:
            mine = mine & routing.kept
        # The router must have run here: how many choices there are decides the shapes of what is computed.
        tokens, places = (mx.array(index) for index in np.nonzero(np.array(mine)))  # (N,) each
        y = mx.zeros(x.shape, mx.float32)
        if tokens.size:
            at = (tokens[:, None], places[:, None])
            part = Routing(self.own, routing.logits[tokens], experts[at] - first, routing.weights[at])
            y = y.at[tokens].add(super().mixed(x[tokens], part))
        return mx.stop_gradient(mx.distributed.all_sum(y, group=self.group))
