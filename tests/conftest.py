"""Imported before any test: mlx_xformer must come before mlx.core, or MLX keeps its own slow BLAS on Linux."""

import mlx_xformer  # noqa: F401
