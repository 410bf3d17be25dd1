"""The proof of every family of models, under the names of models/families.py.

A family's module has `cases(model)`: a case for every layer of a model with the model's own weights, and for the whole;
and `examples()`: small models for a proof without a checkpoint. To add a family, add its module to FAMILIES.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ...models.families import load_model
from ...storage.checkpoint import read_checkpoint
from ..samples import Case, Form, Rng, Sample
from . import bert, causal_lm, htdemucs, t5, transformer, whisper
from .common import drawn_model
from .guides import ferrotorch, llm_prep, metalaudio, scratch


class Family(Protocol):
    """What a family's module has."""

    def cases(self, model: Any) -> dict[str, Case]:
        """A case for every layer of a model, by the layer's name, and for the whole."""

    def examples(self) -> dict[str, nn.Module]:
        """Small models of the family, by what they are."""


FAMILIES: dict[str, Family] = {
    "htdemucs": htdemucs,
    "htdemucs_bag": htdemucs,
    "causal_lm": causal_lm,
    "bert": bert,
    "t5": t5,
    "whisper": whisper,
    "ferrotorch": ferrotorch,
    "scratch": scratch,
    "scratch_encoder_decoder": scratch,
    "llm_prep": llm_prep,
    "transformer": transformer,
    "metalaudio": metalaudio,
}


def model_cases(folder: str | Path) -> dict[str, Case]:
    """A case for every layer of a checkpoint with its own weights, by the layer's name, and for the whole.

    Raises:
        ValueError: As `load_model`, and if the family has no twin.
    """
    model = load_model(folder)
    family = read_checkpoint(folder).family
    if family not in FAMILIES:
        raise ValueError(f"{folder}: the family must be one of {', '.join(FAMILIES)}, got {family!r}")
    return FAMILIES[family].cases(model)


def example_case(family: Family) -> Case:
    """One case of all layers of a family's examples with drawn weights. Its samples belong to the layers' cases."""

    def samples(rng: Rng) -> Iterator[Sample]:
        for example, model in family.examples().items():
            model.update(tree_unflatten([(name, mx.array(x)) for name, x in drawn_model(model, rng).items()]))
            for layer, case in family.cases(model.eval()).items():
                for sample in case.samples(rng):
                    yield replace(sample, what=f"{example}, {layer}: {sample.what}", case=case)

    def undecided(*_: Any) -> Any:
        raise NotImplementedError("the samples of examples belong to the cases of layers")

    form: Form = undecided
    return Case(samples, form, form, float32_only=True)


EXAMPLES: dict[str, Case] = {
    f"{name}.model": example_case(family)
    for name, family in FAMILIES.items()
    if name not in ("htdemucs_bag", "scratch_encoder_decoder")  # which are among the examples of htdemucs and scratch
}
CASES: dict[str, Case] = {
    **llm_prep.CASES,
    **transformer.CASES,
    **scratch.CASES,
    **metalaudio.CASES,
    **EXAMPLES,
}
