"""Trains llm_prep's autoregressive model to continue two waves: python examples/autoregressive.py OUT

Its input is x[:, :-1] and its target x[:, 1:]. See examples/README.md."""

from trainer import Experiment, main  # isort: skip (imports mlx_xformer, which must come before MLX)

import mlx.core as mx
import numpy as np

from mlx_xformer.models.guides.llm_prep import AutoregressiveTransformerModel, SequenceConfig

BATCH, LENGTH, WIDTH = 32, 33, 2


def batch(rng):
    """Sine waves (B, L + 1, I) of random frequency and phase."""
    rate, phase = rng.uniform(0.2, 1.2, (BATCH, 1, WIDTH)), rng.uniform(0, 2 * np.pi, (BATCH, 1, WIDTH))
    return (mx.array(np.sin(rate * np.arange(LENGTH)[:, None] + phase), mx.float32),)


def make():
    return AutoregressiveTransformerModel(SequenceConfig(WIDTH, WIDTH, embed_dim=32, num_layers=2, num_heads=4))


def loss(model, x):
    """The mean squared error, without the first two positions, from which the frequency cannot be known yet."""
    return mx.mean(mx.square(model(x[:, :-1]) - x[:, 1:])[:, 2:])


EXPERIMENT = Experiment(make, batch, loss, steps=400, limit=0.01)
if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
