"""Cases, what the proof consists of; their samples; and how parameters are drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

Arrays = dict[str, np.ndarray]
Options = Mapping[str, Any]
Rng = np.random.Generator
Form = Callable[[dict, dict, Options], Any]  # (params, arrays, options) -> an array or several

# Why a vector-Jacobian product is not checked
NO_QUOTIENT = "a difference quotient of NaN is NaN"


@dataclass(frozen=True)
class Sample:
    """What an operation is called with once.

    Attributes:
        what: Its shapes and options in words.
        arrays: Float arrays by name, rounded to the dtype and differentiated by.
        options: What else the operation is called with.
        params: Parameters by their flat names, likewise rounded and differentiated by.
        strided: MLX gets views with gaps between their values.
        joint: Gradients are compared along one direction of all arrays, not along one of each.
        skip_half: Why half precisions are not checked, in words.
        skip_vjp: Why gradients are not checked, in words.
        case: The case that it belongs to, where that is not the one whose samples it is among.
    """

    what: str
    arrays: Arrays = field(default_factory=dict)
    options: Options = field(default_factory=dict)
    params: Arrays = field(default_factory=dict)
    strided: bool = False
    joint: bool = False
    skip_half: str = ""
    skip_vjp: str = ""
    case: Case | None = None


@dataclass(frozen=True)
class Case:
    """An operation, its twin and their samples.

    Attributes:
        samples: Draws the samples.
        ours: The operation in MLX.
        twin: The operation in NumPy.
        half: The factor c of the tolerance of values in half precision, see judge.py.
        half_vjp: The factor c of the tolerance of gradients in half precision.
        by_input: Tolerances are parts of the largest input as well.
        result: The dtype of the result, where it is not that of the input.
        constant: The samples have no floats.
        vjp: Whether gradients are checked.
        float32_only: Half precisions are not checked.
    """

    samples: Callable[[Rng], Iterator[Sample]]
    ours: Form
    twin: Form
    half: float = 3.0
    half_vjp: float = 4.0
    by_input: bool = False
    result: str | None = None
    constant: bool = False
    vjp: bool = True
    float32_only: bool = False


def function(called: Callable[..., Any]) -> Form:
    """The form of a function that has no parameters."""
    return lambda params, arrays, options: called(**arrays, **options)


def layer(make: Callable[..., nn.Module], *call_options: str) -> Form:
    """The form of a module: options make it, save those that belong to its call."""

    def form(params: dict, arrays: dict, options: Options) -> Any:
        made = make(**{name: value for name, value in options.items() if name not in call_options})
        return with_params(made, params)(**arrays, **{name: options[name] for name in call_options if name in options})

    return form


def with_params(module: nn.Module, params: Mapping[str, mx.array]) -> nn.Module:
    """The module, with the parameters of a flat dict."""
    module.update(tree_unflatten(list(params.items())))
    return module


def flat(module: nn.Module) -> dict[str, mx.array]:
    """The parameters of a module by their flat names."""
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(module.parameters())))


def drawn(module: nn.Module, rng: Rng) -> Arrays:
    """Parameters for a module: no gain and no bias is 0 or 1, matrices keep about unit gain."""
    params: Arrays = {}
    for name, value in flat(module).items():
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "scale":
            params[name] = rng.uniform(0.3, 0.9, size=value.shape)
        elif leaf == "bias":
            params[name] = rng.uniform(-0.2, 0.2, size=value.shape)
        elif value.ndim == 1:
            params[name] = rng.uniform(0.7, 1.3, size=value.shape)
        else:
            params[name] = rng.normal(size=value.shape) * math.prod(value.shape[1:]) ** -0.5
    return params


def signal(rng: Rng, *shape: int) -> np.ndarray:
    """Values that are neither centred nor of unit spread."""
    return rng.normal(size=shape) * 1.7 + 0.4


def described(**facts: Any) -> str:
    """Facts as "name=value name=value"; True gives the name alone, and what is None or False is left out."""
    kept = {name: value for name, value in facts.items() if value is not None and value is not False}
    return " ".join(name if value is True else f"{name}={str(value).replace(' ', '')}" for name, value in kept.items())
