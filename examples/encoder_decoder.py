"""Trains llm_prep's encoder-decoder to reverse a sequence: python examples/encoder_decoder.py OUT

The decoder reads the target shifted by one step, after a zero (teacher forcing). See examples/README.md."""

from trainer import Experiment, main  # isort: skip (imports mlx_xformer, which must come before MLX)

import mlx.core as mx
import numpy as np

from mlx_xformer.models.guides.llm_prep import EncoderDecoder, SequenceConfig

BATCH, LENGTH, WIDTH = 32, 8, 3


def batch(rng):
    """Sources, targets shifted by one step, and targets, all (B, L, I)."""
    source = rng.normal(size=(BATCH, LENGTH, WIDTH))
    target = source[:, ::-1].copy()
    shifted = np.concatenate([np.zeros((BATCH, 1, WIDTH)), target[:, :-1]], axis=1)
    return tuple(mx.array(x, mx.float32) for x in (source, shifted, target))


def make():
    return EncoderDecoder(SequenceConfig(WIDTH, WIDTH, embed_dim=32, num_layers=2, num_heads=4))


def loss(model, source, shifted, target):
    return mx.mean(mx.square(model(source, shifted) - target))


EXPERIMENT = Experiment(make, batch, loss, steps=400, limit=0.02)
if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
