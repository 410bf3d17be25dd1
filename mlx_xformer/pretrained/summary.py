"""What a model is, in a few lines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..converters.stored import dtype_name
from ..models.families import make_config, parameter_count, parameter_shapes
from ..storage.checkpoint import read_checkpoint
from ..storage.messages import find_misfits
from .hub import NAMESPACE, find_kept, name_repository
from .loading import EMBEDDED, NAMES, resolve

# What is known of the licence of the weights that demucs' authors released; see README.md.
LICENCE = "the code is MIT; the released HTDemucs weights carry no clear licence"
_RELEASED = ("955717e8", "f7e0c4bc", "d12395a8", "92cfc3b6", "04573f0d", "5c90dfd2")  # how their files' names begin
# The fields of configurations that count layers, encoders first; an attention layer alone has none.
_COUNTS = (
    *("num_layers", "num_stack", "encoder_layers", "num_encoder_layers"),
    *("decoder_layers", "num_decoder_layers"),
)


def describe(path_or_name: str | Path) -> str:
    """Describes a model: its folder, family, configuration and provenance.

    Args:
        path_or_name: What `load` takes.

    Returns:
        A line for each fact.
    """
    folder = resolve(path_or_name)
    checkpoint = read_checkpoint(folder)
    try:
        config = make_config(checkpoint.family, checkpoint.config).to_dict()
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    weights, shapes = checkpoint.weights, parameter_shapes(checkpoint.family, config)
    dtypes = ", ".join(sorted({dtype_name(x.dtype) for x in weights.values()}))
    members = config.get("members", [config])
    count = parameter_count(checkpoint.family, config)
    fits = "" if not find_misfits(weights, shapes) else " (they do not fit the configuration)"
    lines = [
        f"{path_or_name}",
        f"  folder      {folder}",
        f"  family      {checkpoint.family}" + (f" of {len(members)}" if len(members) > 1 else ""),
        _describe_layers(members[0]),
        f"  weights     {len(weights)} tensors, {count:,} parameters, {dtypes}{fits}",
    ]
    for source in checkpoint.provenance.get("sources", []):
        lines.append(f"  from        {source.get('file')} (SHA-256 {source.get('sha256')})")
    if repository := checkpoint.provenance.get("repository"):
        lines.append(f"  repository  {repository} at {checkpoint.provenance.get('revision')}")
    if _is_released(checkpoint.provenance):
        lines.append(f"  licence     {LICENCE}")
    return "\n".join(lines)


def _is_released(provenance: Mapping[str, Any]) -> bool:
    """Whether a checkpoint holds weights that demucs' authors released."""
    names = [str(source.get("file")) for source in provenance.get("sources", [])]
    hub = str(provenance.get("repository", "")).startswith(f"{NAMESPACE}/")
    return hub or any(name.startswith(_RELEASED) for name in names)


def _describe_layers(config: Mapping[str, Any]) -> str:
    """The line of what is inside: sources of a separator; else layers, their width, the vocabulary and experts."""
    if "sources" in config:
        return f"  sources     {', '.join(config['sources'])}"
    vocabulary, packed, moe = (config.get(name) for name in ("vocab_size", "quantization", "moe"))
    sizes = {**config, **config.get("stack", {})}
    counts = [str(sizes[name]) for name in _COUNTS if sizes.get(name)]
    if config.get("model") == "encoder_decoder" and len(counts) == 1:  # the decoder has as many layers
        counts *= 2
    width = sizes.get("embed_dim", sizes.get("model_dim"))
    tokens = "" if vocabulary is None else f", {vocabulary} tokens"
    experts = f", {moe['num_experts']} experts, {moe['num_experts_per_tok']} a token" if moe else ""
    bits = f", {packed['bits']} bits in groups of {packed['group_size']}" if packed else ""
    return f"  layers      {' + '.join(counts) or 1} of width {width}{tokens}{experts}{bits}"


def available() -> dict[str, str]:
    """The models that have a name, and where each is: in this package, in the cache, or on the hub."""
    where = {}
    for name in NAMES:
        kept = find_kept(name_repository(NAMESPACE, name), name)
        embedded = f"in this package, {EMBEDDED[name]}" if name in EMBEDDED else None
        where[name] = embedded or (str(kept) if kept else "on the hub, downloaded on first use")
    return where
