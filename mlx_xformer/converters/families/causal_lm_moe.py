"""Mixtures of experts: keys of Hugging Face's config.json and names of tensors.

Sources: transformers 5.23 (models/mixtral, qwen2_moe, qwen3_moe, olmoe; conversion_mapping.py, whose names of single
experts its save_pretrained writes by default); mlx-lm's `switch_mlp`, where experts are stacked and packed.
router_aux_loss_coef is the alpha of each layer here; there it is that of one loss over the tokens of all layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from ...models.causal_lm.model import CausalLMConfig, Quantization
from ...nn.moe import MoEConfig
from ...storage.messages import shorten
from ..layouts import Halves, Stack
from ..rules import Rule

_LAYER = "model.layers.{i}."
_PACKED = "{leaf:weight|bias|scales|biases}"
_PARTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}  # ours: Mixtral's
_EVERY = {"num_experts", "num_experts_per_tok", "router_aux_loss_coef", "output_router_logits"}
_QWEN = _EVERY | {"moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"}
# The keys that a kind has beside those of all decoders. Logits of routers are asked for by name here, and noise on what
# they get is for training.
KEYS: dict[str, set[str]] = {
    "mixtral": _EVERY | {"router_jitter_noise"},
    "qwen2_moe": _QWEN | {"shared_expert_intermediate_size", "qkv_bias"},
    "qwen3_moe": _QWEN,
    "olmoe": _EVERY | {"norm_topk_prob", "clip_qkv"},
}
ABSENT: dict[str, dict[str, Any]] = {  # what their absence means
    "mixtral": {"num_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.001},
    "qwen2_moe": {
        **{"num_experts": 60, "num_experts_per_tok": 4, "router_aux_loss_coef": 0.001, "norm_topk_prob": False},
        **{"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "decoder_sparse_step": 1},
        "qkv_bias": True,
    },
    "qwen3_moe": {
        **{"num_experts": 128, "num_experts_per_tok": 8, "router_aux_loss_coef": 0.001, "norm_topk_prob": False},
        **{"moe_intermediate_size": 768, "decoder_sparse_step": 1},
    },
    "olmoe": {"num_experts": 64, "num_experts_per_tok": 8, "router_aux_loss_coef": 0.01, "norm_topk_prob": False},
}
_ATTENTION: dict[str, dict[str, Any]] = {"qwen3_moe": {"qk_norm": True}, "olmoe": {"qk_norm": "whole"}}
_ONE_NAME = ("qwen2_moe",)  # the others say num_local_experts too


def merge_names(values: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The keys, with num_experts for num_local_experts."""
    values = dict(values)
    if kind not in KEYS or kind in _ONE_NAME or "num_local_experts" not in values:
        return values
    local = values.pop("num_local_experts")
    if values.setdefault("num_experts", local) != local:
        raise ValueError(f"num_experts must be num_local_experts, {shorten(local)}, got {values['num_experts']!r:.80}")
    return values


def check_values(values: Mapping[str, Any], kind: str) -> None:
    """ValueError names a key of a mixture whose value is not understood."""
    counts = KEYS[kind] & {"num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"}
    for key in sorted(counts | (KEYS[kind] & {"decoder_sparse_step", "num_experts"})):
        least = 0 if key == "num_experts" and kind in ("qwen2_moe", "qwen3_moe") else 1
        if type(values[key]) is not int or values[key] < least:
            raise ValueError(f"{key} must be a whole number from {least}, got {shorten(values[key])}")
    for key in sorted(KEYS[kind] & {"norm_topk_prob", "qkv_bias"}):
        if type(values[key]) is not bool:
            raise ValueError(f"{key} must be true or false, got {shorten(values[key])}")
    if values.get("clip_qkv") is not None:
        raise ValueError(f"clip_qkv must be null, got {shorten(values['clip_qkv'])}")
    alpha = values["router_aux_loss_coef"]
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha < float("inf"):
        raise ValueError(f"router_aux_loss_coef must be a number from 0, got {shorten(alpha)}")
    layers = values.get("mlp_only_layers")
    if layers is not None and not (isinstance(layers, list) and all(type(index) is int for index in layers)):
        raise ValueError(f"mlp_only_layers must be numbers of layers, got {shorten(layers)}")
    unread = ["mlp_bias", *(["attention_bias"] if kind in ("mixtral", "qwen2_moe") else [])]
    for key in unread:
        if values.get(key):
            raise ValueError(f"{key} must be false in a {kind}, got {shorten(values[key])}")
    if kind != "mixtral" and "head_dim" in values and values["head_dim"] is None:
        raise ValueError(f"head_dim must be a number or absent in a {kind}, got null")
    if kind == "olmoe" and "head_dim" in values:
        heads, width = values["num_attention_heads"], values["head_dim"]
        if not type(heads) is type(width) is int or heads * width != values["hidden_size"]:
            raise ValueError(f"head_dim must be hidden_size / num_attention_heads in an olmoe, got {shorten(width)}")


