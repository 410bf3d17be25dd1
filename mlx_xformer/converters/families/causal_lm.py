"""Language models: rules from Hugging Face's names, and the configuration from a config.json of theirs and back.

Sources: transformers 5.23 (models/llama, mistral, qwen2, qwen3, gemma2, gemma3: names, defaults), whose older keys are
read too; mlx-lm's `quantization`. Mixtures of experts are in causal_lm_moe. A key that is neither understood nor known to
make no difference is an error.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from ...storage.messages import shorten
from ...models.causal_lm.model import CausalLMConfig, Quantization
from ..converter import Converter, Original
from ..formats.rotary_keys import FULL, SLIDING, read_positions, write_scaling
from ..formats.stored import Tensors
from ..rules import Rule
from . import causal_lm_moe

_LAYER = "model.layers.{i}."
_PACKED = "{leaf:weight|bias|scales|biases}"
TABLE_NAME, HEAD_NAME = "model.embed_tokens.weight", "lm_head.weight"
TABLE, HEAD = "model.embed_tokens.{leaf:weight|scales|biases}", "lm_head.{leaf:weight|scales|biases}"

# Hugging Face's key -> ours, where the value means the same.
_SAME = {
    "vocab_size": "vocab_size",
    "hidden_size": "embed_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "hidden_dim",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "mlp_bias": "mlp_bias",
    "attn_logit_softcapping": "attention_softcap",
    "final_logit_softcapping": "logit_softcap",
}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
_UNDERSTOOD = {
    *_SAME,
    *("model_type", "hidden_act", "hidden_activation", "attention_bias", "query_pre_attn_scalar"),
    *("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq", "max_position_embeddings"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "sliding_window_pattern"),
    *("_sliding_window_pattern", "quantization", "quantization_config"),
}
# What makes no difference to the answers of a loaded model.
HARMLESS = {
    *("architectures", "_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "auto_map"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "initializer_range", "attention_dropout"),
    *("pretraining_tp", "cache_implementation", "transformers.js_config", "is_llama_config", "unsloth_fixed"),
    *("unsloth_version", "hidden_dropout", "attn_implementation", "_attn_implementation_autoset", "return_dict"),
    *("output_attentions", "output_hidden_states", "chunk_size_feed_forward", "id2label", "label2id", "task"),
    *(
        "torchscript",
        "finetuning_task",
        "keys_to_ignore_at_inference",
        "max_length",
        "min_length",
        "_from_model_config",
    ),
}
# Keys of which we understand one value.
_ONLY: dict[str, tuple[Any, ...]] = {
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1, None),
    "use_bidirectional_attention": (False, None),
    "use_qk_norm": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
}
_SOFTCAPS = {"attn_logit_softcapping": ("gemma2",), "final_logit_softcapping": ("gemma2", "gemma3_text")}
_GEMMA = {"norm_plus_one": True, "sandwich_norms": True}
_TYPES: dict[str, dict[str, Any]] = {  # model_type -> what it means by itself
    "llama": {},
    "mistral": {},
    "qwen2": {"attention_bias": ("q", "k", "v")},
    "qwen3": {"qk_norm": True},
    "gemma2": _GEMMA,
    "gemma3_text": {**_GEMMA, "qk_norm": True},
    **{kind: {} for kind in causal_lm_moe.KEYS},
}
MODEL_TYPES = tuple(_TYPES)
_ONE_WINDOW = ("mistral", "mixtral", "qwen3_moe", "olmoe")  # or none, in all layers
# What keys mean that are absent, in transformers 5.23, where that is neither null nor false: it does not write them.
_ANY = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": 4096}
_QWEN = {**_ANY, "hidden_act": "silu", "num_key_value_heads": 32, "max_position_embeddings": 32768}
_GEMMAS = {
    **_ANY,
    **{"hidden_activation": "gelu_pytorch_tanh", "num_key_value_heads": 4, "head_dim": 256},
    **{"query_pre_attn_scalar": 256, "tie_word_embeddings": True},
}
ABSENT: dict[str, dict[str, Any]] = {
    "llama": {**_ANY, "hidden_act": "silu", "max_position_embeddings": 2048, "sliding_window": None},
    "mistral": {**_ANY, "hidden_act": "silu", "num_key_value_heads": 8, "max_position_embeddings": 131072},
    "qwen2": {**_QWEN, "max_window_layers": 28},
    "qwen3": {**_QWEN, "max_window_layers": 28, "head_dim": 128},
    "gemma2": {
        **_GEMMAS,
        **{"max_position_embeddings": 8192, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    },
    "gemma3_text": {
        **_GEMMAS,
        **{"max_position_embeddings": 131072, "rope_theta": 1e6, "rope_local_base_freq": 10000.0},
        "sliding_window_pattern": 6,
    },
    "mixtral": {
        **{**_ANY, "hidden_act": "silu", "num_key_value_heads": 8, "max_position_embeddings": 131072},
        **{"rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, **causal_lm_moe.ABSENT["mixtral"]},
    },
    "qwen2_moe": {**_QWEN, "num_key_value_heads": 16, "max_window_layers": 28, **causal_lm_moe.ABSENT["qwen2_moe"]},
    "qwen3_moe": {**_QWEN, "num_key_value_heads": 4, **causal_lm_moe.ABSENT["qwen3_moe"]},
    "olmoe": {
        **{**_ANY, "hidden_act": "silu", "max_position_embeddings": 4096},
        **{"rms_norm_eps": 1e-5, "sliding_window": None, **causal_lm_moe.ABSENT["olmoe"]},
    },
}
_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_MOST_LAYERS = 1000


def rules(config: CausalLMConfig, names: Collection[str] = (TABLE_NAME,)) -> list[Rule]:
    """The table from Hugging Face's names, with packed matrices under mlx-lm's. A tied head is dropped where the table
    of embeddings is among the `names`, and is that table where not."""
    tied = [Rule(TABLE, TABLE), Rule(HEAD, None)] if TABLE_NAME in names else [Rule(HEAD, TABLE)]
    attention, norms = _LAYER + "self_attn.", "{norm:input|post_attention|pre_feedforward|post_feedforward}_layernorm."
    return [
        *(tied if config.tie_embeddings else [_same(TABLE), _same(HEAD)]),
        *(_same(attention + part) for part in ("{p:q_proj|k_proj|v_proj}." + _PACKED, "{norm:q_norm|k_norm}.weight")),
        Rule(attention + "o_proj." + _PACKED, attention + "out_proj." + _PACKED),
        Rule(attention + "rotary_emb.inv_freq", None),
        _same(_LAYER + "mlp.{p:gate_proj|up_proj|down_proj}." + _PACKED),
        *([] if config.moe is None else causal_lm_moe.rules(config, config.moe, names)),
        _same(_LAYER + norms + "weight"),
        _same("model.norm.weight"),
    ]


def _same(template: str) -> Rule:
    return Rule(template, template)


def config(values: Mapping[str, Any], tensors: Tensors | None = None) -> CausalLMConfig:
    """The configuration that a config.json of Hugging Face means, and the tensors of packed routers. ValueError names
    what is not understood."""
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in _TYPES:
        raise ValueError(f"model_type must be one of {', '.join(_TYPES)}, got {shorten(str(kind))}")
    values = {**ABSENT[kind], **causal_lm_moe.one_name(values, kind)}
    _check_keys(values, kind)
    given = {ours: values[theirs] for theirs, ours in _SAME.items() if values.get(theirs) is not None}
    given = {**_TYPES[kind], **given, **read_positions(values, kind), **_windows(values, kind)}
    key = "hidden_activation" if kind.startswith("gemma") else "hidden_act"
    if values[key] not in _ACTIVATIONS:
        raise ValueError(f"{key} must be one of {', '.join(_ACTIVATIONS)}, got {shorten(str(values[key]))}")
    given["activation"] = _ACTIVATIONS[values[key]]
    if values.get("attention_bias"):
        given["attention_bias"] = ("q", "k", "v", "out")
    if kind in causal_lm_moe.KEYS:
        given |= causal_lm_moe.fields(values, kind, given["activation"])
    if kind.startswith("gemma"):
        given["embed_scale"] = math.sqrt(values["hidden_size"])
        given["attention_scale"] = values["query_pre_attn_scalar"] ** -0.5
    packing = values.get("quantization") or values.get("quantization_config")
    found = CausalLMConfig(**given, quantization=None if packing is None else _quantization(packing))
    return causal_lm_moe.with_packed_routers(found, tensors or ())


def _check_keys(values: Mapping[str, Any], kind: str) -> None:
    known = _UNDERSTOOD | HARMLESS | _ONLY.keys() | causal_lm_moe.KEYS.get(kind, set())
    unknown = sorted(key for key in values if key not in known)
    if unknown:
        raise ValueError(f"config.json has keys that are not handled: {shorten(', '.join(unknown))}")
    for key, right in _ONLY.items():
        if key in values and values[key] not in right:
            raise ValueError(f"{key} must be {json.dumps(right[0])}, got {shorten(str(values[key]))}")
    for key, kinds in _SOFTCAPS.items():
        if values.get(key) is not None and kind not in kinds:
            raise ValueError(f"{key} must be null in a {kind}, got {shorten(str(values[key]))}")
    required = [*_REQUIRED, *(["head_dim"] if "head_dim" in ABSENT[kind] else [])]
    required += ["num_key_value_heads", "query_pre_attn_scalar"] if kind.startswith("gemma") else []
    required += ["num_key_value_heads"] if kind in ("qwen2_moe", "qwen3_moe") else []
    missing = [key for key in required if values.get(key) is None]
    if missing:
        raise ValueError(f"config.json must have {', '.join(missing)}")
    for key in ("hidden_size", "query_pre_attn_scalar"):
        if key in values and not (isinstance(values[key], (int, float)) and 0 < values[key] < 1e9):
            raise ValueError(f"{key} must be a number above 0, got {shorten(str(values[key]))}")
    count = values["num_hidden_layers"]  # lists of so many are made before a CausalLMConfig can refuse it
    if type(count) is not int or not 1 <= count <= _MOST_LAYERS:
        raise ValueError(f"num_hidden_layers must be a whole number from 1 to {_MOST_LAYERS}, got {shorten(str(count))}")
    if kind in causal_lm_moe.KEYS:
        causal_lm_moe.check(values, kind)


def _windows(values: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """window and layer_types."""
    window, count, types = values["sliding_window"], values["num_hidden_layers"], values.get("layer_types")
    if kind in ("llama", "olmoe") and window is not None:
        raise ValueError(f"sliding_window must be null in a {kind}, got {shorten(str(window))}")
    if kind.startswith("qwen") and not values.get("use_sliding_window"):
        window = None
    if kind in _ONE_WINDOW and types not in (None, [FULL if window is None else SLIDING] * count):
        named = FULL if window is None else SLIDING
        raise ValueError(f"layer_types must be {named} throughout in a {kind}, got {shorten(str(types))}")
    if window is None:
        if kind == "qwen2_moe" and (values.get("use_sliding_window") or types not in (None, [FULL] * count)):
            raise ValueError(f"sliding_window must be a number, and used, in a {kind} with layers that slide")
        if kind.startswith("gemma") and types != [FULL] * count:
            raise ValueError(f"sliding_window must be a number in a {kind} with layers that slide, got null")
        return {}
    if types is None and kind == "qwen2_moe":
        first = values["max_window_layers"]
        types = [FULL if index % 2 or index >= first else SLIDING for index in range(count)]
    if types is None and kind in ("qwen2", "qwen3"):
        first = values["max_window_layers"]
        types = [SLIDING if index >= first else FULL for index in range(count)]
    elif types is None and kind.startswith("gemma"):
        every = 2 if kind == "gemma2" else values["sliding_window_pattern"]
        types = [SLIDING if (index + 1) % every else FULL for index in range(count)]
    names = {SLIDING: "local", FULL: "global"}
    if types is not None and not (isinstance(types, list) and all(name in names for name in types)):
        raise ValueError(f"layer_types must be {' or '.join(names)} for each layer, got {shorten(str(types))}")
    return {"window": window, "layer_types": None if types is None else tuple(names[name] for name in types)}


def _quantization(given: Any) -> Quantization:
    """mlx-lm's: bits and group_size, and the same or false under the names of single layers."""
    if (
        not isinstance(given, Mapping)
        or not {"bits", "group_size"} <= given.keys()
        or given.get("mode", "affine") != "affine"
    ):
        raise ValueError(f"quantization must be of bits and group_size in affine mode, got {shorten(str(given))}")
    layers: dict[str, tuple[int, int] | None] = {}
    for name, own in given.items():
        if name in ("bits", "group_size", "mode"):
            continue
        ours = causal_lm_moe.our_name(name.replace(".o_proj", ".out_proj"))
        if own is False:
            layers[ours] = None
        elif (
            isinstance(own, Mapping)
            and own.keys() <= {"bits", "group_size", "mode"}
            and own.get("mode", "affine") == "affine"
        ):
            layers[ours] = (own.get("bits", given["bits"]), own.get("group_size", given["group_size"]))
        else:
            raise ValueError(f"quantization has a key that is not handled: {shorten(name)}")
    return Quantization(given["bits"], given["group_size"], layers)


