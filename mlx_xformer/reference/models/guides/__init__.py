"""The models of the source documents in NumPy (docs/sources.md)."""
