"""Recordings: reading, resampling, streaming."""

from .recording import Recording, read, resample

__all__ = ["Recording", "read", "resample"]
