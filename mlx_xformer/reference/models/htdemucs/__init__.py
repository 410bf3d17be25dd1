"""HTDemucs of the NumPy twin."""

from .model import htdemucs

__all__ = ["htdemucs"]