def original(own: CausalLMConfig) -> dict[str, Any]:
    """A config.json of Hugging Face that means the same, floats throughout. ValueError if none of theirs does."""
    kind = _kind(own)
    theirs = {theirs: getattr(own, ours) for theirs, ours in _SAME.items()}
    words = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    values: dict[str, Any] = {"model_type": kind, **theirs, "hidden_act": words[own.activation]}
    values["attention_bias"] = set(own.attention_bias) == {"q", "k", "v", "out"}
    values |= {"rope_theta": own.rope_theta, "rope_scaling": write_scaling(own.rope_scaling)}
    if own.window is not None:
        values |= {"sliding_window": own.window, "use_sliding_window": True}
        if own.layer_types is not None:
            values["layer_types"] = [SLIDING if name == "local" else FULL for name in own.layer_types]
    if own.moe is not None:
        values |= causal_lm_moe.original(own, own.moe)
    if kind.startswith("gemma"):
        values["query_pre_attn_scalar"] = round((own.attention_scale or 1.0) ** -2)
        values["rope_local_base_freq"] = own.local_rope_theta
        values["hidden_activation"] = values.pop("hidden_act")
        values.setdefault("sliding_window", None)
        values.setdefault("layer_types", [FULL] * own.num_layers)
    values = {key: value for key, value in values.items() if value is not None or key in ABSENT[kind]}
    plain = causal_lm_moe.plain(dataclasses.replace(own, dtype=None, quantization=None))
    try:
        again = config(values)
    except ValueError as error:
        raise ValueError(f"no architecture of Hugging Face has this configuration ({error})") from None
    if not _alike(again, plain):
        raise ValueError("no architecture of Hugging Face has this configuration")
    return values


