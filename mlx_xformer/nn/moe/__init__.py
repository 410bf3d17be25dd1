"""Mixtures of experts: MoE, its configuration, its routing, and its parts for each of several processes."""

from .config import MoEConfig
from .layer import FFNConfig, MoE
from .routing import Routing, balanced_bias, route
from .sharded import spread

__all__ = ["FFNConfig", "MoE", "MoEConfig", "Routing", "balanced_bias", "route", "spread"]
