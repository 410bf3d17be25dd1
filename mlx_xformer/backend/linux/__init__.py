"""Forms for MLX's CPU backend on Linux; a Mac never runs them."""
