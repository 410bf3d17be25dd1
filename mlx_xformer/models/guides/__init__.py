"""The models of the source documents (docs/sources.md)."""
