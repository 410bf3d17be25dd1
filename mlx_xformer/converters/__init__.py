"""Checkpoints of other implementations into checkpoint folders, and back."""

from .conversion import convert
from .report import Report

__all__ = ["Report", "convert"]
