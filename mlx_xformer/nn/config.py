"""Config: what the configurations of layers and models share, which is reading, writing and checks of their fields."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

C = TypeVar("C", bound="Config")

# The least and the most that a field may be, under the name it has in every configuration. The most is far beyond any
# model, and below what would keep the reader of a hostile file busy.
LIMITS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("vocab_size", "source_vocab_size", "max_len", "window", "length"), (1, 10**8)),
    **dict.fromkeys(("max_positions", "source_positions", "target_positions"), (1, 10**7)),
    **dict.fromkeys(("embed_dim", "input_dim", "output_dim", "memory_dim", "model_dim", "key_dim"), (1, 10**6)),
    **dict.fromkeys(("kv_dim", "v_dim", "out_dim", "enc_out_dim", "num_buckets"), (1, 10**6)),
    **dict.fromkeys(("hidden_dim",), (1, 10**7)),
    **dict.fromkeys(("shared_dim",), (0, 10**7)),
    **dict.fromkeys(("num_heads", "num_kv_heads", "head_dim", "value_dim", "mel_bins"), (1, 10**5)),
    **dict.fromkeys(("num_experts", "num_experts_per_tok", "groups", "groups_per_tok", "num_token_types"), (1, 10**4)),
    **dict.fromkeys(("num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers", "num_stack"), (1, 1000)),
    "max_distance": (1, 10**9),
}


@dataclass(frozen=True)
class Config:
    """Base of configurations, which are frozen dataclasses that check their fields when they are made.

    A subclass names itself for messages in `_what`, and in `_parts` the fields that are configurations themselves.
    """

    _what: ClassVar[str] = "the configuration"
    _parts: ClassVar[Mapping[str, type[Config]]] = {}

    @classmethod
    def from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
        """Reads a configuration from plain values, as JSON holds them.

        Args:
            values: A value for each field; those with a default may be left out. Lists become tuples where the field
                has one, and mappings the configurations that are parts of this one.

        Raises:
            ValueError: A field is unknown, missing, of the wrong type or out of range; the message names it.
        """
        fields = dataclasses.fields(cls)
        if unknown := sorted(values.keys() - {field.name for field in fields}):
            raise ValueError(f"{cls._what} has no option named {', '.join(unknown)}")
        absent = [field for field in fields if field.name not in values]
        missing = [f.name for f in absent if f.default is f.default_factory is dataclasses.MISSING]
        if missing:
            raise ValueError(f"{cls._what} must be given {', '.join(missing)}")
        read = dict(values)
        for field in fields:
            if isinstance(read.get(field.name), list) and "tuple" in str(field.type):
                read[field.name] = tuple(read[field.name])
        for name, part in cls._parts.items():
            if isinstance(read.get(name), Mapping):
                read[name] = part.from_dict(read[name])
        return cls(**read)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    def _may_be_none(self, name: str) -> bool:
        """Whether the field is None, and is so by default."""
        return getattr(self, name) is None and type(self).__dataclass_fields__[name].default is None

    def _check_whole(self, *names: str, **limits: tuple[int, int]) -> None:
        """ValueError names a field that is no whole number within LIMITS, or within the limits given by its name."""
        for name, (least, most) in {**{name: LIMITS[name] for name in names}, **limits}.items():
            value = getattr(self, name)
            if not self._may_be_none(name) and (type(value) is not int or not least <= value <= most):
                raise ValueError(f"{name} must be a whole number from {least} to {most}, got {value!r:.80}")

    def _check_multiple(self, name: str, divisor: str) -> None:
        """ValueError unless the field `divisor` divides the field `name`; both are known to be whole numbers."""
        value, by = getattr(self, name), getattr(self, divisor)
        if value % by:
            raise ValueError(f"{name} must be a multiple of {divisor}, {by}, got {value}")

    def _check_flags(self, *names: str) -> None:
        """ValueError names a field that is neither true nor false."""
        for name in names:
            value = getattr(self, name)
            if not self._may_be_none(name) and type(value) is not bool:
                raise ValueError(f"{name} must be true or false, got {value!r:.80}")

    def _check_above_0(self, *names: str) -> None:
        """ValueError names a field that is no finite number above 0."""
        for name in names:
            value = getattr(self, name)
            if not self._may_be_none(name) and not (_is_finite(value) and value > 0):
                raise ValueError(f"{name} must be a number above 0, got {value!r:.80}")

    def _check_from_0(self, *names: str) -> None:
        """ValueError names a field that is no finite number from 0."""
        for name in names:
            value = getattr(self, name)
            if not self._may_be_none(name) and not (_is_finite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number from 0, got {value!r:.80}")

    def _check_rates(self, *names: str) -> None:
        """ValueError names a field that is no number from 0 to below 1, such as a probability of dropout."""
        for name in names:
            value = getattr(self, name)
            if not (_is_finite(value) and 0 <= value < 1):
                raise ValueError(f"{name} must be a number from 0 to below 1, got {value!r:.80}")

    def _check_one_of(self, name: str, known: Collection[str]) -> None:
        """ValueError for a field that is none of the words known."""
        value = getattr(self, name)
        if not self._may_be_none(name) and not (isinstance(value, str) and value in known):
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r:.80}")


def _is_finite(value: object) -> bool:
    """Whether the value is a number, and not one that a float cannot hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def check_eps(eps: float) -> None:
    """ValueError unless the eps of a norm is above 0: without it, inputs without deviation become NaN."""
    if not (_is_finite(eps) and eps > 0):
        raise ValueError(f"eps must be a number above 0, got {eps!r:.80}")


def check_sizes(**sizes: int) -> None:
    """ValueError names the size of a layer that is no whole number from 1."""
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ValueError(f"{name} must be a whole number from 1, got {size!r:.80}")
