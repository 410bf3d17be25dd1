"""Trains llm_prep's encoder-decoder to give a sequence backwards: python examples/encoder_decoder.py OUT

The decoder reads the target one step late, after zeros (teacher forcing). See examples/README.md."""

import mlx.core as mx
import numpy as np
from trainer import Experiment, main

from mlx_xformer.models.guides.llm_prep import EncoderDecoder, SequenceConfig

BATCH, LENGTH, WIDTH = 32, 8, 3


def batch(rng):
    """Sources (B, L, I), targets one step late, and targets."""
    source = rng.normal(size=(BATCH, LENGTH, WIDTH))
    target = source[:, ::-1].copy()
    late = np.concatenate([np.zeros((BATCH, 1, WIDTH)), target[:, :-1]], axis=1)
    return tuple(mx.array(x, mx.float32) for x in (source, late, target))


def make():
    return EncoderDecoder(SequenceConfig(WIDTH, WIDTH, embed_dim=32, num_layers=2, num_heads=4))


def loss(model, source, late, target):
    return mx.mean(mx.square(model(source, late) - target))


EXPERIMENT = Experiment(make, batch, loss, steps=400, limit=0.02)
if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
