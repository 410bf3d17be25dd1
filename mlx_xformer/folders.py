"""Where this package keeps what it makes for itself."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Of conversions, downloads and a library for products of one row: MLX_XFORMER_CACHE or ~/.cache/mlx-xformer."""
    return Path(os.environ.get("MLX_XFORMER_CACHE") or Path.home() / ".cache" / "mlx-xformer")
