"""T5: rules from Hugging Face's names, and the configuration from a config.json of theirs, or from shapes.

Source: transformers 5.23 (models/t5: names, defaults, which tensors are one). T5 1.0 has `wi`, T5 1.1 and FLAN-T5 have
`wi_0` and `wi_1`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import mlx.core as mx

from ...models.t5 import T5Config
from ...storage.messages import shorten
from ..converter import Converter
from ..formats import config_keys
from ..rules import Rule
from ..stored import Tensors, read_array

_TABLES = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_HEAD = "lm_head.weight"
_RELATIVE = "{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
_QUERY = "encoder.block.0.layer.0.SelfAttention.q.weight"
_CROSS = "decoder.block.0.layer.1.EncDecAttention.q.weight"
# Hugging Face's key -> ours, and what it means where it is absent, in transformers 5.23.
_SAME: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 32128),
    "d_model": ("embed_dim", 512),
    "num_layers": ("num_layers", 6),
    "num_decoder_layers": ("num_decoder_layers", None),
    "num_heads": ("num_heads", 8),
    "d_kv": ("head_dim", 64),
    "d_ff": ("hidden_dim", 2048),
    "relative_attention_num_buckets": ("num_buckets", 32),
    "relative_attention_max_distance": ("max_distance", 128),
    "layer_norm_epsilon": ("norm_eps", 1e-6),
    "dropout_rate": ("dropout", 0.1),
}
_KNOWN = {
    *(*_SAME, "feed_forward_proj", "dense_act_fn", "is_gated_act", "tie_word_embeddings", "scale_decoder_outputs"),
    *("decoder_start_token_id", "pad_token_id", "initializer_factor", "output_past"),
}
_ONLY: dict[str, tuple[Any, ...]] = {
    **config_keys.ONLY,
    "is_encoder_decoder": (True,),
    **dict.fromkeys(("is_decoder", "add_cross_attention", "tie_encoder_decoder"), (False,)),
}
_SETTINGS = ("activation", "max_distance", "norm_eps", "scale_logits", "start_token")


def detect(tensors: Tensors) -> str | None:
    """Why tensors are T5's; None if they are not."""
    return f"it has {_QUERY} and {_CROSS}" if _QUERY in tensors and _CROSS in tensors else None


def config(values: Mapping[str, Any], tensors: Tensors) -> T5Config:
    """The configuration that a config.json, or the settings given, and the tensors mean.

    The head is tied where there is none, or where it equals the table of embeddings.
    """
    table = _table(tensors)
    tied = _HEAD not in tensors or (table in tensors and _one(tensors, _HEAD, table))
    for name in _TABLES:
        if name in tensors and not _one(tensors, name, table):
            raise ValueError(f"{name} must be {table}, got other numbers")
    if "model_type" not in values:
        given = config_keys.check_settings(values, _SETTINGS, ["activation"])
        return T5Config(**{"scale_logits": tied, **_by_shape(tensors), **given}, tie_embeddings=tied)
    config_keys.check_keys(values, _KNOWN, _ONLY)
    given = {ours: values.get(theirs, default) for theirs, (ours, default) in _SAME.items()}
    scaled = values.get("scale_decoder_outputs", values.get("tie_word_embeddings") is not False)
    start = values.get("decoder_start_token_id", values.get("pad_token_id", 0))
    given |= {"scale_logits": scaled, "tie_embeddings": tied, "start_token": 0 if start is None else start}
    return T5Config(**given, **_network(values))


def _one(tensors: Tensors, name: str, other: str) -> bool:
    """Whether two tensors hold the same numbers."""
    a, b = tensors[name], tensors[other]
    return name == other or (a.shape == b.shape and mx.array_equal(read_array(a), read_array(b)).item() is True)


def _network(values: Mapping[str, Any]) -> dict[str, Any]:
    """activation and gated. "gated-gelu" means the tanh form, whatever its name."""
    proj = values.get("feed_forward_proj", "relu")
    gate, dash, word = proj.partition("-") if isinstance(proj, str) else ("", "-", "")
    if dash and gate != "gated":
        raise ValueError(f"feed_forward_proj must be an activation, or gated- and one, got {shorten(proj)}")
    word = gate if not dash else "gelu_new" if word == "gelu" else word
    for key, meant in (("is_gated_act", bool(dash)), ("dense_act_fn", word)):
        if values.get(key, meant) != meant:
            raise ValueError(f"{key} must be {meant} with feed_forward_proj {proj}, got {shorten(values[key])}")
    return {"activation": config_keys.read_activation("feed_forward_proj", word), "gated": bool(dash)}


