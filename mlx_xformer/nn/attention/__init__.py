"""Attention: the computation, and the layer around it."""
