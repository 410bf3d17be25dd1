"""Models by name, file or folder."""
