"""Converts a PyTorch checkpoint and compares it with the NumPy twin: python examples/convert.py SOURCE OUT"""

import argparse
import sys

from mlx_xformer import convert, load  # isort: skip (must come before MLX)

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_xformer.models.htdemucs import HTDemucs
from mlx_xformer.reference.models.htdemucs.model import htdemucs


def main(source: str, out: str) -> None:
    print(convert(source, out))
    model = load(out)
    if not isinstance(model, HTDemucs):
        sys.exit(f"convert.py: {source} must be an HTDemucs to be compared, got a {type(model).__name__}")
    noise = np.random.default_rng(0).normal(size=(1, model.config.audio_channels, model.config.segment_samples))
    ours = np.array(model(mx.array(noise.astype(np.float32))))
    params = {name: np.array(value, np.float64) for name, value in tree_flatten(model.parameters())}
    truth = htdemucs(params, model.config, noise)
    print(
        f"on noise, MLX and NumPy in double precision differ by {np.abs(ours - truth).max() / np.abs(truth).max():.1e}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("out", metavar="OUT")
    given = vars(parser.parse_args())
    try:
        main(**given)
    except (OSError, ValueError) as error:
        sys.exit(f"convert.py: {error}")
