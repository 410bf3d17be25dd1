"""The cross-transformer in MetalAudio's layout: 36 tensors a layer, 24 without biases, under any prefix.

Source: zkeown/MetalAudio, Sources/MetalNN/Transformer.swift (names). Projections of queries, keys and values stand in
one tensor, as in PyTorch's nn.MultiheadAttention. Neither the number of heads nor the activation is in the tensors.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import mlx.core as mx
from mlx.utils import tree_flatten

from ....models.guides.metalaudio import CrossTransformerConfig, CrossTransformerEncoder
from ....storage.messages import describe_misfits, find_misfits, shorten
from ...formats.source import read_source
from ...rules import Rule, Shape, apply_rules, inverse_shapes, invert

PREFIX = "cross_transformer"
Tensors = dict[str, mx.array]

_LEAF = "{leaf:weight|bias}"
_LAYER = "layers.{i}."
_ATTENTION = _LAYER + "{step:self|cross}_attn_{branch:time|freq}."
_FFN = _LAYER + "ffn_{branch:time|freq}.{linear:linear1|linear2}." + _LEAF
_NORM = _LAYER + "norm_{branch:time|freq}_{step:self|cross|ffn}." + _LEAF
_FIRST = "layers.0.norm_time_self.weight"


def rules(prefix: str = PREFIX) -> list[Rule]:
    """The table from the layout under `prefix`, which may be empty, to the names of CrossTransformerEncoder."""
    start = _start(prefix)
    return [
        Rule(start + _ATTENTION + "in_proj_" + _LEAF, tuple(f"{_ATTENTION}{x}_proj.{_LEAF}" for x in "qkv")),
        *(Rule(start + same, same) for same in (_ATTENTION + "out_proj." + _LEAF, _FFN, _NORM)),
    ]


def _start(prefix: str) -> str:
    """What stands before "layers"."""
    if re.search(r"[{}]|\.$", prefix):
        raise ValueError(f"prefix must have no braces and no dot at its end, got {prefix!r:.80}")
    return prefix + "." if prefix else ""


def config(
    tensors: Mapping[str, mx.array], *, num_heads: int, prefix: str = PREFIX, activation: str = "gelu_tanh"
) -> CrossTransformerConfig:
    """The configuration of the tensors under `prefix`, by the sizes that most of them have.

    It has biases if one of them is there. ValueError if no tensor there has the layout's names.
    """
    start = _start(prefix)
    own = {name.removeprefix(start): x for name, x in tensors.items() if name.startswith(start)}
    layers = {found[1] for name in own if (found := re.match(r"layers\.([0-9]+)\.", name))}
    norms = [x.shape[0] for name, x in own.items() if re.search(r"\.norm_\w+\.\w+$", name) and x.ndim == 1]
    if not layers or not norms:
        raise ValueError(f"no tensor is named {start}layers.0.norm_... ({_elsewhere(tensors)})")
    hidden = [
        x.shape[0 if linear == "linear1" else 1]
        for linear in ("linear1", "linear2")
        for name, x in own.items()
        if name.endswith(f".{linear}.weight") and x.ndim == 2
    ]
    return CrossTransformerConfig(
        embed_dim=Counter(norms).most_common(1)[0][0],
        num_heads=num_heads,
        num_layers=len(layers),
        hidden_dim=Counter(hidden).most_common(1)[0][0] if hidden else None,
        activation=activation,
        attention_bias=any(name.endswith((".in_proj_bias", ".out_proj.bias")) for name in own),
        ffn_bias=any(name.endswith((".linear1.bias", ".linear2.bias")) for name in own),
    )


def _elsewhere(names: Iterable[str]) -> str:
    """Where else the layout is, or what the names are."""
    names = sorted(names)
    found = [name.removesuffix(_FIRST).removesuffix(".") for name in names if re.search(rf"(^|\.){_FIRST}$", name)]
    if found:
        return "the prefix is " + shorten(" or ".join(map(repr, found)))
    return f"the names are {shorten(', '.join(names[:5]))}" if names else "there is no tensor at all"


def to_mlx(tensors: Mapping[str, mx.array], config: CrossTransformerConfig, prefix: str = PREFIX) -> Tensors:
    """Renames the tensors of MetalAudio. They keep their dtype and bits.

    Args:
        tensors: By name; those outside `prefix` belong to other modules.
        config: That of the encoder.
        prefix: What stands before the names, without the dot.

    Returns:
        The tensors under the names of CrossTransformerEncoder.

    Raises:
        ValueError: The message lists all that are missing, unexpected, misshapen or not of floats.
    """
    start, table = _start(prefix), rules(prefix)
    own = {name: x for name, x in tensors.items() if name.startswith(start)}
    shapes = _shapes(config)
    _check_fit(own, inverse_shapes(table, shapes))
    return apply_rules(table, own, shapes)


def to_metalaudio(weights: Mapping[str, mx.array], config: CrossTransformerConfig, prefix: str = PREFIX) -> Tensors:
    """The inverse of `to_mlx`, as strict."""
    _check_fit(weights, _shapes(config))
    table = rules(prefix)
    return apply_rules(invert(table), weights, inverse_shapes(table, _shapes(config)))


def _check_fit(tensors: Mapping[str, mx.array], expected: Mapping[str, Shape]) -> None:
    problems = find_misfits(tensors, expected)
    for name in tensors.keys() & expected.keys():
        if not mx.issubdtype(tensors[name].dtype, mx.floating):
            problems.append(("no float", f"{name} is {tensors[name].dtype}"))
    if problems:
        raise ValueError(describe_misfits(problems))


def _shapes(config: CrossTransformerConfig) -> dict[str, Shape]:
    parameters = tree_flatten(CrossTransformerEncoder(config).parameters())  # lazy, never computed
    return {name: x.shape for name, x in cast(list[tuple[str, mx.array]], parameters)}


def load(
    path: str | Path, *, num_heads: int, prefix: str = PREFIX, activation: str = "gelu_tanh"
) -> CrossTransformerEncoder:
    """The encoder of a file (all that `source.read_source` reads), in float32 and ready to run.

    ValueError or OSError begins with the path.
    """
    tensors = read_source(path).tensors
    try:
        found = config(tensors, num_heads=num_heads, prefix=prefix, activation=activation)
        weights = to_mlx(tensors, found, prefix)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    model = CrossTransformerEncoder(found)
    # MLX has float64 on the CPU alone.
    model.load_weights([(name, x.astype(mx.float32, stream=mx.cpu)) for name, x in weights.items()], strict=True)
    model.eval()
    mx.eval(model.parameters())
    return model
