"""BERT: rules from Hugging Face's names, and the configuration from a config.json of theirs, or from shapes.

Source: transformers 5.23 (models/bert: names, defaults). Tensors may be those of a BertModel or of a model around one,
under `bert.`, whose head for masked words and for next sentences is dropped on purpose; norms of old files are gamma
and beta.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ...models.bert import BertConfig
from ..converter import Converter
from ..formats import config_keys
from ..rules import Rule
from ..stored import Tensors

_PREFIX = "bert."
_LEAF = "{leaf:weight|bias}"
_WORDS = "embeddings.word_embeddings.weight"
_QUERY = "encoder.layer.0.attention.self.query.weight"
# Hugging Face's key -> ours, and what it means where it is absent, in transformers 5.23.
_SAME: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 30522),
    "hidden_size": ("embed_dim", 768),
    "num_hidden_layers": ("num_layers", 12),
    "num_attention_heads": ("num_heads", 12),
    "intermediate_size": ("hidden_dim", 3072),
    "max_position_embeddings": ("max_positions", 512),
    "type_vocab_size": ("num_token_types", 2),
    "layer_norm_eps": ("norm_eps", 1e-12),
}
_KNOWN = {*_SAME, "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "tie_word_embeddings"}
_ONLY: dict[str, tuple[Any, ...]] = {
    **config_keys.ONLY,
    "position_embedding_type": ("absolute", None),
    **dict.fromkeys(("is_decoder", "add_cross_attention", "is_encoder_decoder", "tie_encoder_decoder"), (False,)),
}
_SETTINGS = ("num_heads", "activation", "norm_eps")
# Heads of pretraining, which an encoder does not have.
_HEADS = (
    "cls.predictions.bias",
    "cls.predictions.decoder." + _LEAF,
    "cls.predictions.transform.dense." + _LEAF,
    "cls.predictions.transform.LayerNorm.{leaf:weight|bias|gamma|beta}",
    "cls.seq_relationship." + _LEAF,
)


def _prefix(names: Collection[str]) -> str:
    return _PREFIX if _PREFIX + _WORDS in names else ""


def detect(tensors: Tensors) -> str | None:
    """Why tensors are BERT's; None if they are not."""
    start = _prefix(tensors)
    if start + _WORDS in tensors and start + _QUERY in tensors:
        return f"it has {start}{_WORDS} and {start}{_QUERY}"
    return None


def config(values: Mapping[str, Any], tensors: Tensors) -> BertConfig:
    """The configuration that a config.json, or the settings given, and the shapes mean."""
    start = _prefix(tensors)
    pooler = f"{start}pooler.dense.weight" in tensors
    if "model_type" not in values:
        return BertConfig(
            **_by_shape(tensors, start), **config_keys.check_settings(values, _SETTINGS, ["num_heads"]), pooler=pooler
        )
    config_keys.check_keys(values, _KNOWN, _ONLY)
    given = {ours: values.get(theirs, default) for theirs, (ours, default) in _SAME.items()}
    return BertConfig(
        **given, activation=config_keys.read_activation("hidden_act", values.get("hidden_act", "gelu")), pooler=pooler
    )


def _by_shape(tensors: Tensors, start: str) -> dict[str, Any]:
    """The sizes, from the shapes of tensors."""
    layers = {int(m[1]) for name in tensors if (m := re.match(re.escape(start) + r"encoder\.layer\.(\d+)\.", name))}
    table = start + "embeddings.{}_embeddings.weight"
    return {
        "vocab_size": config_keys.read_size(tensors, start + _WORDS, 0),
        "embed_dim": config_keys.read_size(tensors, start + _WORDS, 1),
        "num_layers": max(layers, default=-1) + 1,
        "hidden_dim": config_keys.read_size(tensors, start + "encoder.layer.0.intermediate.dense.weight", 0),
        "max_positions": config_keys.read_size(tensors, table.format("position"), 0),
        "num_token_types": config_keys.read_size(tensors, table.format("token_type"), 0),
    }


def rules(config: BertConfig, names: Collection[str] = ()) -> list[Rule]:
    """The table from Hugging Face's names."""
    start = _prefix(names)
    layer, ours = start + "encoder.layer.{i}.", "encoder.layers.{i}."
    return [
        *(
            Rule(f"{start}embeddings.{kind}_embeddings.weight", f"embeddings.{kind}_embeddings.weight")
            for kind in ("word", "position", "token_type")
        ),
        *(Rule(f"{start}embeddings.{buffer}_ids", None) for buffer in ("position", "token_type")),
        *_norm(names, start + "embeddings.LayerNorm", "embeddings.norm"),
        *(
            Rule(f"{layer}attention.self.{theirs}.{_LEAF}", f"{ours}self_attn.{letter}_proj.{_LEAF}")
            for theirs, letter in (("query", "q"), ("key", "k"), ("value", "v"))
        ),
        Rule(layer + "attention.output.dense." + _LEAF, ours + "self_attn.out_proj." + _LEAF),
        *_norm(names, layer + "attention.output.LayerNorm", ours + "norm1"),
        Rule(layer + "intermediate.dense." + _LEAF, ours + "mlp.linear1." + _LEAF),
        Rule(layer + "output.dense." + _LEAF, ours + "mlp.linear2." + _LEAF),
        *_norm(names, layer + "output.LayerNorm", ours + "norm3"),
        Rule(start + "pooler.dense." + _LEAF, "pooler." + _LEAF),
        *(Rule(head, None) for head in _HEADS),
    ]


def _norm(names: Iterable[str], theirs: str, ours: str) -> list[Rule]:
    """The rules of a norm, whose tensors have other names in old files."""
    old = any(name.endswith("LayerNorm.gamma") and not name.startswith("cls.") for name in names)
    leaves = (("gamma", "weight"), ("beta", "bias")) if old else (("weight", "weight"), ("bias", "bias"))
    return [Rule(f"{theirs}.{a}", f"{ours}.{b}") for a, b in leaves]


def original(config: BertConfig) -> dict[str, Any]:
    """A config.json that means the configuration."""
    own = dataclasses.asdict(config)
    same = {theirs: own[ours] for theirs, (ours, _) in _SAME.items()}
    return {
        "model_type": "bert",
        "architectures": ["BertModel"],
        **same,
        "hidden_act": config_keys.name_activation(config.activation),
    }


CONVERTERS = (Converter("bert", "bert", config, rules, original, detect=detect, model_types=("bert",)),)
