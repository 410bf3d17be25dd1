"""Trains llm_prep's regression model to add up a sequence of numbers: python examples/regression.py OUT

The sum is divided by the square root of the count, so that predicting 0 has a loss of 1. See examples/README.md."""

from trainer import Experiment, main  # isort: skip (imports mlx_xformer, which must come before MLX)

import mlx.core as mx

from mlx_xformer.models.guides.llm_prep import SequenceConfig, TransformerModel

BATCH, LENGTH, WIDTH = 32, 32, 3


def batch(rng):
    """Sequences (B, L, I) and their scaled sums (B, 1)."""
    x = rng.normal(size=(BATCH, LENGTH, WIDTH))
    return mx.array(x, mx.float32), mx.array(x.sum(axis=(1, 2))[:, None] / (LENGTH * WIDTH) ** 0.5, mx.float32)


def make():
    return TransformerModel(SequenceConfig(WIDTH, 1, embed_dim=32, num_layers=2, num_heads=4))


def loss(model, x, target):
    return mx.mean(mx.square(model(x) - target))


EXPERIMENT = Experiment(make, batch, loss, steps=300, limit=0.01)
if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
