"""A mixture of 8 experts of width 256 and hidden size 512, two a token, gated: ours against mlx-lm's Mixtral block.

Every program draws the same weights and tokens. A run repeats what is short.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cases.common import describe_mlx, describe_ours, load_openblas

D, H, E, K, TRAINED = 256, 512, 8, 2, 512
REPEATS = {1: 1000, 32: 40, 512: 3, 2048: 1}  # of T tokens in a run
STEPS = 3  # forward and backward in a run


def _draw() -> dict[str, np.ndarray]:
    """Matrices of about unit gain, and x, the tokens."""
    shapes = {"router": (E, D), "gate": (E, H, D), "up": (E, H, D), "down": (E, D, H)}
    rng = np.random.default_rng(0)
    found = {name: rng.standard_normal(shape) * shape[-1] ** -0.5 for name, shape in shapes.items()}
    found["x"] = rng.standard_normal((max(REPEATS), D))
    return {name: x.astype(np.float32) for name, x in found.items()}


def _inference(mx: Any, layer: Callable[[Any], Any], x: Any) -> Callable[[], np.ndarray]:
    def run() -> np.ndarray:
        for _ in range(REPEATS[len(x)]):
            y = layer(x)
            mx.eval(y)
        return np.array(y)

    return run


def _training(mx: Any, step: Callable[[Any], Any], x: Any) -> Callable[[], None]:
    def run() -> None:
        for _ in range(STEPS):
            mx.eval(step(x))

    return run


def _peer(_: Path, tokens: int, train: bool = False) -> dict[str, Any]:
    blas = load_openblas()
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.models.mixtral import MixtralSparseMoeBlock, ModelArgs

    given = {name: mx.array(x) for name, x in _draw().items()}
    sizes = {"hidden_size": D, "intermediate_size": H, "num_local_experts": E, "num_experts_per_tok": K}
    block: Any = MixtralSparseMoeBlock(ModelArgs(model_type="mixtral", **sizes))
    block.gate.weight = given["router"]
    for name in ("gate", "up", "down"):
        block.switch_mlp[f"{name}_proj"].weight = given[name]
    x = given["x"][:tokens]
    mx.eval(block.parameters(), x)
    step = nn.value_and_grad(block, lambda x: (block(x) * x).sum())
    run = _training(mx, step, x) if train else _inference(mx, block, x)
    return describe_mlx(run, packages=["mlx-lm"], blas=blas)


def _ours(_: Path, tokens: int, capacity: float | None = None, train: bool = False) -> dict[str, Any]:
    from mlx_xformer.backend import device
    from mlx_xformer.nn.moe import MoE, MoEConfig

    # isort: split
    import mlx.nn as nn  # after mlx_xformer, which chooses the BLAS

    mx = device.mx
    given = {name: mx.array(x) for name, x in _draw().items()}
    layer: Any = MoE(MoEConfig(D, H, E, K, capacity=capacity)).train(train)
    layer.router.weight = given["router"]
    for name in ("gate", "up", "down"):
        layer.experts[f"{name}_proj"].weight = given[name]
    x = given["x"][:tokens]
    mx.eval(layer.parameters(), x)
    step = nn.value_and_grad(layer, lambda x: (layer(x)[0] * x).sum())
    run = _training(mx, step, x) if train else _inference(mx, lambda x: layer(x)[0], x)
    return describe_ours(run)


def dense(_: Path) -> dict[str, Any]:
    """A dense gated network with as many products a token."""
    from mlx_xformer.backend import device
    from mlx_xformer.nn.layers import GatedFeedForward

    # isort: split
    import mlx.nn as nn

    mx = device.mx
    layer: Any = GatedFeedForward(D, K * H)
    x = mx.array(_draw()["x"][:TRAINED])
    mx.eval(layer.parameters(), x)
    step = nn.value_and_grad(layer, lambda x: (layer(x) * x).sum())
    return describe_ours(_training(mx, step, x))


peer_1, ours_1 = partial(_peer, tokens=1), partial(_ours, tokens=1)
peer_32, ours_32 = partial(_peer, tokens=32), partial(_ours, tokens=32)
peer_512, ours_512 = partial(_peer, tokens=512), partial(_ours, tokens=512)
peer_2048, ours_2048 = partial(_peer, tokens=2048), partial(_ours, tokens=2048)
peer_train = partial(_peer, tokens=TRAINED, train=True)
ours_train = partial(_ours, tokens=TRAINED, train=True)
ours_train_capped = partial(_ours, tokens=TRAINED, capacity=1.25, train=True)
