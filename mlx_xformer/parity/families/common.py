"""What the proofs of all families share: cases of layers with the model's own weights, and models fed in chunks.

Axes: B batch, L positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..samples import Arrays, Case, Form, Options, Rng, Sample, described, drawn, flat, with_params

CHUNKS = (4, 1, 5, 1, 2)  # positions that go through the caches at once, 13 in all
Given = Mapping[str, Any]  # what a sample is called with, by name: the shape of a normal array, or an option


def weights_of(module: nn.Module) -> Arrays:
    """The parameters by their flat names, floats in float32."""
    return {
        name: np.array(x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x)
        for name, x in flat(module).items()
    }


def drawn_smooth(model: nn.Module, rng: Rng) -> Arrays:
    """Parameters for a model, as `drawn`, with experts of about unit gain, and with biases that keep ReLU far from 0,
    where it has no derivative."""
    params = drawn(model, rng)
    for name, value in params.items():
        if value.ndim == 3:
            params[name] = rng.normal(size=value.shape) * value.shape[-1] ** -0.5
        elif name.endswith("linear1.bias"):
            params[name] = rng.uniform(22, 23, value.shape) * rng.choice([-1, 1], value.shape)
    return params


def drawn_model(model: nn.Module, rng: Rng) -> Arrays:
    """Weights for a model in the dtypes that it computes in: floats as `drawn` in float32, packed matrices of about
    unit gain."""
    params = {name: x.astype(np.float32) for name, x in drawn(model, rng).items()}
    for name, layer in model.named_modules():
        if "scales" in layer:
            words, groups = layer.weight.shape, layer.scales.shape
            width = groups[-1] * layer.group_size
            scales = rng.uniform(1, 2, groups) * 2.0 ** (1 - layer.bits) * width**-0.5
            params[f"{name}.weight"] = rng.integers(0, 2**32, words, dtype=np.uint32)
            params[f"{name}.scales"] = scales.astype(np.float32)
            params[f"{name}.biases"] = (-scales * 2 ** (layer.bits - 1)).astype(np.float32)
    return params


def padding(rng: Rng, batch: int, length: int) -> np.ndarray:
    """A mask (B, L): some positions of each row, among them its first; in the last row no others."""
    mask = rng.random((batch, length)) > 0.4
    mask[:, 0], mask[-1, 1:] = True, False
    return mask


def _sample(rng: Rng, given: Given, note: str = "", **more: Any) -> Sample:
    shapes = {name: value for name, value in given.items() if isinstance(value, tuple)}
    arrays = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    options = {name: value for name, value in given.items() if name not in shapes}
    return Sample(described(**shapes) + note, arrays, options, **more)


def layer_case(
    module: nn.Module,
    twin: Form,
    samples: Sequence[Given],
    *,
    call: Callable[..., Any] | None = None,
    note: str = "",
) -> Case:
    """A layer with its own weights, which are differentiated by as well.

    Args:
        module: The layer.
        twin: The twin, of (params, arrays, options).
        samples: What the layer is given: a tuple is the shape of a normal array, all else an option.
        call: How the layer is called, call(module, **arrays, **options); by default module(**arrays, **options).
        note: Ends the descriptions of the samples.
    """

    def drawn_samples(rng: Rng) -> Iterator[Sample]:
        for given in samples:
            yield _sample(rng, given, note, params=weights_of(module), joint=True)

    def ours(params: dict, arrays: dict, options: Options) -> Any:
        ready = with_params(module, params)
        return ready(**arrays, **options) if call is None else call(ready, **arrays, **options)

    return Case(drawn_samples, ours, twin)


def fixed_case(
    ours: Callable[..., Any],
    twin: Callable[..., Any],
    samples: Sequence[Given],
    *,
    scale: float = 1.0,
    vjp: bool = True,
    note: str = "",
) -> Case:
    """A function whose weights stay as they are: there may be too many to differentiate by.

    Args:
        ours: The function in MLX, ours(**arrays, **options).
        twin: The function in NumPy, called alike.
        samples: What the function is given: a tuple is the shape of a normal array, all else an option.
        scale: Of the array x, which stands for embedded tokens.
        vjp: Whether gradients are compared. That of many layers is not, which rounding alone moves by 1e-3: each of
            them has a case of its own.
        note: Ends the descriptions of the samples.
    """

    def drawn_samples(rng: Rng) -> Iterator[Sample]:
        for given in samples:
            sample = _sample(rng, given, note)
            if "x" in sample.arrays:
                sample.arrays["x"] *= scale
            yield sample

    def form(called: Callable[..., Any]) -> Form:
        return lambda _, arrays, options: called(**arrays, **options)

    return Case(drawn_samples, form(ours), form(twin), vjp=vjp)


def table_case(
    ours: Callable[[mx.array], mx.array],
    twin: Callable[[np.ndarray], np.ndarray],
    vocab_size: int,
    lengths: Sequence[int],
) -> Case:
    """A look-up of tokens (2, L), for each L of `lengths`."""

    def samples(rng: Rng) -> Iterator[Sample]:
        for L in lengths:
            yield Sample(described(tokens=(2, L)), {}, {"tokens": rng.integers(0, vocab_size, (2, L))})

    return Case(
        samples,
        lambda _, __, options: ours(mx.array(options["tokens"])),
        lambda _, __, options: twin(options["tokens"]),
        vjp=False,
    )


def in_chunks(step: Callable[[mx.array], mx.array], x: mx.array, chunks: Sequence[int] = CHUNKS) -> mx.array:
    """The results of `step` for x (B, L, ...), some positions at a time, joined along L."""
    parts, at = [], 0
    for n in chunks:
        if at < x.shape[1]:
            parts.append(step(x[:, at : at + n]))
        at += n
    return mx.concatenate(parts, axis=1)


def of_length(samples: Callable[[Rng], Iterator[Sample]], length: int) -> Callable[[Rng], Iterator[Sample]]:
    """Of samples of several lengths those of this one, by their descriptions."""
    return lambda rng: (sample for sample in samples(rng) if f",{length})" in sample.what)


def chunks_in_words(chunks: Sequence[int] = CHUNKS) -> str:
    """The end of a sample's description."""
    return f", in chunks of {', '.join(map(str, chunks))}"
