"""Decoder-only language models: configuration and model."""

from .config import CausalLMConfig, Quantization
from .model import CausalLM

__all__ = ["CausalLM", "CausalLMConfig", "Quantization"]
