"""mlx-xformer: transformer building blocks on MLX, and music source separation built on them."""

from typing import Any

from . import runtime  # first: it loads the BLAS that MLX runs on
from ._version import __version__

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

if runtime.backend_error is None:
    from .attention import (
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
    from .cache import CrossCache, KVCache, RewindError, cache_bytes, load_caches, save_caches
    from .converters.convert import convert
    from .generate import batch_generate, generate
    from .models.htdemucs import Bag, BagConfig, HTDemucs, HTDemucsConfig, InferenceMode
    from .pretrained import load
    from .samplers import make_sampler
    from .separate import Separator, separate
    from .tokenizer import Tokenizer
else:

    def __getattr__(name: str) -> Any:
        if name in __all__:
            raise ImportError(runtime.backend_error)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
