"""GGUF files, as far as MLX reads them: Llama, Qwen2 and Qwen3 in floats, Q4_0, Q4_1 or Q8_0, which stay packed.

Sources: the GGUF specification (keys); llama.cpp, convert_hf_to_gguf.py (names, order of rows) and llama-vocab.cpp (how
text is split before merges).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from ...models.causal_lm.model import CausalLMConfig, Quantization
from ..layouts import Pairs
from ..rules import Rule
from .gguf_tokenizer import extras_of
from .hugging_face import Original
from .source import Stored
from .torch_pickle import short

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


def find(path: Path) -> Path | None:
    """The GGUF file that a path names: itself, or the only one in a folder without a config.json."""
    if path.is_dir() and not (path / "config.json").exists():
        found = sorted(path.glob("*.gguf"))
        return found[0] if len(found) == 1 else None
    return path if path.suffix == ".gguf" and path.is_file() else None


def rules(config: CausalLMConfig, architecture: str) -> list[Rule]:
    """The table from GGUF's names. A llama's queries and keys have the rows of each head as neighbouring pairs."""
    assert config.num_kv_heads is not None  # for the type checker: it has been set
    turned = architecture == "llama"
    queries, keys = (((Pairs(count),) if turned else ()) for count in (config.num_heads, config.num_kv_heads))
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


def read(path: Path) -> Original:
    """What a file holds. ValueError, in one line, begins with the path."""
    try:
        tensors, raw = cast(Any, mx.load(str(path), return_metadata=True))
    except RuntimeError as error:
        raise ValueError(f"{path}: MLX cannot read it ({short(' '.join(str(error).split()))})") from None
    metadata = {key: _plain(value) for key, value in raw.items()}
    try:
        architecture = metadata.get("general.architecture")
        if experts := metadata.get(f"{architecture}.expert_count"):
            raise ValueError(
                f"{short(str(architecture))}.expert_count must be absent, got {short(str(experts))}: "
                "mixtures of experts are read from Hugging Face's folders only"
            )
        if architecture not in _ARCHITECTURES:
            known = ", ".join(_ARCHITECTURES)
            raise ValueError(f"general.architecture must be one of {known}, got {short(str(architecture))}")
        config = _config(metadata, architecture, tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    stored = {name: Stored(x.dtype, x.shape, _held(x)) for name, x in tensors.items()}
    extras, warnings = extras_of(metadata)
    return Original(path.stem, config, rules(config, architecture), stored, (path,), extras, None, warnings)


def _held(x: mx.array) -> Callable[[], mx.array]:
    return lambda: x


def _plain(value: Any) -> Any:
    """A scalar as a number, float32 by its shortest decimals; anything else as it is."""
    if not isinstance(value, mx.array) or value.size != 1:
        return value
    return float(str(np.float32(cast(float, value.item())))) if value.dtype == mx.float32 else value.item()


def _config(metadata: Mapping[str, Any], architecture: str, tensors: Mapping[str, mx.array]) -> CausalLMConfig:
    own = {key.removeprefix(architecture + "."): x for key, x in metadata.items() if key.startswith(architecture + ".")}
    if unknown := sorted(own.keys() - _KEYS.keys() - _ALSO):
        raise ValueError(f"the metadata has keys that are not handled: {short(', '.join(unknown))}")
    if missing := sorted(
        {"embedding_length", "block_count", "feed_forward_length", "attention.head_count"} - own.keys()
    ):
        raise ValueError(f"the metadata must have {', '.join(missing)}")
    if own.get("rope.scaling.type", "none") != "none":
        raise ValueError(f"rope.scaling.type must be none, got {short(str(own['rope.scaling.type']))}")
    if "token_embd.weight" not in tensors:
        raise ValueError("there is no token_embd.weight")
    config = CausalLMConfig(
        vocab_size=tensors["token_embd.weight"].shape[0],
        tie_embeddings="output.weight" not in tensors,
        dtype="float32",  # scales are float16, norms float32
        quantization=_quantization(tensors, _ours(architecture)),
        **_ARCHITECTURES[architecture],
        **{ours: own[theirs] for theirs, ours in _KEYS.items() if theirs in own},
    )
    for key in ("rope.dimension_count", "attention.value_length"):
        if own.get(key, config.head_dim) != config.head_dim:
            raise ValueError(f"{key} must be the width of a head, {config.head_dim}, got {own[key]}")
    return config


def _ours(architecture: str) -> list[tuple[str, str]]:
    """(beginning of GGUF's name, of ours) of the matrices, numbers left out."""
    blank = CausalLMConfig(1, 2, 1, 1, 1)
    pairs = [(rule.sources[0], rule.targets[0]) for rule in rules(blank, architecture)]
    return [(a.rpartition(".")[0], b.rpartition(".")[0]) for a, b in pairs if "{leaf:" in a]


def _quantization(tensors: Mapping[str, mx.array], names: list[tuple[str, str]]) -> Quantization | None:
    """How most matrices are packed, and which are not so."""
    packed: dict[str, tuple[int, int] | None] = {}
    for name, weight in tensors.items():
        layer, _, leaf = name.rpartition(".")
        number = layer.split(".")[1] if layer.startswith("blk.") else ""
        ours = dict(names).get(layer.replace(f"blk.{number}.", "blk.{i}.", 1) if number else layer)
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
