"""The layers of a converted T5 with its own weights, then both sides, at once and through caches.

Axes: B batch, S positions of the text, L positions of the answer, H heads, E embed_dim, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from ...models.t5 import T5, Side
from ...nn.cache import CrossCache
from ...reference.models import t5 as twin
from ...reference.nn.transformer import layer as layer_twin
from ..samples import Arrays, Case, Options, Rng, Sample, described, flat, with_params

_SIZES = ((1, 3), (13, 7))  # positions of the text, and of the answer
_CHUNKS = (4, 1, 2)  # positions of the longest answer that go through the caches at once


def t5_cases(model: T5) -> dict[str, Case]:
    """A case for the bias of each side, for every layer, for the head, for the encoder, and for the decoder at once and
    through caches."""
    config, weights = model.config, _arrays(model)
    cases: dict[str, Case] = {}
    for name in ("encoder", "decoder"):
        cases[f"{name}.relative"] = _bias(model[name])
        for index in range(len(model[name].stack.layers)):
            cases[f"{name}.stack.layers.{index}"] = _layer(model[name], index)
    cases["logits"] = _case(
        model, lambda x, _: model.logits(x), lambda x, _: twin.logits(weights, config, x), ("answer",), vjp=True
    )
    cases["encoder"] = _case(
        model,
        lambda x, mask: _encoded(model, x, mask),
        lambda x, mask: twin.encode(weights, config, x, mask),
        ("text",),
    )

    def decoded(x: np.ndarray, memory: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return twin.logits(weights, config, twin.decode(weights, config, x, memory, mask))

    def at_once(x: mx.array, memory: mx.array, mask: mx.array) -> mx.array:
        return model.logits(model.decoder(x, memory, memory_mask=mask[:, None, None]))

    cases["decoder"] = _case(model, at_once, decoded, ("answer", "text"))
    cases["decoder, cached"] = _case(model, lambda *given: _cached(model, *given), decoded, ("answer", "text"))
    return cases


def _encoded(model: T5, x: mx.array, mask: mx.array) -> mx.array:
    return model.encoder(x, mask=mask[:, None, None])


def _cached(model: T5, x: mx.array, memory: mx.array, mask: mx.array) -> mx.array:
    """Embedded tokens, some at a time -> logits."""
    caches, at, parts = model.make_caches(), 0, []
    cross_caches = [CrossCache() for _ in caches]
    given: dict[str, Any] = {"caches": caches, "cross_caches": cross_caches, "memory_mask": mask[:, None, None]}
    for n in _CHUNKS:
        if at < x.shape[1]:
            parts.append(model.logits(model.decoder(x[:, at : at + n], memory, **given)))
        at += n
    return mx.concatenate(parts, axis=1)


def _arrays(module: Any) -> Arrays:
    return {name: np.array(x) for name, x in flat(module).items()}


def _bias(side: Side) -> Case:
    """What a side adds to scores of as many queries as keys."""
    causal = side.stack.config.causal

    def samples(rng: Rng) -> Iterator[Sample]:
        for length in (1, 2, 53):
            params = {"relative.weight": _arrays(side.relative)["weight"]}
            yield Sample(described(length=length), {}, {"length": length}, params)

    def ours(params: dict, _: dict, options: Options) -> mx.array:
        return with_params(side, params).bias(options["length"], options["length"])

    def theirs(params: Arrays, _: Arrays, options: Options) -> np.ndarray:
        return twin.bias(params, side.config, options["length"], bidirectional=not causal)

    return Case(samples, ours, theirs)


def _layer(side: Side, index: int) -> Case:
    """A layer, differentiated by its weights as well, with a bias and hidden positions of the text."""
    layer, cross, config = side.stack.layers[index], side.stack.config.cross, side.config
    kind = twin.layer_of(config, decoder=cross)
    S, L = _SIZES[-1]
    length = L if cross else S

    def samples(rng: Rng) -> Iterator[Sample]:
        arrays = {"x": rng.normal(size=(2, length, config.embed_dim))}
        arrays |= {"memory": rng.normal(size=(2, S, config.embed_dim))} if cross else {}
        arrays["bias"] = rng.normal(size=(config.num_heads, length, length))
        hidden = {"memory_mask" if cross else "mask": _mask(S)[:, None, None]}
        what = described(x=arrays["x"].shape, memory=(2, S) if cross else None)
        yield Sample(what, arrays, hidden, _arrays(layer), joint=True)

    def ours(params: dict, arrays: dict, options: Options) -> mx.array:
        return with_params(layer, params)(**arrays, **options)

    def theirs(params: Arrays, arrays: Arrays, options: Options) -> np.ndarray:
        return layer_twin(params, kind, **arrays, **options)

    return Case(samples, ours, theirs)


def _mask(S: int) -> np.ndarray:
    """All of the first row, and about half of the second."""
    return np.arange(S)[None] < np.array([S, (S + 1) // 2])[:, None]


def _case(
    model: T5,
    ours: Callable[..., mx.array],
    theirs: Callable[..., np.ndarray],
    given: tuple[str, ...],
    *,
    vjp: bool = False,
) -> Case:
    """A function of the embedded tokens `given` and of which of the text are valid, whose weights stay as they are. The
    gradient of many layers is that of their rounding; each of them is proven."""
    table = np.array(model.shared.weight)

    def samples(rng: Rng) -> Iterator[Sample]:
        for S, L in _SIZES:
            lengths = {"text": S, "answer": L}
            arrays = {name: table[rng.integers(0, len(table), (2, lengths[name]))].astype(np.float64) for name in given}
            shapes = {name: x.shape for name, x in arrays.items()}
            yield Sample(described(**shapes), arrays, {"mask": _mask(S)})

    def form(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda _, arrays, options: function(*arrays.values(), options["mask"])

    return Case(samples, form(ours), form(theirs), vjp=vjp)
