"""Samples of operations and layers."""
