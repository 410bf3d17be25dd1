"""Compares generation with mlx-lm on a random Llama.

    python bench/run.py --language [--cases prefill,decode] [--rounds N] [--threads N]

mlx-lm is installed into an environment of its own under .bench/ on the first run.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from peers import environment
from run import Case, finish, measure, records
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


def prepare(folder: Path) -> None:
    """Writes the model in Hugging Face's layout, ours in both precisions, and the prompt."""
    from mlx_xformer.converters.conversion import convert

    original = folder / "float32"
    original.mkdir()
    (original / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights(), original / "model.safetensors", {"format": "pt"})
    convert(original, folder / "ours-float32")
    convert(original, folder / "ours-4-bit", quantize=4)
    np.save(folder / "prompt.npy", np.random.default_rng(1).integers(0, 8192, PROMPT))


def compare(wanted: Sequence[str], rounds: int, threads: int, patience: float) -> None:
    """Measures the parts whose names hold one of the words `wanted`, each beside mlx-lm."""
    python = environment("mlx-lm")
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        for dtype in ("float32", "4-bit"):
            for part, count in (("prefill", PROMPT), ("decode", DECODED)):
                title, suffix = f"{part}, {dtype}", f"{part}_{dtype.replace('-', '_')}"
                if not any(word in title for word in wanted):
                    continue
                print(f"{title}:")
                cases = [
                    Case(f"{title}, mlx-lm", "cases/language.py", f"peer_{suffix}", python),
                    Case(f"{title}, ours", "cases/language.py", f"ours_{suffix}"),
                ]
                found += [
                    r | {"tokens": count}
                    for r in records(measure(cases, folder, rounds, threads, patience), cases[0].name)
                ]
                if part == "decode":
                    same = [np.load(folder / f"{side}_{suffix}.npy") for side in ("peer", "ours")]
                    print(f"  equal tokens: {int((same[0] == same[1]).cumprod().sum())} of {DECODED}")
    finish("language", found, wanted)
