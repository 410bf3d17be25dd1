"""mlx-xformer: transformer building blocks on MLX, and music source separation built on them.

The names below are imported when they are first used, so that `import mlx_xformer` takes no longer than `backend` does.
That room is imported at once: on Linux it loads the BLAS that MLX runs on, which must happen before `mlx.core` is
imported for the first time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import backend
from ._version import __version__

if TYPE_CHECKING:
    from .backend.threads import clear_streams_at_thread_end
    from .converters import convert
    from .models.causal_lm import CausalLM, CausalLMConfig
    from .models.htdemucs import Bag, BagConfig, HTDemucs, HTDemucsConfig, InferenceMode
    from .nn.attention import (
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
    from .nn.moe import MoE, MoEConfig
    from .nn.rotary import Rotary
    from .pretrained import load
    from .separation import Separator, separate
    from .text import SentenceEncoder, Tokenizer, batch_generate, generate, make_sampler

__all__ = [
    "Attention",
    "AttentionConfig",
    "Bag",
    "BagConfig",
    "CausalLM",
    "CausalLMConfig",
    "CrossAttention",
    "CrossCache",
    "GroupedQueryAttention",
    "HTDemucs",
    "HTDemucsConfig",
    "InferenceMode",
    "KVCache",
    "MoE",
    "MoEConfig",
    "MultiHeadAttention",
    "MultiQueryAttention",
    "RewindError",
    "Rotary",
    "SentenceEncoder",
    "Separator",
    "Tokenizer",
    "__version__",
    "attention",
    "attention_weights",
    "backend",
    "batch_generate",
    "cache_bytes",
    "clear_streams_at_thread_end",
    "convert",
    "generate",
    "get_attention",
    "load",
    "load_caches",
    "make_sampler",
    "save_caches",
    "separate",
]

_MODULES = {  # module -> the names that it holds
    "backend.threads": ("clear_streams_at_thread_end",),
    "converters": ("convert",),
    "models.causal_lm": ("CausalLM", "CausalLMConfig"),
    "models.htdemucs": ("Bag", "BagConfig", "HTDemucs", "HTDemucsConfig", "InferenceMode"),
    "nn.attention": (
        "Attention",
        "AttentionConfig",
        "CrossAttention",
        "GroupedQueryAttention",
        "MultiHeadAttention",
        "MultiQueryAttention",
        "attention",
        "attention_weights",
        "get_attention",
    ),
    "nn.cache": ("CrossCache", "KVCache", "RewindError", "cache_bytes", "load_caches", "save_caches"),
    "nn.moe": ("MoE", "MoEConfig"),
    "nn.rotary": ("Rotary",),
    "pretrained": ("load",),
    "separation": ("Separator", "separate"),
    "text": ("SentenceEncoder", "Tokenizer", "batch_generate", "generate", "make_sampler"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used. ImportError where MLX cannot be loaded."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if backend.device.backend_error is not None:
        raise ImportError(backend.device.backend_error)
    value = globals()[name] = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    """The public names, and what has been imported so far."""
    return sorted({*globals(), *__all__})
