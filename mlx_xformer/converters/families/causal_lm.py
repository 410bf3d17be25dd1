"""Language models: rules from Hugging Face's names, and the configuration from its config.json and back.

Sources: transformers 5.23 (models/llama, mistral, qwen2, qwen3, gemma2, gemma3: names, defaults), whose older keys are
read too; mlx-lm's `quantization`. Mixtures of experts are in causal_lm_moe. A key that is neither understood nor known
to make no difference is an error.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

from ...models.causal_lm.model import CausalLMConfig, Quantization
from ...storage.messages import shorten
from ..converter import Converter, Original
from ..formats import config_keys
from ..formats.rotary_keys import FULL, SLIDING, read_positions, write_scaling
from ..rules import Rule
from ..stored import Tensors
from . import causal_lm_moe
from .causal_lm_keys import (
    ABSENT,
    ACTIVATIONS,
    HARMLESS,
    MODEL_TYPES,
    MOST_LAYERS,
    ONE_WINDOW,
    ONLY,
    REQUIRED,
    SAME,
    SOFTCAPS,
    TYPES,
    UNDERSTOOD,
)

_LAYER = "model.layers.{i}."
_PACKED = "{leaf:weight|bias|scales|biases}"
TABLE_NAME, HEAD_NAME = "model.embed_tokens.weight", "lm_head.weight"
TABLE, HEAD = "model.embed_tokens.{leaf:weight|scales|biases}", "lm_head.{leaf:weight|scales|biases}"


def rules(config: CausalLMConfig, names: Collection[str] = (TABLE_NAME,)) -> list[Rule]:
    """The table from Hugging Face's names, with packed matrices under mlx-lm's.

    A tied head is dropped where the table of embeddings is among the `names`, and is that table where not.
    """
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
    """The configuration that a config.json of Hugging Face means, and the tensors of packed routers.

    ValueError names what is not understood.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in TYPES:
        raise ValueError(f"model_type must be one of {', '.join(TYPES)}, got {shorten(kind)}")
    values = {**ABSENT[kind], **causal_lm_moe.merge_names(values, kind)}
    _check_keys(values, kind)
    given = {ours: values[theirs] for theirs, ours in SAME.items() if values.get(theirs) is not None}
    given = {**TYPES[kind], **given, **read_positions(values, kind), **_windows(values, kind)}
    key = "hidden_activation" if kind.startswith("gemma") else "hidden_act"
    if values[key] not in ACTIVATIONS:
        raise ValueError(f"{key} must be one of {', '.join(ACTIVATIONS)}, got {shorten(values[key])}")
    given["activation"] = ACTIVATIONS[values[key]]
    if values.get("attention_bias"):
        given["attention_bias"] = ("q", "k", "v", "out")
    if kind in causal_lm_moe.KEYS:
        given |= causal_lm_moe.read_fields(values, kind, given["activation"])
    if kind.startswith("gemma"):
        given["embed_scale"] = math.sqrt(values["hidden_size"])
        given["attention_scale"] = values["query_pre_attn_scalar"] ** -0.5
    packing = values.get("quantization") or values.get("quantization_config")
    found = CausalLMConfig(**given, quantization=None if packing is None else _quantization(packing))
    return causal_lm_moe.add_packed_routers(found, tensors or ())


