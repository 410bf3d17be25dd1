"""Families of the source documents (docs/sources.md)."""
