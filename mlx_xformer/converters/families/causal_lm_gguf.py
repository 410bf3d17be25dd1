"""Language models in GGUF files: Llama, Qwen2 and Qwen3, under llama.cpp's names.

Sources: the GGUF specification (keys); llama.cpp, convert_hf_to_gguf.py (names, order of rows).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from ...models.causal_lm.model import CausalLMConfig, Quantization
from ...storage.messages import shorten
from ..converter import Original
from ..layouts import Pairs
from ..rules import Rule
from ..stored import Tensors
from .causal_lm import CONVERTER as CAUSAL_LM

_GROUP = 32  # what MLX makes of every block of GGUF
_ROWS = "{leaf:weight|scales|biases}"
_BIASED = "{leaf:weight|scales|biases|bias}"
_BLOCK, _LAYER = "blk.{i}.", "model.layers.{i}."
_KEYS = {  # below the architecture's name
    "embedding_length": "embed_dim",
    "block_count": "num_layers",
    "feed_forward_length": "hidden_dim",
    "attention.head_count": "num_heads",
    "attention.head_count_kv": "num_kv_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "rope.freq_base": "rope_theta",
}
_ALSO = {"context_length", "vocab_size", "rope.dimension_count", "attention.value_length", "rope.scaling.type"}
_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"attention_bias": ("q", "k", "v")},
    "qwen3": {"qk_norm": True},
}


def rules(config: CausalLMConfig, names: Collection[str] = ()) -> list[Rule]:
    """The table from GGUF's names. A Llama's queries and keys have the rows of each head as neighbouring pairs."""
    assert config.num_kv_heads is not None  # for the type checker: it has been set
    llama = not config.attention_bias and not config.qk_norm  # see _ARCHITECTURES
    queries, keys = (((Pairs(count),) if llama else ()) for count in (config.num_heads, config.num_kv_heads))
    attention = _LAYER + "self_attn."
    return [
        Rule("token_embd." + _ROWS, "model.embed_tokens." + _ROWS),
        Rule("output." + _ROWS, "lm_head." + _ROWS),
        Rule("output_norm.weight", "model.norm.weight"),
        Rule(_BLOCK + "attn_q." + _BIASED, attention + "q_proj." + _BIASED, queries),
        Rule(_BLOCK + "attn_k." + _BIASED, attention + "k_proj." + _BIASED, keys),
        Rule(_BLOCK + "attn_v." + _BIASED, attention + "v_proj." + _BIASED),
        Rule(_BLOCK + "attn_output." + _ROWS, attention + "out_proj." + _ROWS),
        Rule(_BLOCK + "attn_q_norm.weight", attention + "q_norm.weight"),
        Rule(_BLOCK + "attn_k_norm.weight", attention + "k_norm.weight"),
        Rule(_BLOCK + "attn_norm.weight", _LAYER + "input_layernorm.weight"),
        Rule(_BLOCK + "ffn_norm.weight", _LAYER + "post_attention_layernorm.weight"),
        *(Rule(f"{_BLOCK}ffn_{part}.{_ROWS}", f"{_LAYER}mlp.{part}_proj.{_ROWS}") for part in ("gate", "up", "down")),
    ]


def config(values: Mapping[str, Any], tensors: Tensors) -> CausalLMConfig:
    """The configuration that a file's metadata and tensors mean. ValueError names what is not understood."""
    architecture = values.get("general.architecture")
    if experts := values.get(f"{architecture}.expert_count"):
        raise ValueError(
            f"{shorten(architecture)}.expert_count must be absent, got {shorten(experts)}: "
            "mixtures of experts are read from Hugging Face's folders only"
        )
    if architecture not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise ValueError(f"general.architecture must be one of {known}, got {shorten(architecture)}")
    own = {key.removeprefix(architecture + "."): x for key, x in values.items() if key.startswith(architecture + ".")}
    if unknown := sorted(own.keys() - _KEYS.keys() - _ALSO):
        raise ValueError(f"the metadata has keys that are not handled: {shorten(', '.join(unknown))}")
    if missing := sorted(
        {"embedding_length", "block_count", "feed_forward_length", "attention.head_count"} - own.keys()
    ):
        raise ValueError(f"the metadata must have {', '.join(missing)}")
    if own.get("rope.scaling.type", "none") != "none":
        raise ValueError(f"rope.scaling.type must be none, got {shorten(own['rope.scaling.type'])}")
    if "token_embd.weight" not in tensors:
        raise ValueError("there is no token_embd.weight")
    made = CausalLMConfig(
        vocab_size=tensors["token_embd.weight"].shape[0],
        tie_embeddings="output.weight" not in tensors,
        dtype="float32",  # scales are float16, norms float32
        quantization=_quantization(tensors),
        **_ARCHITECTURES[architecture],
        **{ours: own[theirs] for theirs, ours in _KEYS.items() if theirs in own},
    )
    for key in ("rope.dimension_count", "attention.value_length"):
        if own.get(key, made.head_dim) != made.head_dim:
            raise ValueError(f"{key} must be the width of a head, {made.head_dim}, got {own[key]}")
    return made


def _matrix_names() -> dict[str, str]:
    """The beginning of every matrix's name in GGUF, with {i} for the layer's number, and of its name here."""
    pairs = [(rule.sources[0], rule.targets[0]) for rule in rules(CausalLMConfig(1, 2, 1, 1, 1))]
    return {a.rpartition(".")[0]: b.rpartition(".")[0] for a, b in pairs if "{leaf:" in a}


def _quantization(tensors: Tensors) -> Quantization | None:
    """How most matrices are packed, and which are packed otherwise or not at all."""
    names = _matrix_names()
    packed: dict[str, tuple[int, int] | None] = {}
    for name, weight in tensors.items():
        layer, _, leaf = name.rpartition(".")
        number = layer.split(".")[1] if layer.startswith("blk.") else ""
        ours = names.get(layer.replace(f"blk.{number}.", "blk.{i}.", 1) if number else layer)
        if leaf != "weight" or ours is None:
            continue
        scales = tensors.get(f"{layer}.scales")
        bits = None if scales is None else weight.shape[1] * 32 // (scales.shape[1] * _GROUP)
        packed[ours.replace("{i}", number)] = None if bits is None else (bits, _GROUP)
    counts = Counter(pair for pair in packed.values() if pair is not None)
    if not counts:
        return None
    most = counts.most_common(1)[0][0]
    return Quantization(*most, {name: pair for name, pair in sorted(packed.items()) if pair != most})


def _record_nothing(config: CausalLMConfig, original: Original) -> None:
    """A checkpoint leads back to Hugging Face's layout, whose config.json is made from the configuration."""


CONVERTER = dataclasses.replace(CAUSAL_LM, config=config, rules=rules, model_types=(), record=_record_nothing)
