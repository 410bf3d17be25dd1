"""Readers of the files that checkpoints come in."""