def read_fields(values: Mapping[str, Any], kind: str, activation: str) -> dict[str, Any]:
    """The fields moe and dense_layers, and those of attention that the model_type means."""
    own = dict(_ATTENTION.get(kind, {}))
    if values.get("qkv_bias"):
        own["attention_bias"] = ("q", "k", "v")
    every, only = values.get("decoder_sparse_step", 1), set(values.get("mlp_only_layers") or ())
    count, experts = values["num_hidden_layers"], values["num_experts"]
    dense = tuple(n for n in range(count) if n in only or (n + 1) % every or not experts)
    if len(dense) == count:
        return own
    moe = MoEConfig(
        values["hidden_size"],
        values.get("moe_intermediate_size", values["intermediate_size"]),
        experts,
        values["num_experts_per_tok"],
        activation=activation,
        renormalize=values.get("norm_topk_prob", True),
        shared_dim=values.get("shared_expert_intermediate_size", 0),
        shared_gate=kind == "qwen2_moe",
        alpha=values["router_aux_loss_coef"],
    )
    return {**own, "moe": moe, "dense_layers": dense}


def find_model_type(config: CausalLMConfig) -> str:
    """The model_type of a mixture."""
    if config.moe is not None and config.moe.shared_dim:
        return "qwen2_moe"
    return next((kind for kind, own in _ATTENTION.items() if own["qk_norm"] == config.qk_norm), "mixtral")


def original(config: CausalLMConfig, moe: MoEConfig) -> dict[str, Any]:
    """The keys of a mixture that mean the configuration, as far as there are such keys."""
    kind = find_model_type(config)
    values: dict[str, Any] = {
        "num_local_experts" if kind == "mixtral" else "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "router_aux_loss_coef": moe.alpha,
        "norm_topk_prob": moe.renormalizes,
        "moe_intermediate_size": moe.hidden_dim,
        "mlp_only_layers": list(config.dense_layers),
        "shared_expert_intermediate_size": moe.shared_dim,
        "qkv_bias": bool(config.attention_bias),
    }
    values = {key: value for key, value in values.items() if key in KEYS[kind] | {"num_local_experts"}}
    return values if kind.startswith("qwen") else {**values, "intermediate_size": moe.hidden_dim}


def simplify(config: CausalLMConfig) -> CausalLMConfig:
    """The configuration, with the values that transformers has where they make no difference."""
    if config.moe is None:
        return config
    moe = dataclasses.replace(config.moe, renormalize=config.moe.renormalizes)
    unused = not config.dense_layers and not find_model_type(config).startswith("qwen")
    hidden_dim = moe.hidden_dim if unused else config.hidden_dim
    return dataclasses.replace(config, moe=moe, hidden_dim=hidden_dim)


def fused_name(config: CausalLMConfig) -> str:
    """The name of a tensor that is there only if transformers has saved the experts fused, as it computes with them."""
    return f"model.layers.{_first(config)}.mlp.experts.gate_up_proj"


def _first(config: CausalLMConfig) -> int:
    return next(index for index in range(config.num_layers) if config.has_mixture(index))


def rules(config: CausalLMConfig, moe: MoEConfig, names: Collection[str]) -> list[Rule]:
    """The table of experts and routers: fused or stacked if the `names` are, else expert by expert."""
    fused, mixtral = fused_name(config) in names, find_model_type(config) == "mixtral"
    block = _LAYER + ("block_sparse_moe." if mixtral and not fused else "mlp.")
    table = [
        Rule(f"{block}gate.{_PACKED}", f"{_LAYER}mlp.router.{_PACKED}"),
        *(Rule(name, name) for name in (f"{_LAYER}mlp.shared_expert_gate.{_PACKED}",)),
        *(Rule(name, name) for name in (f"{_LAYER}mlp.shared_expert.{{p:{'|'.join(_PARTS)}}}.{_PACKED}",)),
    ]
    ours = _LAYER + "mlp.experts."
    stacked = f"{block}switch_mlp.".replace("{i}", str(_first(config)))
    if fused:
        halves = tuple(f"{ours}{part}.weight" for part in ("gate_proj", "up_proj"))
        fusing = Rule(ours + "gate_up_proj", halves, (Halves(),))
        return [*table, fusing, Rule(ours + "down_proj", ours + "down_proj.weight")]
    if any(f"{stacked}{part}.weight" in names for part in _PARTS):
        tail = f"{{p:{'|'.join(_PARTS)}}}.{_PACKED}"
        return [*table, Rule(f"{block}switch_mlp.{tail}", ours + tail)]
    for part, word in _PARTS.items():
        name = word if mixtral else part
        each = tuple(f"{block}experts.{e}.{name}.weight" for e in range(moe.num_experts))
        table.append(Rule(each, f"{ours}{part}.weight", (Stack(moe.num_experts),)))
    return table


def rename_layer(layer: str) -> str:
    """The name here of a layer of mlx-lm."""
    layer = layer.replace(".block_sparse_moe.", ".mlp.").replace(".switch_mlp.", ".experts.")
    return layer.removesuffix(".gate") + ".router" if layer.endswith(".mlp.gate") else layer


def add_packed_routers(config: CausalLMConfig, names: Collection[str]) -> CausalLMConfig:
    """The configuration, with the routers among the packed layers if they have scales."""
    packing = config.quantization
    if packing is None or config.moe is None:
        return config
    layers = dict(packing.layers)
    for index in filter(config.has_mixture, range(config.num_layers)):
        prefix = f"model.layers.{index}."
        for theirs in ("mlp.gate", "block_sparse_moe.gate", "mlp.shared_expert_gate"):
            if f"{prefix}{theirs}.scales" in names:
                layers.setdefault(rename_layer(prefix + theirs), (packing.bits, packing.group_size))
    return dataclasses.replace(config, quantization=Quantization(packing.bits, packing.group_size, layers))