def _check_keys(values: Mapping[str, Any], kind: str) -> None:
    config_keys.check_keys(values, UNDERSTOOD | causal_lm_moe.KEYS.get(kind, set()), ONLY, HARMLESS)
    for key, kinds in SOFTCAPS.items():
        if values.get(key) is not None and kind not in kinds:
            raise ValueError(f"{key} must be null in a {kind}, got {shorten(values[key])}")
    required = [*REQUIRED, *(["head_dim"] if "head_dim" in ABSENT[kind] else [])]
    required += ["num_key_value_heads", "query_pre_attn_scalar"] if kind.startswith("gemma") else []
    required += ["num_key_value_heads"] if kind in ("qwen2_moe", "qwen3_moe") else []
    missing = [key for key in required if values.get(key) is None]
    if missing:
        raise ValueError(f"config.json must have {', '.join(missing)}")
    for key in ("hidden_size", "query_pre_attn_scalar"):
        if key in values and not (isinstance(values[key], (int, float)) and 0 < values[key] < 1e9):
            raise ValueError(f"{key} must be a number above 0, got {shorten(values[key])}")
    count = values["num_hidden_layers"]  # lists of so many are made before a CausalLMConfig can refuse it
    if type(count) is not int or not 1 <= count <= MOST_LAYERS:
        raise ValueError(f"num_hidden_layers must be a whole number from 1 to {MOST_LAYERS}, got {shorten(count)}")
    if kind in causal_lm_moe.KEYS:
        causal_lm_moe.check_values(values, kind)


def _windows(values: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """window and layer_types."""
    window, count, types = values["sliding_window"], values["num_hidden_layers"], values.get("layer_types")
    if kind in ("llama", "olmoe") and window is not None:
        raise ValueError(f"sliding_window must be null in a {kind}, got {shorten(window)}")
    if kind.startswith("qwen") and not values.get("use_sliding_window"):
        window = None
    if kind in ONE_WINDOW and types not in (None, [FULL if window is None else SLIDING] * count):
        named = FULL if window is None else SLIDING
        raise ValueError(f"layer_types must be {named} throughout in a {kind}, got {shorten(types)}")
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
        raise ValueError(f"layer_types must be {' or '.join(names)} for each layer, got {shorten(types)}")
    return {"window": window, "layer_types": None if types is None else tuple(names[name] for name in types)}


def _quantization(given: Any) -> Quantization:
    """mlx-lm's `quantization`: bits and group_size, and for single layers the same, or false for floats."""
    if (
        not isinstance(given, Mapping)
        or not {"bits", "group_size"} <= given.keys()
        or given.get("mode", "affine") != "affine"
    ):
        raise ValueError(f"quantization must be of bits and group_size in affine mode, got {shorten(given)}")
    layers: dict[str, tuple[int, int] | None] = {}
    for name, own in given.items():
        if name in ("bits", "group_size", "mode"):
            continue
        ours = causal_lm_moe.rename_layer(name.replace(".o_proj", ".out_proj"))
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
    """A config.json of Hugging Face that means the configuration, all in floats. ValueError if there is none."""
    kind = _kind(own)
    theirs = {theirs: getattr(own, ours) for theirs, ours in SAME.items()}
    words = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
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
    plain = causal_lm_moe.simplify(dataclasses.replace(own, dtype=None, quantization=None))
    try:
        again = config(values)
    except ValueError as error:
        raise ValueError(f"no architecture of Hugging Face has this configuration ({error})") from None
    if not _alike(again, plain):
        raise ValueError("no architecture of Hugging Face has this configuration")
    return values


def _alike(a: CausalLMConfig, b: CausalLMConfig) -> bool:
    """Whether two configurations are equal but for the rounding of a square root."""
    scales = (a.attention_scale or 0.0), (b.attention_scale or 0.0)
    return math.isclose(*scales) and dataclasses.replace(a, attention_scale=b.attention_scale) == b


def _kind(config: CausalLMConfig) -> str:
    if config.moe is not None:
        return causal_lm_moe.find_model_type(config)
    if config.sandwich_norms:
        return "gemma3_text" if config.qk_norm else "gemma2"
    if config.qk_norm:
        return "qwen3"
    if set(config.attention_bias) == {"q", "k", "v"}:
        return "qwen2"
    return "llama" if config.window is None else "mistral"


def record(config: CausalLMConfig, original: Original) -> dict[str, Any]:
    """What leads back to the same files: config.json, the metadata of the tensors, and the names of some of them.

    The table of embeddings may be under the head's name, and experts may be fused.
    """
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
CONVERTERS = (CONVERTER,)
