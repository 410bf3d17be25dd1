"""Layers in NumPy."""
