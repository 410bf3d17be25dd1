"""Rotary positions in the keys of Hugging Face's config.json, and back.

Source: transformers 5.23, modeling_rope_utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...nn.rotary import RotaryScaling
from ...storage.messages import shorten

FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of layers
_SCALINGS = {
    "linear": {"factor"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": {
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "truncate"),
        *("mscale", "mscale_all_dim"),
    },
}


def read_positions(values: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """rope_theta, rope_scaling and local_rope_theta, from the keys of any age.

    Args:
        values: The config.json, with `rope_theta` and `max_position_embeddings`.
        kind: Its model_type.
    """
    given, scaled = values.get("rope_parameters") or {}, values.get("rope_scaling") or {}
    name, local = "rope_scaling" if scaled else "rope_parameters", None
    if not isinstance(given, Mapping):
        raise ValueError("rope_parameters must be an object")
    if kind == "gemma3_text":
        local = values["rope_local_base_freq"]
        if given and FULL not in given and SLIDING not in given:
            raise ValueError(f"rope_parameters must have {FULL} and {SLIDING} in a {kind}")
    if FULL in given or SLIDING in given:  # one object for each kind of layer
        if unknown := sorted(given.keys() - {FULL, SLIDING}):
            raise ValueError(f"rope_parameters has keys that are not handled: {shorten(', '.join(unknown))}")
        sliding, given = given.get(SLIDING) or {}, given.get(FULL) or {}
        if read_scaling(sliding, None, f"rope_parameters of {SLIDING}") is not None:
            raise ValueError(f"rope_type of {SLIDING} must be default, got {shorten(dict(sliding))}")
        local = sliding.get("rope_theta", local)
    if kind == "gemma3_text" and local is None:
        raise ValueError(f"rope_local_base_freq must be a number in a {kind}, got null")
    given = {**given, **scaled}
    scaling = read_scaling(given, values["max_position_embeddings"], name)
    return {
        "rope_theta": given.get("rope_theta", values["rope_theta"]),
        "rope_scaling": scaling,
        "local_rope_theta": local,
    }


def read_scaling(given: Mapping[str, Any], trained: Any, name: str) -> RotaryScaling | None:
    """The scaling.

    Args:
        given: The value of the key.
        trained: The number of positions in training, where `given` has none.
        name: The key's, for messages.
    """
    kind = given.get("rope_type", given.get("type")) or "default"
    if kind != "default" and kind not in _SCALINGS:
        raise ValueError(f"rope_type must be one of default, {', '.join(_SCALINGS)}, got {shorten(kind)}")
    known = _SCALINGS.get(kind, set()) | {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    unknown = sorted(given.keys() - known)
    if unknown or given.get("partial_rotary_factor", 1) != 1:
        raise ValueError(
            f"{name} has keys that are not handled: {shorten(', '.join(unknown) or 'partial_rotary_factor')}"
        )
    if kind == "default":
        return None
    length = given.get("original_max_position_embeddings") or trained
    numbers = {key: value for key, value in given.items() if key not in ("rope_type", "type", "truncate")}
    if not all(isinstance(x, (int, float)) for x in (*numbers.values(), length or 1)) or "factor" not in given:
        raise ValueError(f"{name} must have a factor and hold numbers, got {shorten(dict(given))}")
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


def write_scaling(scaling: RotaryScaling | None) -> dict[str, Any] | None:
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
