"""Samples of every operation and layer, in modules as in nn/."""

from __future__ import annotations

from ..samples import Case
from . import attention, backend, cache, layers, masks, mel, moe, positions, spectral, transformer

_MODULES = (attention, transformer, cache, masks, positions, backend, layers, moe, mel, spectral)
CASES: dict[str, Case] = {name: case for module in _MODULES for name, case in module.CASES.items()}
