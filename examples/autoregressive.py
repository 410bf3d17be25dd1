"""Trains llm_prep's autoregressive model to say what comes next of two waves: python examples/autoregressive.py OUT

What it reads is x[:, :-1] and what it says x[:, 1:]. See examples/README.md."""

import mlx.core as mx
import numpy as np
from trainer import Experiment, main

from mlx_xformer.models.guides.llm_prep import AutoregressiveTransformerModel, SequenceConfig

BATCH, LENGTH, WIDTH = 32, 33, 2


def batch(rng):
    """Waves (B, L + 1, I) of random frequency and phase."""
    rate, phase = rng.uniform(0.2, 1.2, (BATCH, 1, WIDTH)), rng.uniform(0, 2 * np.pi, (BATCH, 1, WIDTH))
    return (mx.array(np.sin(rate * np.arange(LENGTH)[:, None] + phase), mx.float32),)


def make():
    return AutoregressiveTransformerModel(SequenceConfig(WIDTH, WIDTH, embed_dim=32, num_layers=2, num_heads=4))


def loss(model, x):
    """Of all positions but the first two: the frequency cannot be known before."""
    return mx.mean(mx.square(model(x[:, :-1]) - x[:, 1:])[:, 2:])


EXPERIMENT = Experiment(make, batch, loss, steps=400, limit=0.01)
if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
