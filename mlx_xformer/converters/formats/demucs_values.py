"""The arguments of a model of demucs as JSON text, as demucs/hf.py has them in metadata: fractions are objects."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

from ...storage.messages import shorten


def encode_value(value: Any) -> Any:
    """A fraction as JSON holds it; any other value as it is."""
    if isinstance(value, Fraction):
        return {"_type": "fraction", "numerator": value.numerator, "denominator": value.denominator}
    return value


def decode_values(key: str, text: str) -> Any:
    """The value of JSON text. ValueError names the key of the metadata that the text is from."""
    try:
        return json.loads(text, object_hook=_decode_fraction)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{key} must be JSON as demucs writes it ({shorten(error)})") from None


def _decode_fraction(value: dict[str, Any]) -> Any:
    if value.get("_type") != "fraction":
        return value
    numerator, denominator = value.get("numerator"), value.get("denominator")
    if type(numerator) is not int or type(denominator) is not int or not denominator:
        raise ValueError("a fraction must have two whole numbers")
    return Fraction(numerator, denominator)
