"""Samples of models, with the weights of a checkpoint."""
