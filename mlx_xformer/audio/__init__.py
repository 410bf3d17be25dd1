"""Recordings: reading, resampling, streaming and writing."""

from .encode import Encoding
from .files import write
from .folders import list_recordings
from .recording import Recording, read
from .resampling import rechunk, resample

__all__ = ["Encoding", "Recording", "list_recordings", "read", "rechunk", "resample", "write"]
