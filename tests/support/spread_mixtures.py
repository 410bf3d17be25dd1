"""Mixtures of every kind, and what each of several processes makes of them with their experts spread:
python tests/spread_mixtures.py FOLDER writes FOLDER/RANK.npz"""

from __future__ import annotations

import sys
from pathlib import Path

from mlx_xformer.backend import device  # isort: skip (before MLX, whose BLAS it chooses)

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from support.harness import Params, draw
from support.language import tiny_causal_lm

from mlx_xformer.nn.moe.layer import MoE, MoEConfig
from mlx_xformer.nn.moe.sharded import spread

D, H, E = 23, 29, 14
TOKENS = (37, 3, 1)  # of one input after the other: by blocks, and choice by choice
KINDS = {
    "top-1": {"num_experts_per_tok": 1, "alpha": 0.1},
    "top-3": {"num_experts_per_tok": 3},
    "plain": {"num_experts_per_tok": 2, "gated": False, "activation": "relu", "bias": True, "router_bias": True},
    "sigmoid": {"num_experts_per_tok": 2, "router": "sigmoid", "selection_bias": True, "scale": 2.3},
    "groups": {"num_experts_per_tok": 3, "groups": 7, "groups_per_tok": 2},
    "dropped": {"num_experts_per_tok": 2, "capacity": 1.1},
    "overflow": {"num_experts_per_tok": 2, "capacity": 3, "overflow": "expert", "bias": True},
    "full": {"num_experts_per_tok": 2, "capacity": 0, "overflow": "expert"},
    "shared": {"num_experts_per_tok": 2, "shared_dim": 31, "shared_gate": True},
    "packed": {"num_experts_per_tok": 3, "embed_dim": 64, "hidden_dim": 96},
}
DECODER = {"embed_dim": 40, "hidden_dim": 29, "num_experts": 6, "num_experts_per_tok": 2}


def config(kind: str) -> MoEConfig:
    return MoEConfig(**{"embed_dim": D, "hidden_dim": H, "num_experts": E} | KINDS[kind])


def mixture(kind: str) -> tuple[MoE, Params]:
    """A MoE of drawn weights, and these in double precision."""
    moe = MoE(config(kind))
    params = draw(moe, seed=len(kind))
    moe.eval()
    if kind == "packed":
        nn.quantize(moe, 32, 4, class_predicate=lambda name, _: name.startswith("experts."))
        for name, layer in moe.experts.children().items():
            params[f"experts.{name}.weight"] = np.array(
                mx.dequantize(layer.weight, layer.scales, layer.biases, 32, 4), np.float64
            )
    return moe, params


def inputs(kind: str) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.normal(size=(1, T, config(kind).embed_dim)) for T in TOKENS]


def decoder() -> nn.Module:
    model = tiny_causal_lm(moe=DECODER, dense_layers=[1])
    model.eval()
    return model


def tokens() -> mx.array:
    return mx.array(np.random.default_rng(3).integers(0, 257, (2, 19)))


def logits(model: nn.Module) -> dict[str, mx.array]:
    """Of the tokens at once, and of the last of them by a cache."""
    caches = model.make_caches()
    parts = [model(tokens()[:, at], caches=caches) for at in (slice(11), slice(11, 12), slice(12, 19))]
    return {"whole": model(tokens()), "cached": mx.concatenate(parts, axis=1)}


def held(model: nn.Module) -> int:
    """The bytes of a model's experts."""
    return sum(x.nbytes for name, x in tree_flatten(model.parameters()) if "experts." in name)


def main(folder: str) -> None:
    group = device.process_group()
    found = {}
    for kind in KINDS:
        moe, _ = mixture(kind)
        layers = nn.Sequential(moe)
        before = held(layers)
        spread(layers, group)
        found[f"{kind}/bytes"] = mx.array([held(layers), before])
        for i, x in enumerate(inputs(kind)):
            found[f"{kind}/{i}"], routing = layers(mx.array(x.astype(np.float32)))
            found[f"{kind}/{i}/load"], found[f"{kind}/{i}/dropped"] = routing.load, routing.dropped
    model = decoder()
    spread(model, group)
    found |= logits(model)
    mx.savez(str(Path(folder) / f"{group.rank()}.npz"), **{name.replace("/", ":"): x for name, x in found.items()})


if __name__ == "__main__":
    main(sys.argv[1])
