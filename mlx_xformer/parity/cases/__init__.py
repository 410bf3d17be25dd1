"""Samples of every operation and layer, in modules as in nn/, and of what stands in other rooms."""

from __future__ import annotations

from ..samples import Case
from . import (
    attention,
    audio,
    backend,
    cache,
    layers,
    linear,
    masks,
    mel,
    moe,
    positions,
    separation,
    spectral,
    text,
    transformer,
)

_NN = (attention, transformer, cache, masks, positions, linear, layers, moe, mel, spectral)
_MODULES = (*_NN, backend, text, audio, separation)
CASES: dict[str, Case] = {name: case for module in _MODULES for name, case in module.CASES.items()}
