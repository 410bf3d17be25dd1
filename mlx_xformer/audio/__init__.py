"""Recordings: reading, resampling, streaming and writing."""

from .encode import Encoding
from .files import write
from .recording import Recording, read, resample

__all__ = ["Encoding", "Recording", "read", "resample", "write"]
