"""Small decoders of every architecture, and folders of Hugging Face that hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mlx_xformer.converters.families import causal_lm as names
from mlx_xformer.converters.rules import inverse_shapes
from mlx_xformer.models.causal_lm.model import CausalLMConfig
from mlx_xformer.models.families import parameter_shapes
from mlx_xformer.nn.moe.layer import MoEConfig
from mlx_xformer.nn.positions import RotaryScaling

SIZES = {"vocab_size": 31, "embed_dim": 23, "num_layers": 2, "num_heads": 6, "hidden_dim": 29, "head_dim": 10}
_GEMMA = {
    "norm_plus_one": True,
    "sandwich_norms": True,
    "activation": "gelu_tanh",
    "embed_scale": 23**0.5,
    "attention_scale": 17**-0.5,
    "tie_embeddings": True,
    "window": 3,
    "layer_types": ("local", "global"),
}
_MIXTRAL = {"renormalize": True, "alpha": 0.02}
_QWEN_MOE = {"renormalize": False, "alpha": 0.003}
_SHARED = {"shared_dim": 17, "shared_gate": True}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"num_kv_heads": 2},
    "llama, biases everywhere": {"attention_bias": ("q", "k", "v", "out"), "mlp_bias": True},
    "llama 3.1": {"num_kv_heads": 1, "rope_scaling": RotaryScaling("llama3", 8.0, 97), "rope_theta": 5e4},
    "linear": {"num_kv_heads": 3, "rope_scaling": RotaryScaling("linear", 4.0)},
    "mistral": {"num_kv_heads": 2, "window": 3},
    "qwen2": {"num_kv_heads": 2, "attention_bias": ("q", "k", "v"), "tie_embeddings": True},
    "qwen2, yarn": {
        "num_kv_heads": 2,
        "attention_bias": ("q", "k", "v"),
        "window": 4,
        "layer_types": ("global", "local"),
        "rope_scaling": RotaryScaling("yarn", 4.0, 53, 1.0, 32.0, 1.13862),
    },
    "qwen3": {"num_kv_heads": 2, "qk_norm": True, "norm_eps": 1e-5},
    "mixtral": {"num_kv_heads": 2, "moe": {"hidden_dim": 29, "num_experts": 5, "num_experts_per_tok": 2, **_MIXTRAL}},
    "qwen2 moe": {
        "num_kv_heads": 2,
        "attention_bias": ("q", "k", "v"),
        "num_layers": 3,
        "moe": {"hidden_dim": 13, "num_experts": 7, "num_experts_per_tok": 3, **_QWEN_MOE, **_SHARED},
        "dense_layers": (1,),
    },
    "qwen3 moe": {
        "num_kv_heads": 2,
        "qk_norm": True,
        "moe": {"hidden_dim": 13, "num_experts": 3, "num_experts_per_tok": 2, **_MIXTRAL},
    },
    "olmoe": {
        "embed_dim": 24,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 6,
        "qk_norm": "whole",
        "moe": {"hidden_dim": 29, "num_experts": 5, "num_experts_per_tok": 3, **_QWEN_MOE},
    },
    "gemma 2": {**_GEMMA, "num_kv_heads": 3, "attention_softcap": 1.3, "logit_softcap": 0.7},
    "gemma 3": {**_GEMMA, "num_kv_heads": 1, "qk_norm": True, "rope_theta": 1e6, "local_rope_theta": 77.0},
}


def config(name: str, **changes: Any) -> CausalLMConfig:
    """A small decoder of an architecture."""
    values = {**SIZES, **ARCHITECTURES[name], **changes}
    if "moe" in values:
        values["moe"] = MoEConfig(values["embed_dim"], **values["moe"])
    if "embed_scale" in values:
        values["embed_scale"] = values["embed_dim"] ** 0.5
    return CausalLMConfig(**values)


def state_of(own: CausalLMConfig, seed: int = 0, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Random tensors under Hugging Face's names."""
    rng = np.random.default_rng(seed)
    shapes = inverse_shapes(names.rules(own), parameter_shapes("causal_lm", own.to_dict()))
    return {
        name: (rng.normal(size=s) * s[1] ** -0.5 if len(s) > 1 else rng.uniform(0.7, 1.3, s)).astype(dtype)
        for name, s in shapes.items()
    }


def write_folder(
    path: Path,
    own: CausalLMConfig,
    *,
    seed: int = 0,
    shards: int = 1,
    dtype: Any = np.float32,
    **values: Any,
) -> dict[str, np.ndarray]:
    """A folder of Hugging Face with random tensors, which are returned; `values` go into its config.json."""
    path.mkdir(parents=True, exist_ok=True)
    state = state_of(own, seed, dtype)
    content = {"architectures": ["X"], "eos_token_id": 2, "bos_token_id": 1, **names.original(own), **values}
    (path / "config.json").write_text(json.dumps(content))
    if shards == 1:
        save_file(state, path / "model.safetensors", {"format": "pt"})
        return state
    where = {}
    for n in range(shards):
        file = f"model-{n + 1:05}-of-{shards:05}.safetensors"
        part = {name: state[name] for name in sorted(state)[n::shards]}
        save_file(part, path / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return state
