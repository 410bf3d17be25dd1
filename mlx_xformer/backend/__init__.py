"""What computes: the device, its memory, and which form of each operation runs there."""

from . import device  # loads the BLAS that MLX runs on, before any other module imports mlx.core

__all__ = ["device"]
