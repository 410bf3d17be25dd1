"""The models of llm_prep: a regression, an autoregressive model and an encoder-decoder.

Source: venkatvi/llm_prep (names). The regression and the autoregressive model have the same tensors: the setting
`model` says which it is. Settings also give num_heads and, of a mixture, the capacity and the number of experts a token
(topk). The tables of positions are dropped, as they are computed here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ....models.guides.llm_prep import FFNConfig, SequenceCheckpoint, SequenceConfig
from ...converter import Converter
from ...formats import config_keys
from ...layouts import Stack
from ...rules import Rule
from ...stored import Tensors

_LEAF = "{leaf:weight|bias}"
_PROJECTION = "{part:q_proj|k_proj|v_proj|out_proj}."
_LINEAR = {"layer_1": "linear1", "layer_2": "linear2"}
_MIXTURE = ("capacity", "topk", "alpha")
_SETTINGS = ("model", "num_heads", "max_len", *_MIXTURE)


def detect(tensors: Tensors) -> str | None:
    """Why the tensors are one of the models, by the names of projections; None if they are not."""
    pair = {"encoder_input_proj.weight", "decoder_layers.0.self_attention.q_proj.weight"}
    if pair <= tensors.keys():
        return "the tensors have the names of llm_prep's EncoderDecoder, such as encoder_input_proj.weight"
    if {"input_proj.weight", "layers.0.attn.q_proj.weight", "layers.0.norm_1.weight"} <= tensors.keys():
        return "the tensors have the names of llm_prep's TransformerModel, such as layers.0.attn.q_proj.weight"
    return None


def config(values: Mapping[str, Any], tensors: Tensors) -> SequenceCheckpoint:
    """The configuration: sizes from the shapes, the rest from the settings. ValueError names what is missing."""
    config_keys.check_settings(values, _SETTINGS, [])
    pair = "encoder_input_proj.weight" in tensors
    model = values.get("model", "encoder_decoder" if pair else None)
    if model not in (("encoder_decoder",) if pair else ("regression", "autoregressive")):
        known = "encoder_decoder" if pair else "regression or autoregressive, as their tensors are the same"
        raise ValueError(f"model must be set to {known}, got {model!r:.80}")
    if type(values.get("num_heads")) is not int or values["num_heads"] < 1:
        raise ValueError(f"num_heads must be set (--set num_heads=8), got {values.get('num_heads')!r:.80}")
    start = "encoder_layers" if pair else "layers"
    first = "encoder_input_proj.weight" if pair else "input_proj.weight"
    embed_dim, input_dim = (config_keys.read_size(tensors, first, axis) for axis in (0, 1))
    theirs = tensors["decoder_input_proj.weight"].shape if pair else (embed_dim, input_dim)
    if theirs != (embed_dim, input_dim):
        raise ValueError(f"decoder_input_proj.weight must be {(embed_dim, input_dim)}, as the encoder's, got {theirs}")
    heads, rows = values["num_heads"], config_keys.read_size(tensors, f"{start}.0.attn.k_proj.weight", 0)
    groups, left = divmod(rows * heads, embed_dim)
    if left:
        raise ValueError(f"num_heads must divide the rows of the keys, {rows}, into heads, got {heads}")
    kinds = {heads: ("mha", None), 1: ("mqa", None)}
    attention_type, num_kv_heads = kinds.get(groups, ("gqa", groups))
    return SequenceCheckpoint(
        model,
        SequenceConfig(
            input_dim=input_dim,
            output_dim=config_keys.read_size(tensors, "out_proj.weight", 0),
            embed_dim=embed_dim,
            num_layers=_count(tensors, start),
            num_heads=heads,
            attention_type=attention_type,
            num_kv_heads=num_kv_heads,
            ffn=_ffn(values, tensors, start, embed_dim),
            max_len=_max_len(values, tensors, pair),
            num_decoder_layers=_count(tensors, "decoder_layers") if pair else None,
        ),
    )


def _count(tensors: Tensors, start: str) -> int:
    return len({name.split(".")[1] for name in tensors if name.startswith(f"{start}.")})


def _ffn(values: Mapping[str, Any], tensors: Tensors, start: str, embed_dim: int) -> FFNConfig:
    """The feed-forward network, which is the same in all layers."""
    router = f"{start}.0.ffn.router.weight"
    if router not in tensors:
        if odd := [name for name in _MIXTURE if name in values]:
            raise ValueError(f"{', '.join(odd)} must not be set for a model without mixtures")
        return FFNConfig(embed_dim, config_keys.read_size(tensors, f"{start}.0.ffn.layer_1.weight", 0))
    missing = [name for name in ("capacity", "topk") if name not in values]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be set for a model with mixtures (--set capacity=64)")
    hidden = config_keys.read_size(tensors, f"{start}.0.ffn.experts.0.layer_1.weight", 0)
    given = {name: values[name] for name in _MIXTURE if name in values}
    return FFNConfig(
        embed_dim,
        hidden,
        use_moe=True,
        num_experts=config_keys.read_size(tensors, router, 0),
        renormalize=True,
        **{"alpha": 0.01, **given},
    )


def _max_len(values: Mapping[str, Any], tensors: Tensors, pair: bool) -> int:
    """The number of positions: as set, or as the tables have."""
    tables = [tensors[name].shape for name in (("encoder_pe.pe", "decoder_pe.pe") if pair else ("pe.pe",))
              if name in tensors]  # fmt: skip
    lengths = [shape[-2] for shape in tables if len(shape) > 1]
    known = min(lengths, default=None)
    length = values.get("max_len", known)
    if length is None or (known is not None and length > known):
        raise ValueError(f"max_len must be set to at most what the table of positions has, {known}, got {length}")
    return length


def rules(config: SequenceCheckpoint, names: Collection[str] = ()) -> list[Rule]:
    """The table from llm_prep's names."""
    pair = config.model == "encoder_decoder"
    encoder = ("encoder_layers.{i}.", "encoder.layers.{i}.") if pair else ("layers.{i}.", "stack.layers.{i}.")
    whole = ["encoder_input_proj", "decoder_input_proj", "out_proj"] if pair else ["input_proj", "out_proj"]
    table = [Rule(f"{name}.{_LEAF}", f"{name}.{_LEAF}") for name in whole]
    table += [Rule(name, None) for name in (("encoder_pe.pe", "decoder_pe.pe") if pair else ("pe.pe",))]
    table += _layer(*encoder, {"attn": "self_attn"}, {"norm_1": "norm1", "norm_2": "norm3"}, config.config)
    if pair:
        attentions = {"self_attention": "self_attn", "cross_attention": "cross_attn"}
        norms = {f"layer_norm_{n}": f"norm{n}" for n in (1, 2, 3)}
        table += _layer("decoder_layers.{i}.", "decoder.layers.{i}.", attentions, norms, config.config)
    return table


