"""Recordings: reading, resampling, streaming."""
