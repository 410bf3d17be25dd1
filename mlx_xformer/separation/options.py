"""How a model is applied to a track, and what follows for its segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..backend import device
from ..models.htdemucs import HTDemucsConfig, InferenceMode

OtherMethod = Literal["add", "minus", "none"]
_PEAK_BYTES = 72  # that a segment takes per sample and channel of the first layer


@dataclass(frozen=True)
class Options:
    """How a model is applied to a track. `Separator` explains the fields.

    Raises:
        ValueError: if a field is out of range.
    """

    shifts: int = 1
    overlap: float = 0.25
    segment: float | None = None
    transition_power: float = 1.0
    seed: int = 0
    batch_size: int | None = None
    stems: Sequence[str] | None = None
    two_stems: str | None = None
    other_method: OtherMethod = "add"
    mode: InferenceMode = InferenceMode.FULL

    def __post_init__(self) -> None:
        if self.shifts < 0:
            raise ValueError(f"shifts must be at least 0, got {self.shifts}")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap must be at least 0 and below 1, got {self.overlap}")
        if not self.transition_power >= 1:
            raise ValueError(f"transition_power must be at least 1, got {self.transition_power}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if isinstance(self.stems, str):
            raise ValueError(f"stems must be a sequence of names, got {self.stems!r}")
        if self.stems is not None:
            object.__setattr__(self, "stems", tuple(self.stems))
        if self.stems is not None and self.two_stems is not None:
            raise ValueError(f"stems and two_stems exclude each other, got {self.stems} and {self.two_stems!r}")
        if self.other_method not in ("add", "minus", "none"):
            raise ValueError(f'other_method must be "add", "minus" or "none", got {self.other_method!r}')
        object.__setattr__(self, "mode", InferenceMode(self.mode))

    def check(self, config: HTDemucsConfig) -> None:
        """Checks that a model of this configuration can be applied with these options.

        Raises:
            ValueError: if it cannot.
        """
        longest = float(config.segment)
        if self.segment is not None and not 0 < self.segment <= longest:
            given = float(self.segment)
            raise ValueError(f"segment must be above 0 and at most the model's {longest:g} s, got {given:g}")
        if self.samples(config) < 1:
            raise ValueError(f"segment must hold a sample or more, got {float(self.segment or longest):g} s")
        if self.stride(config) < 1:
            raise ValueError(f"overlap must leave a stride of a sample or more, got {self.overlap}")
        if transition_weight(self.samples(config), self.transition_power).min() < 1e-30:
            raise ValueError(f"transition_power must leave every sample some weight, got {self.transition_power:g}")
        self.wanted(config.sources)

    def samples(self, config: HTDemucsConfig) -> int:
        """The samples of one segment."""
        return int(config.samplerate * (config.segment if self.segment is None else self.segment))

    def stride(self, config: HTDemucsConfig) -> int:
        """The samples from the start of one segment to the start of the next."""
        return int((1 - self.overlap) * self.samples(config))

    def wanted(self, sources: tuple[str, ...]) -> list[int]:
        """The indices of the sources that must be computed, in the model's order."""
        if self.two_stems is not None:
            if self.two_stems not in sources:
                raise ValueError(f"two_stems must be one of {', '.join(sources)}, got {self.two_stems}")
            return [i for i, name in enumerate(sources) if self.other_method == "add" or name == self.two_stems]
        unknown = [str(stem) for stem in self.stems or () if stem not in sources]
        if unknown or (self.stems is not None and not self.stems):
            raise ValueError(f"stems must be among {', '.join(sources)}, got {', '.join(unknown) or 'none'}")
        return [i for i, name in enumerate(sources) if self.stems is None or name in self.stems]

    def names(self, sources: tuple[str, ...]) -> list[str]:
        """The names of the stems that come out, as demucs has them."""
        if self.two_stems is None:
            return [sources[i] for i in self.wanted(sources)]
        other = {"add": [f"no_{self.two_stems}"], "minus": [f"minus_{self.two_stems}"], "none": []}
        return [self.two_stems, *other[self.other_method]]

    def subtracts(self, sources: tuple[str, ...]) -> bool:
        """Whether the rest of `two_stems` is the mix minus the stem; of a single source there are no others to add."""
        adds = self.other_method == "add" and len(sources) > 1
        return self.two_stems is not None and self.other_method != "none" and not adds

    def batch(self, config: HTDemucsConfig) -> int:
        """How many segments run at once: batch_size, or by default as many as suit the device and its memory."""
        if not config.use_train_segment and self.segment is None:
            return 1  # the last segment is shorter than the others
        return self.batch_size or device.batch_size(_PEAK_BYTES * self.samples(config) * config.channels)


def transition_weight(length: int, power: float) -> np.ndarray:
    """Returns the weights (length,) of a segment's samples: a triangle with its maximum at 1, to the given power."""
    half = length // 2
    triangle = np.concatenate([np.arange(1, half + 1), np.arange(length - half, 0, -1)]).astype(np.float32)
    return (triangle / triangle.max()) ** np.float32(power)
