"""Caches of keys and values: KVCache of the positions so far, CrossCache of a memory; their sizes; their files."""

from .cross import CrossCache
from .files import load_caches, save_caches
from .kv import KVCache, RewindError, View
from .maker import CacheMaker
from .options import CacheOptions
from .quantized import KeysOrValues, Quantized
from .rows import merge_caches
from .sizes import cache_bytes

__all__ = [
    "CacheMaker",
    "CacheOptions",
    "CrossCache",
    "KVCache",
    "KeysOrValues",
    "Quantized",
    "RewindError",
    "View",
    "cache_bytes",
    "load_caches",
    "merge_caches",
    "save_caches",
]
