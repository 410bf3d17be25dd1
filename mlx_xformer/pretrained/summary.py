"""What a model is, in a few lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..converters import language
from ..converters.formats.source import dtype_name
from ..models.families import parameter_count, parameter_shapes
from ..storage.checkpoint import read_checkpoint
from .hub import NAMESPACE, find_kept, repository
from .loading import EMBEDDED, NAMES, resolve

# Layers, in the words of every family, encoders first; an attention layer alone has none.
_COUNTS = (
    *("num_layers", "num_stack", "encoder_layers", "num_encoder_layers"),
    *("decoder_layers", "num_decoder_layers"),
)


def describe(path_or_name: str | Path) -> str:
    """What a model is, in a few lines: its folder, family, configuration and provenance."""
    folder = resolve(path_or_name)
    checkpoint = read_checkpoint(folder)
    shapes = parameter_shapes(checkpoint.family, checkpoint.config)
    weights = checkpoint.weights
    dtypes = ", ".join(sorted({dtype_name(x.dtype) for x in weights.values()}))
    members = checkpoint.config.get("members", [checkpoint.config])
    count = parameter_count(checkpoint.family, checkpoint.config)
    lines = [
        f"{path_or_name}",
        f"  folder      {folder}",
        f"  family      {checkpoint.family}" + (f" of {len(members)}" if len(members) > 1 else ""),
        _made_of(checkpoint.family, members[0]),
        f"  weights     {len(weights)} tensors, {count:,} parameters, {dtypes}"
        + ("" if {n: x.shape for n, x in weights.items()} == shapes else " (they do not fit the configuration)"),
    ]
    for source in checkpoint.provenance.get("sources", []):
        lines.append(f"  from        {source.get('file')} (SHA-256 {source.get('sha256')})")
    if repository := checkpoint.provenance.get("repository"):
        lines.append(f"  repository  {repository} at {checkpoint.provenance.get('revision')}")
    return "\n".join(lines)


def _made_of(family: str, config: dict[str, Any]) -> str:
    """The line of what a model is about."""
    if "sources" in config:
        return f"  sources     {', '.join(config['sources'])}"
    if family != language.FAMILY:
        return f"  layers      {_layers(config)}"
    packed = config.get("quantization")
    bits = f", {packed['bits']} bits in groups of {packed['group_size']}" if packed else ""
    moe = config.get("moe")
    experts = f", {moe['num_experts']} experts, {moe['num_experts_per_tok']} a token" if moe else ""
    layers = f"{config['num_layers']} of width {config['embed_dim']}, {config['vocab_size']} tokens"
    return f"  layers      {layers}{experts}{bits}"


def _layers(config: dict[str, Any]) -> str:
    """How many layers there are, how wide they are, and the vocabulary if there is one."""
    vocabulary = config.get("vocab_size")
    config = {**config, **config.get("stack", {})}
    counts = [str(config[name]) for name in _COUNTS if config.get(name)]
    if config.get("model") == "encoder_decoder" and len(counts) == 1:  # as many again
        counts *= 2
    width = config.get("embed_dim", config.get("model_dim"))
    tokens = "" if vocabulary is None else f", {vocabulary} tokens"
    return f"{' + '.join(counts) or 1} of width {width}{tokens}"


def available() -> dict[str, str]:
    """The models that have a name, and where each is: embedded, kept from a download, or on the hub."""
    where = {}
    for name in NAMES:
        kept = find_kept(repository(NAMESPACE, name), name)
        embedded = f"in this package, {EMBEDDED[name]}" if name in EMBEDDED else None
        where[name] = embedded or (str(kept) if kept else "on the hub, downloaded on first use")
    return where
