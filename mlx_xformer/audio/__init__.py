"""Recordings: reading, resampling, streaming and writing."""

from .encode import Encoding
from .files import write
from .recording import Recording, read
from .resampling import rechunk, resample

__all__ = ["Encoding", "Recording", "read", "rechunk", "resample", "write"]
