"""T5: its layers with the model's own weights, then both sides, the decoder through caches as well.

Axes: B batch, S positions of the text, L positions of the answer, H heads, E embed_dim, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...models.t5 import T5, Side, T5Config
from ...nn.cache import CrossCache
from ...reference.models import t5 as twin
from ...reference.nn.transformer import layer as layer_twin
from ..samples import Arrays, Case, Form, Options, Rng, Sample, described, with_params
from .common import in_chunks, layer_case, weights_of

_SIZES = ((1, 3), (13, 7))  # positions of the text, and of the answer
_CHUNKS = (4, 1, 2)  # positions of the longest answer that go through the caches at once


def examples() -> dict[str, nn.Module]:
    """Small models by what they are."""
    sizes: dict[str, Any] = {
        "vocab_size": 37,
        "embed_dim": 17,
        "num_layers": 2,
        "num_heads": 3,
        "head_dim": 5,
        "hidden_dim": 29,
    }
    buckets: dict[str, Any] = {"num_buckets": 8, "max_distance": 11}
    gated: dict[str, Any] = {"num_decoder_layers": 3, "activation": "gelu_tanh", "gated": True}
    return {
        "base": T5(T5Config(**sizes, **buckets)),
        "gated, with a head of its own": T5(T5Config(**sizes, **gated, tie_embeddings=False, scale_logits=False)),
    }


def cases(model: T5) -> dict[str, Case]:
    """A case for the bias of each side, for every layer, for the head, for the encoder, and for the decoder at once and
    through caches."""
    config, weights = model.config, weights_of(model)
    found: dict[str, Case] = {}
    for name in ("encoder", "decoder"):
        found[f"{name}.relative"] = _bias(model[name])
        for index in range(len(model[name].stack.layers)):
            found[f"{name}.stack.layers.{index}"] = _layer(model[name], index)

    def encoded(x: mx.array, mask: mx.array) -> mx.array:
        return model.encoder(x, mask=mask[:, None, None])

    def at_once(x: mx.array, memory: mx.array, mask: mx.array) -> mx.array:
        return model.logits(model.decoder(x, memory, memory_mask=mask[:, None, None]))

    def cached(x: mx.array, memory: mx.array, mask: mx.array) -> mx.array:
        caches = model.make_caches()
        given: dict[str, Any] = {"caches": caches, "cross_caches": [CrossCache() for _ in caches]}
        given["memory_mask"] = mask[:, None, None]
        return in_chunks(lambda part: model.logits(model.decoder(part, memory, **given)), x, _CHUNKS)

    def decoded(x: np.ndarray, memory: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return twin.logits(weights, config, twin.decode(weights, config, x, memory, mask))

    found["logits"] = _embedded(
        model, lambda x, _: model.logits(x), lambda x, _: twin.logits(weights, config, x), ("answer",), vjp=True
    )
    found["encoder"] = _embedded(model, encoded, lambda x, mask: twin.encode(weights, config, x, mask), ("text",))
    found["decoder"] = _embedded(model, at_once, decoded, ("answer", "text"))
    found["decoder, cached"] = _embedded(model, cached, decoded, ("answer", "text"))
    return found


def _bias(side: Side) -> Case:
    """What a side adds to scores of as many queries as keys."""
    causal = side.stack.config.causal

    def samples(rng: Rng) -> Iterator[Sample]:
        for length in (1, 2, 53):
            params = {"relative.weight": weights_of(side.relative)["weight"]}
            yield Sample(described(length=length), {}, {"length": length}, params)

    def ours(params: dict, _: dict, options: Options) -> mx.array:
        return with_params(side, params).bias(options["length"], options["length"])

    def theirs(params: Arrays, _: Arrays, options: Options) -> np.ndarray:
        return twin.bias(params, side.config, options["length"], bidirectional=not causal)

    return Case(samples, ours, theirs)


def _layer(side: Side, index: int) -> Case:
    """A layer with a bias and hidden positions of the text."""
    config, cross = side.config, side.stack.config.cross
    S, L = _SIZES[-1]
    length, mask = L if cross else S, _mask(S)[:, None, None]
    given: dict[str, Any] = {"x": (2, length, config.embed_dim)}
    given |= {"memory": (2, S, config.embed_dim), "memory_mask": mask} if cross else {"mask": mask}
    given["bias"] = (config.num_heads, length, length)
    kind = twin.layer_config(config, decoder=cross)

    def theirs(params: Arrays, arrays: Arrays, options: Options) -> np.ndarray:
        return layer_twin(params, kind, **arrays, **options)

    return layer_case(side.stack.layers[index], theirs, [given])


def _mask(S: int) -> np.ndarray:
    """(2, S): all positions of the first row, and about half of the second."""
    return np.arange(S)[None] < np.array([S, (S + 1) // 2])[:, None]


def _embedded(
    model: T5,
    ours: Callable[..., mx.array],
    theirs: Callable[..., np.ndarray],
    given: tuple[str, ...],
    *,
    vjp: bool = False,
) -> Case:
    """A function of the embedded tokens `given` ("text", "answer") and of the mask of the text, whose weights stay as
    they are. Gradients of many layers are not compared: rounding alone moves them, and each layer has a case."""
    table = np.array(model.shared.weight)

    def samples(rng: Rng) -> Iterator[Sample]:
        for S, L in _SIZES:
            lengths = {"text": S, "answer": L}
            arrays = {name: table[rng.integers(0, len(table), (2, lengths[name]))].astype(np.float64) for name in given}
            shapes = {name: x.shape for name, x in arrays.items()}
            yield Sample(described(**shapes), arrays, {"mask": _mask(S)})

    def form(function: Callable[..., Any]) -> Form:
        return lambda _, arrays, options: function(*arrays.values(), options["mask"])

    return Case(samples, form(ours), form(theirs), vjp=vjp)
