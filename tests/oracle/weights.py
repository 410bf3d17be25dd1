"""Models of demucs 4.1.0 with random weights that hide nothing."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import numpy as np
import scratch
import torch
from compositions import MODULES as COMPOSITIONS
from demucs.demucs import DConv
from demucs.hdemucs import HDecLayer, HEncLayer
from demucs.htdemucs import HTDemucs
from demucs.transformer import (
    CrossTransformerEncoder,
    CrossTransformerEncoderLayer,
    MyTransformerEncoderLayer,
)
from torch import nn

MODULES = {
    "htdemucs": HTDemucs,
    "crosstransformer": CrossTransformerEncoder,
    "self_layer": MyTransformerEncoderLayer,
    "cross_layer": CrossTransformerEncoderLayer,
    "encoder_layer": HEncLayer,
    "decoder_layer": HDecLayer,
    "dconv": DConv,
    "mha": nn.MultiheadAttention,
    "layer_norm": nn.LayerNorm,
    "group_norm": nn.GroupNorm,
    "linear": nn.Linear,
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d,
    "embedding": nn.Embedding,
    **scratch.MODULES,
    **COMPOSITIONS,
}


def decode(value: Any) -> Any:
    """JSON values with demucs' own encoding of fractions, or ours ("39/5")."""
    if isinstance(value, str) and re.fullmatch(r"\d+/\d+", value):
        return Fraction(value)
    if isinstance(value, dict) and value.get("_type") == "fraction":
        return Fraction(value["numerator"], value["denominator"])
    if isinstance(value, dict):
        return {key: decode(item) for key, item in value.items()}
    return [decode(item) for item in value] if isinstance(value, list) else value


def encode(value: Any) -> Any:
    """The inverse of decode."""
    if isinstance(value, Fraction):
        return {"_type": "fraction", "numerator": value.numerator, "denominator": value.denominator}
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    return [encode(item) for item in value] if isinstance(value, list | tuple) else value


def randomise(module: nn.Module, seed: int) -> None:
    """Draws what a fresh model leaves at 0, at 1 or near 0: layer scales, norms, attention biases."""
    rng = np.random.default_rng(seed)

    def draw(parameter: torch.Tensor | None, low: float, high: float) -> None:
        if parameter is not None:
            values = rng.uniform(low, high, tuple(parameter.shape)).astype(np.float32)
            parameter.data.copy_(torch.from_numpy(values))

    for child in module.modules():
        if isinstance(child, nn.LayerNorm | nn.GroupNorm):
            draw(child.weight, 0.7, 1.3)
            draw(child.bias, -0.2, 0.2)
        elif type(child).__name__ == "LayerScale":
            draw(child.scale, 0.3, 0.9)
        elif isinstance(child, nn.MultiheadAttention):
            draw(child.in_proj_bias, -0.1, 0.1)
            draw(child.out_proj.bias, -0.1, 0.1)


def build(name: str, kwargs: dict[str, Any], seed: int, half: bool = False) -> nn.Module:
    """A float32 module in eval mode. `half`: its weights are rounded to what float16 holds."""
    torch.manual_seed(seed)
    module = MODULES[name](**decode(kwargs)).eval()
    randomise(module, seed)
    if half:
        for parameter in module.parameters():
            parameter.data.copy_(parameter.data.half())
    return module


def state_of(module: nn.Module) -> dict[str, np.ndarray]:
    """The state dict as float32 arrays."""
    return {name: value.detach().numpy().copy() for name, value in module.state_dict().items()}