def _alike(a: CausalLMConfig, b: CausalLMConfig) -> bool:
    """Whether two configurations are one, but for the rounding of a square root."""
    scales = (a.attention_scale or 0.0), (b.attention_scale or 0.0)
    return math.isclose(*scales) and dataclasses.replace(a, attention_scale=b.attention_scale) == b


def _kind(config: CausalLMConfig) -> str:
    if config.moe is not None:
        return causal_lm_moe.kind_of(config)
    if config.sandwich_norms:
        return "gemma3_text" if config.qk_norm else "gemma2"
    if config.qk_norm:
        return "qwen3"
    if set(config.attention_bias) == {"q", "k", "v"}:
        return "qwen2"
    return "llama" if config.window is None else "mistral"


def record(config: CausalLMConfig, original: Original) -> dict[str, Any]:
    """What leads back to the same files: config.json, the metadata of the tensors, and which of several names for the
    same tensors are there."""
    found: dict[str, Any] = {"config": original.values, "metadata": original.metadata}
    if config.moe is not None:
        found["fused"] = causal_lm_moe.fused_name(config) in original.tensors
    found["table"] = TABLE_NAME if TABLE_NAME in original.tensors else HEAD_NAME
    return found


def names(config: CausalLMConfig, record: Mapping[str, Any] | None) -> list[str]:
    """The names of a record: of the table of embeddings, and of fused experts."""
    record = record or {}
    head = config.tie_embeddings and record.get("table") == HEAD_NAME
    fused = config.moe is not None and record.get("fused") is True
    return [HEAD_NAME if head else TABLE_NAME, *([causal_lm_moe.fused_name(config)] if fused else [])]


CONVERTER = Converter(
    "causal_lm",
    "causal_lm",
    config,
    rules,
    original,
    model_types=MODEL_TYPES,
    quantizes=True,
    record=record,
    names=names,
)
