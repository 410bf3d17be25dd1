"""mlx-xformer: transformer building blocks on MLX, and music source separation built on them."""

from . import runtime  # first: it loads the BLAS that MLX runs on
from ._version import __version__

__all__ = ["__version__", "runtime"]
