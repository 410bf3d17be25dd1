"""What tests of networks share: weights of an original, and gradients of transformers' under our names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from support.harness import assert_within_budget

from mlx_xformer.converters.rules import plan


def drawn_as(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Tensors of these names and shapes: matrices of about unit gain, no gain and no bias 0 or 1."""
    rng = np.random.default_rng(seed)
    state = {}
    for name, shape in shapes.items():
        low, high = (-0.2, 0.2) if name.endswith("bias") else (0.7, 1.3)
        drawn = rng.uniform(low, high, shape) if len(shape) == 1 else rng.normal(size=shape) * shape[-1] ** -0.5
        state[name] = drawn.astype(np.float32)
    return state


def same_gradients(kind: Any, model: nn.Module, loss: Callable[[], mx.array], theirs: dict[str, np.ndarray]) -> None:
    """Those of a loss by every parameter, against "float64/NAME" and "float32/NAME" of the original's."""
    _, ours = nn.value_and_grad(model, loss)()
    ours = dict(tree_flatten(ours))
    names = [name.removeprefix("float64/") for name in theirs if name.startswith("float64/")]
    moves, problems = plan(kind.rules(model.config, dict.fromkeys(names)), names)
    assert not problems, problems
    found = {move.targets[0]: move.sources[0] for move in moves if move.targets}
    assert found.keys() == ours.keys()
    largest = max(np.abs(theirs[f"float64/{name}"]).max() for name in names)
    for target, source in found.items():
        truth, single = theirs[f"float64/{source}"], theirs[f"float32/{source}"]
        if np.abs(truth).max() < 1e-9 * largest:  # what a softmax does not see: the bias of keys
            assert np.abs(np.array(ours[target])).max() < 1e-5 * largest, target
            continue
        assert_within_budget(ours[target], truth, single, target)
