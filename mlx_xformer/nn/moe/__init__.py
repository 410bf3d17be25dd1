"""Mixtures of experts: MoE, its configuration, its routing, and its parts for each of several processes."""

from .config import MoEConfig
from .layer import MoE
from .routing import Routing, balanced_bias
from .sharded import spread

__all__ = ["MoE", "MoEConfig", "Routing", "balanced_bias", "spread"]
