"""Compares generation with mlx-lm on a random Llama.

    python bench/run.py --language [--cases prefill,decode] [--rounds N] [--threads N]

mlx-lm is installed into an environment of its own under .bench/ on the first run.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
from environments import find_python
from harness import Case, Settings, finish, measure
from safetensors.numpy import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 1536,
    "vocab_size": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "float32",
}
PROMPT, DECODED = 512, 128
COUNTS = {"prefill": PROMPT, "decode": DECODED}  # tokens of a part


def weights() -> dict[str, np.ndarray]:
    """32.5 million parameters, matrices of about unit gain."""
    rng = np.random.default_rng(0)

    def matrix(out: int, into: int) -> np.ndarray:
        return (rng.standard_normal((out, into)) * into**-0.5).astype(np.float32)

    E, hidden, vocabulary = 512, 1536, 8192
    found = {"model.embed_tokens.weight": matrix(vocabulary, E) * 8, "lm_head.weight": matrix(vocabulary, E)}
    shapes = {
        "self_attn.q_proj": (E, E),
        "self_attn.k_proj": (E // 4, E),
        "self_attn.v_proj": (E // 4, E),
        "self_attn.o_proj": (E, E),
        "mlp.gate_proj": (hidden, E),
        "mlp.up_proj": (hidden, E),
        "mlp.down_proj": (E, hidden),
    }
    norms = ["model.norm.weight"]
    for layer in range(8):
        for name, shape in shapes.items():
            found[f"model.layers.{layer}.{name}.weight"] = matrix(*shape)
        norms += [f"model.layers.{layer}.{name}_layernorm.weight" for name in ("input", "post_attention")]
    return found | {name: rng.uniform(0.7, 1.3, E).astype(np.float32) for name in norms}


def write_llama(folder: Path) -> None:
    """Writes the model in Hugging Face's layout."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights(), folder / "model.safetensors", {"format": "pt"})


def prepare(folder: Path) -> None:
    """Writes the model in Hugging Face's layout, ours in both precisions, and the prompt."""
    from mlx_xformer import convert

    original = folder / "float32"
    write_llama(original)
    convert(original, folder / "ours-float32")
    convert(original, folder / "ours-4-bit", quantize=4)
    np.save(folder / "prompt.npy", np.random.default_rng(1).integers(0, 8192, PROMPT))


def run(settings: Settings) -> None:
    """Measures the chosen parts, each beside mlx-lm."""
    python = find_python("mlx-lm")
    parts = {
        f"{part}, {dtype}": (part, f"{part}_{dtype.replace('-', '_')}")
        for dtype in ("float32", "4-bit")
        for part in COUNTS
    }
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        for title, (part, suffix) in settings.choose(parts).items():
            print(f"{title}:")
            cases = [
                Case(f"{title}, mlx-lm", "language", f"peer_{suffix}", python, checkout=None),
                Case(f"{title}, ours", "language", f"ours_{suffix}"),
            ]
            found += [record | {"tokens": COUNTS[part]} for record in measure(cases, folder, settings)]
            if part == "decode":
                same = [np.load(folder / f"{side}_{suffix}.npy") for side in ("peer", "ours")]
                print(f"  equal tokens: {int((same[0] == same[1]).cumprod().sum())} of {DECODED}")
    finish("language", found, settings)
