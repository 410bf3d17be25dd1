"""The layers of a converted Whisper with its own weights, then both sides whole, the decoder through caches as well.

Axes: B batch, T frames, S positions of the memory, L tokens, E embed_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...models.whisper import Whisper, WhisperConfig
from ...nn.cache import CrossCache
from ...nn.transformer import Layer
from ...reference.models import whisper as twin
from ..samples import Arrays, Case, Options, Rng, Sample, described, flat, with_params

_FRAMES, _TOKENS, _MEMORY = 22, 13, 7
_CHUNKS = (4, 1, 5, 1, 2)  # tokens that go through the caches at once, as many as _TOKENS


def whisper_cases(model: Whisper) -> dict[str, Case]:
    """A case for the convolutions, for every layer, for the tables, for the encoder, for the decoder, and for the
    decoder through caches."""
    config, E = model.config, model.config.embed_dim
    frames = min(_FRAMES, 2 * config.source_positions)
    mel = {"mel": (1, frames, config.mel_bins)}
    heard = {"memory": (1, _MEMORY, E)}
    encoder, decoder = _floats(model.encoder), _floats(model.decoder)
    scale = float(np.abs(decoder["embed_tokens.weight"]).mean())
    tokens = min(_TOKENS, config.target_positions)
    spoken = {"x": (1, tokens, E), **heard}
    cases = {"encoder.embed": _fixed(model.encoder.embed, lambda **x: twin.convolved(encoder, **x), mel)}
    for name, stack in (("encoder", model.encoder.stack), ("decoder", model.decoder.stack)):
        for index, own in enumerate(stack.layers):
            cases[f"{name}.stack.layers.{index}"] = _layer(own, config, decoder=name == "decoder")
    cases["encoder"] = _fixed(model.encoder, lambda **x: twin.encoder(encoder, config, **x), mel, vjp=False)
    cases["decoder.embed"] = _table(model, decoder, tokens)
    cases["logits"] = _fixed(model.decoder.logits, lambda **x: twin.logits(decoder, **x), {"x": (1, 3, E)})

    def whole(ours: Callable[..., mx.array], note: str = "") -> Case:
        theirs = lambda **x: twin.from_embedded(decoder, config, **x)  # noqa: E731
        return _fixed(ours, theirs, spoken, vjp=False, scale=scale, note=note)

    cases["decoder"] = whole(lambda x, memory: model.decoder.logits(model.decoder.stack(x, memory)))
    if tokens == _TOKENS:
        chunks = f", in chunks of {', '.join(map(str, _CHUNKS))}"
        cases["decoder, cached"] = whole(lambda x, memory: _cached(model, x, memory), chunks)
    return cases


def _cached(model: Whisper, x: mx.array, memory: mx.array) -> mx.array:
    """Embedded tokens (1, L, E), some at a time, with the memory's keys and values made once -> logits (1, L, V)."""
    stack, at, parts = model.decoder.stack, 0, []
    caches, crosses = stack.make_caches(), [CrossCache() for _ in stack.layers]
    for n in _CHUNKS:
        part = stack(x[:, at : at + n], memory, caches=caches, cross_caches=crosses)
        parts.append(model.decoder.logits(part))
        at += n
    return mx.concatenate(parts, axis=1)


def _floats(module: nn.Module) -> Arrays:
    return {name: np.array(x.astype(mx.float32)) for name, x in flat(module).items()}


def _layer(own: Layer, config: WhisperConfig, *, decoder: bool) -> Case:
    """A layer, differentiated by its weights as well."""
    params, E = _floats(own), config.embed_dim
    sizes = {"x": (2, _TOKENS, E), **({"memory": (2, _MEMORY, E)} if decoder else {})}

    def samples(rng: Rng) -> Iterator[Sample]:
        arrays = {name: rng.normal(size=shape) for name, shape in sizes.items()}
        yield Sample(described(**sizes), arrays, {}, params, joint=True)

    def ours(given: dict, arrays: dict, _: Options) -> Any:
        return with_params(own, given)(*arrays.values())

    return Case(samples, ours, lambda given, arrays, _: twin.layer(given, config, *arrays.values()))


def _table(model: Whisper, weights: Arrays, length: int) -> Case:
    """A look-up of tokens (2, L), and their positions."""

    def samples(rng: Rng) -> Iterator[Sample]:
        tokens = rng.integers(0, model.config.vocab_size, (2, length))
        yield Sample(described(tokens=tokens.shape), {}, {"tokens": tokens})

    return Case(
        samples,
        lambda _, __, options: model.decoder.embed(mx.array(options["tokens"])),
        lambda _, __, options: twin.embed(weights, options["tokens"]),
        vjp=False,
    )


def _fixed(
    ours: Callable[..., mx.array],
    theirs: Callable[..., np.ndarray],
    sizes: Mapping[str, tuple[int, ...]],
    *,
    vjp: bool = True,
    scale: float = 1.0,
    note: str = "",
) -> Case:
    """A function of arrays of these sizes whose weights stay as they are; `scale` is that of x."""

    def samples(rng: Rng) -> Iterator[Sample]:
        arrays = {name: rng.normal(size=shape) * (scale if name == "x" else 1.0) for name, shape in sizes.items()}
        yield Sample(described(**sizes) + note, arrays)

    return Case(samples, lambda _, arrays, __: ours(**arrays), lambda _, arrays, __: theirs(**arrays), vjp=vjp)
