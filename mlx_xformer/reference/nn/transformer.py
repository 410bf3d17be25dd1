"""Layers of encoders and decoders, and stacks of them. `config` has the fields of nn.transformer.LayerConfig.

Axes: B batch, L positions, S positions of a memory, E embed_dim.
"""

from typing import Any

import numpy as np

from .. import backend
from .attention import attention_layer
from .layers import Params, feed_forward, gated_feed_forward, layer_norm, rms_norm, sub
from .moe import moe


def layer(
    params: Params,
    config: Any,
    x: np.ndarray,
    memory: np.ndarray | None = None,
    *,
    mask: np.ndarray | None = None,
    memory_mask: np.ndarray | None = None,
    bias: np.ndarray | None = None,
) -> np.ndarray:
    """x (B, L, E) -> the same; with config.cross the layer attends to memory (B, S, ...) too."""
    heads = {"num_heads": config.num_heads, "num_kv_heads": config.num_kv_heads, "scale": config.scale}

    def attend(y: np.ndarray) -> np.ndarray:
        own = {"causal": config.causal, "window": config.window, "mask": mask, "bias": bias}
        return attention_layer(sub(params, "self_attn"), y, **heads, **own)

    def listen(y: np.ndarray) -> np.ndarray:
        return attention_layer(sub(params, "cross_attn"), y, memory, **heads, mask=memory_mask)

    steps = [("norm1", attend), *([("norm2", listen)] if config.cross else []), ("norm3", _network(params, config))]
    for name, step in steps:
        if config.norm_first:
            x = x + step(norm(sub(params, name), config, x))
        else:
            x = norm(sub(params, name), config, x + step(x))
    return x


def norm(params: Params, config: Any, x: np.ndarray) -> np.ndarray:
    """The norm of config.norm's kind."""
    return (layer_norm if config.norm == "layer" else rms_norm)(params, x, config.norm_eps)


def _network(params: Params, config: Any) -> Any:
    own = sub(params, "mlp")
    if config.moe is not None:
        return lambda x: moe(own, x, config.moe)[0]
    form = gated_feed_forward if config.gated else feed_forward
    return lambda x: form(own, x, activation=getattr(backend, config.activation))


def stack(params: Params, config: Any, x: np.ndarray, memory: np.ndarray | None = None, **options: Any) -> np.ndarray:
    """Layer after layer, and the norm after the last if there is one."""
    count = 1 + max(int(name.split(".")[1]) for name in params if name.startswith("layers."))
    for index in range(count):
        x = layer(sub(params, f"layers.{index}"), config, x, memory, **options)
    return norm(sub(params, "norm"), config, x) if "norm.weight" in params else x
