"""Whisper: rules from the names of Hugging Face and of CTranslate2, and the configuration from either.

Sources: transformers 5.23, models/whisper; CTranslate2 4, python/ctranslate2/specs/whisper_spec.py, whose projections
of one input are one, with zeros where keys have no bias.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import mlx.core as mx

from ...models.whisper import WhisperConfig
from ...storage.messages import shorten
from ..converter import Converter
from ..formats import config_keys
from ..layouts import Permute, ZeroPart
from ..rules import Rule
from ..stored import Tensors, read_array

# The tensors whose shapes give the sizes: table, first convolution, positions of both sides, inside a layer's network.
_SIZES = {
    "hugging face": (
        "model.decoder.embed_tokens.weight",
        "model.encoder.conv1.weight",
        "model.encoder.embed_positions.weight",
        "model.decoder.embed_positions.weight",
        "model.{side}.layers.{i}.fc1.weight",
    ),
    "ctranslate2": (
        "decoder/embeddings/weight",
        "encoder/conv1/weight",
        "encoder/position_encodings/encodings",
        "decoder/position_encodings/encodings",
        "{side}/layer_{i}/ffn/linear_0/weight",
    ),
}
_WORDS = {"hugging face": "transformers'", "ctranslate2": "CTranslate2's"}
_HEADS = {"hugging face": "proj_out.weight", "ctranslate2": "decoder/projection/weight"}
_CONVOLUTION = (Permute((0, 2, 1)),)

# Keys of config.json -> ours; what they mean that are absent, in transformers 5.23.
_SAME = {
    "vocab_size": "vocab_size",
    "d_model": "embed_dim",
    "encoder_attention_heads": "num_heads",
    "encoder_ffn_dim": "hidden_dim",
    "encoder_layers": "encoder_layers",
    "decoder_layers": "decoder_layers",
    "num_mel_bins": "mel_bins",
    "max_source_positions": "source_positions",
    "max_target_positions": "target_positions",
}
ABSENT: dict[str, Any] = {
    **{"vocab_size": 51865, "d_model": 384, "num_mel_bins": 80, "encoder_layers": 4, "decoder_layers": 4},
    **{"encoder_attention_heads": 6, "decoder_attention_heads": 6, "encoder_ffn_dim": 1536, "decoder_ffn_dim": 1536},
    **{"max_source_positions": 1500, "max_target_positions": 448, "activation_function": "gelu"},
    **{"scale_embedding": False, "tie_word_embeddings": True, "is_encoder_decoder": True},
}
_ONLY = {key: (ABSENT[key],) for key in ("activation_function", "scale_embedding", "tie_word_embeddings")}
_ONLY |= {"is_encoder_decoder": (True,), "use_weighted_layer_sum": (False,)}
# What makes no difference to the answers of a loaded model.
_HARMLESS = {
    *("architectures", "_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "max_length"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "attn_implementation", "return_dict"),
    *("output_attentions", "output_hidden_states", "chunk_size_feed_forward", "id2label", "label2id"),
    *("model_type", "num_hidden_layers", "encoder_layerdrop", "decoder_layerdrop", "dropout", "activation_dropout"),
    *("init_std", "decoder_start_token_id", "suppress_tokens", "begin_suppress_tokens", "forced_decoder_ids"),
    *("classifier_proj_size", "apply_spec_augment", "median_filter_width", "num_attention_heads", "hidden_size"),
    *(f"mask_{axis}_{what}" for axis in ("time", "feature") for what in ("prob", "length", "min_masks")),
}
# CTranslate2's scalars, and the value that we understand.
_SCALARS = {
    "decoder/activation": 3,  # the exact GELU
    "decoder/alibi": 0,
    "decoder/pre_norm": 1,
    "decoder/scale_embeddings": 0,
    "decoder/start_from_zero_embedding": 0,
}


def _layout(names: Iterable[str]) -> str | None:
    """Which of the two layouts the names are of."""
    given = set(names)
    return next((layout for layout, keys in _SIZES.items() if set(keys[:4]) <= given), None)


def detect(tensors: Tensors) -> str | None:
    """Why the tensors are a Whisper; None if they are not."""
    layout = _layout(tensors)
    return None if layout is None else f"names of {_WORDS[layout]} Whisper: {_SIZES[layout][1]}, {_SIZES[layout][2]}"


def config(values: Mapping[str, Any], tensors: Tensors) -> WhisperConfig:
    """The configuration that a config.json, or the shapes of a file mean.

    For a file of Hugging Face num_heads must be set, which no shape gives. ValueError names what is missing or not
    understood.
    """
    layout = _layout(tensors)
    head = None if layout is None else tensors.get(_HEADS[layout])
    if layout is not None and head is not None:
        table = tensors[_SIZES[layout][0]]
        if head.shape != table.shape or not mx.array_equal(read_array(head), read_array(table)).item():
            raise ValueError(f"{_HEADS[layout]} must be {_SIZES[layout][0]}, the table of embeddings, got another")
    if "model_type" in values:
        return _of_hugging_face(values)
    if layout is None:
        raise ValueError("the tensors must have the names of transformers' or CTranslate2's Whisper")
    if layout == "ctranslate2":
        if values:
            raise ValueError(f"settings must be none for CTranslate2's Whisper, got {', '.join(values)}")
        heads = _scalars(tensors)
    elif list(values) != ["num_heads"]:
        given = ", ".join(values) or "none"
        raise ValueError(f"settings must be num_heads for a file of transformers' Whisper, got {given}")
    else:
        heads = values["num_heads"]
    return WhisperConfig(num_heads=heads, **_sizes(tensors, layout))


def _of_hugging_face(values: Mapping[str, Any]) -> WhisperConfig:
    config_keys.check_keys(values, _SAME.keys() | ABSENT.keys(), _ONLY, _HARMLESS)
    values = {**ABSENT, **values}
    for part in ("attention_heads", "ffn_dim"):
        sides = [values[f"{side}_{part}"] for side in ("encoder", "decoder")]
        if sides[0] != sides[1]:
            raise ValueError(f"decoder_{part} must be the encoder's, {shorten(sides[0])}, got {shorten(sides[1])}")
    return WhisperConfig(**{ours: values[theirs] for theirs, ours in _SAME.items()})


def _sizes(tensors: Tensors, layout: str) -> dict[str, int]:
    """The sizes that the shapes give. ValueError for missing axes."""
    table, conv, source, target, inner = _SIZES[layout]
    for name, rank in ((table, 2), (conv, 3), (source, 2), (target, 2)):
        if tensors[name].ndim != rank:
            raise ValueError(f"{name} must have {rank} axes, got {tensors[name].ndim}")
    layers = {}
    for side in ("encoder", "decoder"):
        names = (inner.format(side=side, i=i) for i in itertools.count())
        layers[f"{side}_layers"] = len(list(itertools.takewhile(lambda name: name in tensors, names)))
    first = tensors.get(inner.format(side="encoder", i=0))
    if first is None or not first.ndim:
        raise ValueError(f"{inner.format(side='encoder', i=0)} must be there, and have rows")
    return {
        "vocab_size": tensors[table].shape[0],
        "embed_dim": tensors[table].shape[1],
        "hidden_dim": first.shape[0],
        "mel_bins": tensors[conv].shape[1],
        "source_positions": tensors[source].shape[0],
        "target_positions": tensors[target].shape[0],
        **layers,
    }


def _scalars(tensors: Tensors) -> int:
    """The number of heads, from the scalars. ValueError for scalars with other values than this Whisper has."""
    sides = [f"{side}/num_heads" for side in ("encoder", "decoder")]
    values: dict[str, Any] = {}
    for name in (*_SCALARS, *sides):
        if name not in tensors or math.prod(tensors[name].shape) != 1:
            raise ValueError(f"{name} must be one number")
        values[name] = read_array(tensors[name]).item()
    for name, right in _SCALARS.items():
        if values[name] != right:
            raise ValueError(f"{name} must be {right}, got {values[name]}")
    heads = [values[side] for side in sides]
    if heads[0] != heads[1]:
        raise ValueError(f"decoder/num_heads must be the encoder's, {heads[0]}, got {heads[1]}")
    return int(heads[0])


def rules(config: WhisperConfig, names: Collection[str] = ()) -> list[Rule]:
    """The table from the names of CTranslate2, if they are, or else of Hugging Face."""
    return _ctranslate2() if _layout(names) == "ctranslate2" else _hugging_face()


def _hugging_face() -> list[Rule]:
    leaf, side = ".{leaf:weight|bias}", "{side:encoder|decoder}"
    theirs, ours = f"model.{side}.layers.{{i}}.", f"{side}.stack.layers.{{i}}."
    projections = ".{p:q_proj|k_proj|v_proj|out_proj}" + leaf
    parts = {
        "self_attn" + projections: "self_attn" + projections,
        "encoder_attn" + projections: "cross_attn" + projections,
        "self_attn_layer_norm" + leaf: "norm1" + leaf,
        "encoder_attn_layer_norm" + leaf: "norm2" + leaf,
        "fc1" + leaf: "mlp.linear1" + leaf,
        "fc2" + leaf: "mlp.linear2" + leaf,
        "final_layer_norm" + leaf: "norm3" + leaf,
    }
    conv = "encoder.{conv:conv1|conv2}."
    return [
        Rule(f"model.{conv}weight", f"{conv}weight", _CONVOLUTION),
        Rule(f"model.{conv}bias", f"{conv}bias"),
        Rule(f"model.{side}.embed_positions.weight", f"{side}.embed_positions.weight"),
        Rule("model.decoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
        *(Rule(theirs + part, ours + own) for part, own in parts.items()),
        Rule(f"model.{side}.layer_norm{leaf}", f"{side}.stack.norm{leaf}"),
        Rule("proj_out.weight", None),
    ]


def _ctranslate2() -> list[Rule]:
    leaf, side = "{leaf:weight|bias}", "{side:encoder|decoder}"
    theirs, ours, norm = f"{side}/layer_{{i}}/", f"{side}.stack.layers.{{i}}.", "/layer_norm/"
    own, cross = ours + "self_attn.", ours + "cross_attn."
    norms = {theirs + "self_attention": ours + "norm1", theirs + "attention": ours + "norm2"}
    norms |= {theirs + "ffn": ours + "norm3", side: f"{side}.stack.norm"}
    dropped = "alignment_heads|alignment_layer|" + "|".join(name.removeprefix("decoder/") for name in _SCALARS)
    conv = "{conv:conv1|conv2}"
    return [
        Rule(f"encoder/{conv}/weight", f"encoder.{conv}.weight", _CONVOLUTION),
        Rule(f"encoder/{conv}/bias", f"encoder.{conv}.bias"),
        Rule(f"{side}/position_encodings/encodings", f"{side}.embed_positions.weight"),
        Rule("decoder/embeddings/weight", "decoder.embed_tokens.weight"),
        Rule(f"{theirs}self_attention/linear_0/weight", tuple(f"{own}{p}_proj.weight" for p in "qkv")),
        Rule(f"{theirs}self_attention/linear_0/bias", (f"{own}q_proj.bias", f"{own}v_proj.bias"), (ZeroPart(3, 1),)),
        Rule(f"{theirs}self_attention/linear_1/{leaf}", f"{own}out_proj.{leaf}"),
        Rule(f"{theirs}attention/linear_0/{leaf}", f"{cross}q_proj.{leaf}"),
        Rule(f"{theirs}attention/linear_1/weight", (f"{cross}k_proj.weight", f"{cross}v_proj.weight")),
        Rule(f"{theirs}attention/linear_1/bias", f"{cross}v_proj.bias", (ZeroPart(2, 0),)),
        Rule(f"{theirs}attention/linear_2/{leaf}", f"{cross}out_proj.{leaf}"),
        Rule(f"{theirs}ffn/linear_0/{leaf}", f"{ours}mlp.linear1.{leaf}"),
        Rule(f"{theirs}ffn/linear_1/{leaf}", f"{ours}mlp.linear2.{leaf}"),
        *(Rule(f"{a}{norm}gamma", f"{b}.weight") for a, b in norms.items()),
        *(Rule(f"{a}{norm}beta", f"{b}.bias") for a, b in norms.items()),
        Rule(f"{side}/num_heads", None),
        Rule(f"decoder/{{scalar:{dropped}}}", None),
        Rule(_HEADS["ctranslate2"], None),
    ]


def original(config: WhisperConfig) -> dict[str, Any]:
    """The config.json of Hugging Face that means the configuration."""
    values = {theirs: getattr(config, ours) for theirs, ours in _SAME.items()}
    values |= {"decoder_attention_heads": config.num_heads, "decoder_ffn_dim": config.hidden_dim}
    values |= {key: right for key, (right,) in _ONLY.items()}
    values["pad_token_id"] = None  # which it is depends on the tokenizer, and it means nothing to the weights
    del values["use_weighted_layer_sum"]
    return {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"], **values}


CONVERTERS = (Converter("whisper", "whisper", config, rules, original, detect=detect, model_types=("whisper",)),)
