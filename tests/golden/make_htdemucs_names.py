"""Writes htdemucs_names.json: the digest of every parameter name and shape of the official configurations. Runs in the
oracle's environment.

    $MLX_XFORMER_TORCH_PYTHON tests/golden/make_htdemucs_names.py
"""

import hashlib
import json
import math
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

FOUR = ["drums", "bass", "other", "vocals"]
COMMON = {"segment": Fraction(39, 5), "dconv_mode": 3, "t_dropout": 0.02, "t_sparse_attn_window": 400}
OFFICIAL = {
    "htdemucs": {"sources": FOUR, "bottom_channels": 512, **COMMON},
    "htdemucs_6s": {"sources": [*FOUR, "guitar", "piano"], "bottom_channels": 0, **COMMON},
}


def digest(shapes: dict[str, tuple[int, ...]]) -> dict:
    """Counts, and the SHA-256 of the sorted lines "name 1x2x3"."""
    lines = sorted(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
    return {
        "tensors": len(shapes),
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
    }


def main() -> None:
    from demucs.htdemucs import HTDemucs

    content: dict = {"versions": {name: version(name) for name in ("torch", "demucs")}, "models": {}}
    for name, options in OFFICIAL.items():
        state = HTDemucs(**options).state_dict()
        plain = {k: str(v) if isinstance(v, Fraction) else v for k, v in options.items()}
        content["models"][name] = {"config": plain, **digest({k: tuple(v.shape) for k, v in state.items()})}
    path = Path(__file__).with_name("htdemucs_names.json")
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
