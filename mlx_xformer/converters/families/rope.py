"""Scaled rotary positions in Hugging Face's words, and back. Source: transformers 5.23, modeling_rope_utils.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...nn.positions import RotaryScaling
from ..formats.torch_pickle import short

_SCALINGS = {
    "linear": {"factor"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": {
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "truncate"),
        *("mscale", "mscale_all_dim"),
    },
}


def scaling_read(given: Mapping[str, Any], trained: Any, name: str) -> RotaryScaling | None:
    """The scaling, under the `name` of its key; `trained`: positions of the training, where it names none."""
    kind = given.get("rope_type", given.get("type")) or "default"
    if kind != "default" and kind not in _SCALINGS:
        raise ValueError(f"rope_type must be one of default, {', '.join(_SCALINGS)}, got {short(str(kind))}")
    known = _SCALINGS.get(kind, set()) | {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    unknown = sorted(given.keys() - known)
    if unknown or given.get("partial_rotary_factor", 1) != 1:
        raise ValueError(
            f"{name} has keys that are not handled: {short(', '.join(unknown) or 'partial_rotary_factor')}"
        )
    if kind == "default":
        return None
    length = given.get("original_max_position_embeddings") or trained
    numbers = {key: value for key, value in given.items() if key not in ("rope_type", "type", "truncate")}
    if not all(isinstance(x, (int, float)) for x in (*numbers.values(), length or 1)) or "factor" not in given:
        raise ValueError(f"{name} must have a factor and hold numbers, got {short(str(dict(given)))}")
    if kind == "linear":
        return RotaryScaling(kind, given["factor"])
    if kind == "llama3":
        return RotaryScaling(kind, given["factor"], length, given["low_freq_factor"], given["high_freq_factor"])
    return RotaryScaling(
        kind,
        given["factor"],
        length,
        given.get("beta_slow") or 1,
        given.get("beta_fast") or 32,
        _magnitude(given),
        bool(given.get("truncate", True)),
    )


def _magnitude(given: Mapping[str, Any]) -> float:
    """YaRN's factor of queries and keys."""
    factor = given["factor"]
    if given.get("attention_factor") is not None:
        return given["attention_factor"]

    def grown(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    if given.get("mscale") and given.get("mscale_all_dim"):
        return grown(given["mscale"]) / grown(given["mscale_all_dim"])
    return grown(1.0)


def scaling_written(scaling: RotaryScaling | None) -> dict[str, Any] | None:
    """The values of a config.json that mean a scaling; None for no scaling."""
    if scaling is None:
        return None
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        values["original_max_position_embeddings"] = scaling.length
        low, high = ("low_freq_factor", "high_freq_factor") if scaling.kind == "llama3" else ("beta_slow", "beta_fast")
        values |= {low: scaling.low, high: scaling.high}
    if scaling.kind == "yarn":
        values |= {"attention_factor": scaling.magnitude, "truncate": scaling.truncate}
    return values
