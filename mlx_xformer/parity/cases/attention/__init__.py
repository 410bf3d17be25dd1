"""Samples of attention and its layers, in modules as in nn/attention/."""

from . import core, layer, torch_layout

CASES = {**core.CASES, **layer.CASES, **torch_layout.CASES}