def _layer(
    theirs: str, ours: str, attentions: Mapping[str, str], norms: Mapping[str, str], config: SequenceConfig
) -> list[Rule]:
    table = [
        Rule(f"{theirs}{name}.{_PROJECTION}{_LEAF}", f"{ours}{own}.{_PROJECTION}{_LEAF}")
        for name, own in attentions.items()
    ]
    table += [Rule(f"{theirs}{name}.{_LEAF}", f"{ours}{own}.{_LEAF}") for name, own in norms.items()]
    assert config.ffn is not None  # for the type checker: it has been set
    if not config.ffn.use_moe:
        return table + [Rule(f"{theirs}ffn.{a}.{_LEAF}", f"{ours}mlp.{b}.{_LEAF}") for a, b in _LINEAR.items()]
    count = config.ffn.num_experts
    for a, b in _LINEAR.items():
        experts = tuple(f"{theirs}ffn.experts.{e}.{a}.{_LEAF}" for e in range(count))
        table.append(Rule(experts, f"{ours}mlp.experts.{b}.{_LEAF}", (Stack(count),)))
        table.append(Rule(f"{theirs}ffn.overflow_expert.{a}.{_LEAF}", f"{ours}mlp.overflow_expert.{b}.{_LEAF}"))
    return [*table, Rule(f"{theirs}ffn.router.{_LEAF}", f"{ours}mlp.router.{_LEAF}")]


def original(config: SequenceCheckpoint) -> dict[str, Any]:
    """The settings that mean the configuration."""
    sizes = config.config
    assert sizes.ffn is not None  # for the type checker: it has been set
    values: dict[str, Any] = {"model": config.model, "num_heads": sizes.num_heads, "max_len": sizes.max_len}
    if sizes.ffn.use_moe:
        values |= {name: getattr(sizes.ffn, name) for name in _MIXTURE}
    return values


CONVERTERS = (Converter("llm_prep", "llm_prep", config, rules, original, detect=detect),)
