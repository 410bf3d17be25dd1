"""Models by name, file or folder."""

from .loading import NAMES, load, resolve
from .summary import available, describe

__all__ = ["NAMES", "available", "describe", "load", "resolve"]
