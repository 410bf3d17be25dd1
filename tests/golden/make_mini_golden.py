"""Writes htdemucs_mini.npz: every eighth of the samples that the original made of the shipped recording.

    MLX_XFORMER_DATA=... python tests/golden/make_mini_golden.py

Source: htdemucs_mini/heldout/expected.npz of the test data (PyTorch 2.13.0, demucs 4.1.0, CPU, float32): `forward` is
the model alone on the first segment, `separator` the track through demucs.api (shifts 0, overlap 0.25).
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
SOURCES = {"forward": ("forward_first_seg_stride8", 8), "separator": ("separator_stride32", 32)}


def main() -> None:
    path = Path(os.environ["MLX_XFORMER_DATA"]) / "htdemucs_mini" / "heldout" / "expected.npz"
    with np.load(path) as stored:
        arrays = {name: stored[key][..., ::8] for name, (key, _) in SOURCES.items()}
    np.savez_compressed(HERE / "htdemucs_mini.npz", **arrays)
    facts = {
        "made_by": "tests/golden/make_mini_golden.py",
        "versions": {"torch": "2.13.0", "demucs": "4.1.0"},
        "strides": {name: 8 * stride for name, (_, stride) in SOURCES.items()},
        "source_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "sha256": hashlib.sha256((HERE / "htdemucs_mini.npz").read_bytes()).hexdigest(),
    }
    (HERE / "htdemucs_mini.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
