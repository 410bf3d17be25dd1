"""A page to hear and see stems together."""
