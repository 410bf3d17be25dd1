"""mlx-xformer: transformer building blocks on MLX, and music source separation built on them."""

from typing import Any

from ._version import __version__
from .backend import device  # first: it loads the BLAS that MLX runs on

__all__ = [
    "Attention",
    "AttentionConfig",
    "Bag",
    "BagConfig",
    "CrossAttention",
    "CrossCache",
    "GroupedQueryAttention",
    "HTDemucs",
    "HTDemucsConfig",
    "InferenceMode",
    "KVCache",
    "MultiHeadAttention",
    "MultiQueryAttention",
    "RewindError",
    "Separator",
    "Tokenizer",
    "__version__",
    "attention",
    "attention_weights",
    "batch_generate",
    "cache_bytes",
    "convert",
    "generate",
    "get_attention",
    "load",
    "load_caches",
    "make_sampler",
    "runtime",
    "save_caches",
    "separate",
]

if device.backend_error is None:
    from .converters.conversion import convert
    from .models.htdemucs import Bag, BagConfig, HTDemucs, HTDemucsConfig, InferenceMode
    from .nn.attention.layer import (
        Attention,
        AttentionConfig,
        CrossAttention,
        GroupedQueryAttention,
        MultiHeadAttention,
        MultiQueryAttention,
        attention,
        attention_weights,
        get_attention,
    )
    from .nn.cache import CrossCache, KVCache, RewindError, cache_bytes, load_caches, save_caches
    from .pretrained.loading import load
    from .separation.separator import Separator, separate
    from .text.generation import batch_generate, generate
    from .text.samplers import make_sampler
    from .text.tokenizer import Tokenizer
else:

    def __getattr__(name: str) -> Any:
        if name in __all__:
            raise ImportError(device.backend_error)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