def _by_shape(tensors: Tensors) -> dict[str, Any]:
    """The sizes, from the shapes of tensors."""
    relative = _RELATIVE.format(side="encoder")
    heads = config_keys.read_size(tensors, relative, 1)
    gated = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in tensors
    inside = f"encoder.block.0.layer.1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight"
    return {
        "vocab_size": config_keys.read_size(tensors, _table(tensors), 0),
        "embed_dim": config_keys.read_size(tensors, _table(tensors), 1),
        "num_layers": _layers(tensors, "encoder"),
        "num_decoder_layers": _layers(tensors, "decoder"),
        "num_heads": heads,
        "head_dim": config_keys.read_size(tensors, _QUERY, 0) // max(heads, 1),
        "hidden_dim": config_keys.read_size(tensors, inside, 0),
        "gated": gated,
        "num_buckets": config_keys.read_size(tensors, relative, 0),
    }


def _layers(names: Iterable[str], side: str) -> int:
    return 1 + max((int(m[1]) for name in names if (m := re.match(rf"{side}\.block\.(\d+)\.", name))), default=-1)


def _table(names: Collection[str]) -> str:
    """The name under which the table of embeddings is there: it may stand there three times."""
    return next((name for name in _TABLES if name in names), _TABLES[0])


def rules(config: T5Config, names: Collection[str] = ()) -> list[Rule]:
    """The table from Hugging Face's names. What is the table of embeddings again is dropped."""
    table = _table(names)
    table_rules = [Rule(name, _TABLES[0] if name == table else None) for name in _TABLES]
    return [
        *table_rules,
        Rule(_HEAD, None if config.tie_embeddings else _HEAD),
        Rule("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight", None),  # never used
        *_side("encoder", config.gated, cross=False),
        *_side("decoder", config.gated, cross=True),
    ]


def _side(side: str, gated: bool, *, cross: bool) -> list[Rule]:
    layer, ours = side + ".block.{i}.layer.", side + ".stack.layers.{i}."
    last = 2 if cross else 1
    network = {"wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"} if gated else _PLAIN
    letters = (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "out_proj"))
    steps = [("0.SelfAttention", "self_attn"), *([("1.EncDecAttention", "cross_attn")] if cross else [])]
    norms = [("0", "norm1"), *([("1", "norm2")] if cross else []), (str(last), "norm3")]
    return [
        Rule(_RELATIVE.format(side=side), side + ".relative.weight"),
        *(Rule(f"{layer}{step}.{a}.weight", f"{ours}{own}.{b}.weight") for step, own in steps for a, b in letters),
        *(Rule(f"{layer}{n}.layer_norm.weight", f"{ours}{own}.weight") for n, own in norms),
        *(Rule(f"{layer}{last}.DenseReluDense.{a}.weight", f"{ours}mlp.{b}.weight") for a, b in network.items()),
        Rule(side + ".final_layer_norm.weight", side + ".stack.norm.weight"),
    ]


_PLAIN = {"wi": "linear1", "wo": "linear2"}


def original(config: T5Config) -> dict[str, Any]:
    """A config.json that means the configuration."""
    own = dataclasses.asdict(config)
    word = config_keys.name_activation(config.activation)
    proj = ("gated-gelu" if word == "gelu_new" else f"gated-{word}") if config.gated else word
    return {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        **{theirs: own[ours] for theirs, (ours, _) in _SAME.items()},
        "feed_forward_proj": proj,
        "tie_word_embeddings": config.tie_embeddings,
        "scale_decoder_outputs": config.scale_logits,
        "decoder_start_token_id": config.start_token,
        "is_encoder_decoder": True,
    }


CONVERTERS = (Converter("t5", "t5", config, rules, original, detect=detect, model_types=("t5",)),)
