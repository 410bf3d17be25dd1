"""The layers of a converted BERT with its own weights, then all of them.

Axes: B batch, L tokens, E embed_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from ...models.bert import Bert, normalize, pool_mean
from ...reference.models import bert as twin
from ...reference.nn.transformer import layer as layer_twin
from ..samples import Arrays, Case, Options, Rng, Sample, described, flat, with_params

_LENGTHS = (3, 11)
_VALID = (11, 7)  # tokens of each row of the longest sample


def bert_cases(model: Bert) -> dict[str, Case]:
    """A case for the embeddings, for every layer, for the pooler, for vectors of sentences and for what follows the
    embeddings."""
    config, weights = model.config, _arrays(model)
    cases = {"embeddings": _embeddings(model, weights)}
    for index in range(config.num_layers):
        cases[f"encoder.layers.{index}"] = _layer(model, index)
    if config.pooler:
        cases["pooler"] = _fixed(config.embed_dim, lambda x, _: model.pool(x), lambda x, _: twin.pool(weights, x))
    cases["sentences"] = _fixed(
        config.embed_dim,
        lambda x, mask: normalize(pool_mean(x, mask)),
        lambda x, mask: twin.normalize(twin.pool_mean(x, mask)),
    )
    cases["model"] = _whole(model, weights)
    return cases


def _arrays(module: Any) -> Arrays:
    return {name: np.array(x) for name, x in flat(module).items()}


def _embeddings(model: Bert, weights: Arrays) -> Case:
    """A look-up of tokens (2, L) in the three tables, and the norm, differentiated by the norm's weights."""
    config, norm = model.config, _arrays(model.embeddings.norm)

    def samples(rng: Rng) -> Iterator[Sample]:
        for L in _LENGTHS:
            L = min(L, config.max_positions)
            tokens = rng.integers(0, config.vocab_size, (2, L))
            kinds = rng.integers(0, config.num_token_types, (2, L))
            yield Sample(described(tokens=(2, L)), {}, {"tokens": tokens, "kinds": kinds}, norm, joint=True)

    def ours(params: dict, _: dict, options: Options) -> Any:
        with_params(model.embeddings.norm, params)
        return model.embeddings(options["tokens"], options["kinds"])

    def theirs(params: dict, _: Arrays, options: Options) -> np.ndarray:
        given = {**weights, **{f"embeddings.norm.{name}": x for name, x in params.items()}}
        return twin.embed(given, config, options["tokens"], options["kinds"])

    return Case(samples, ours, theirs)


def _layer(model: Bert, index: int) -> Case:
    """A layer, differentiated by its weights as well."""
    layer = model.encoder.layers[index]

    def samples(rng: Rng) -> Iterator[Sample]:
        x, mask = rng.normal(size=(2, _LENGTHS[-1], model.config.embed_dim)), _mask(_LENGTHS[-1])
        yield Sample(described(x=x.shape, valid=_VALID), {"x": x}, {"mask": mask}, _arrays(layer), joint=True)

    def ours(params: dict, arrays: dict, options: Options) -> Any:
        return with_params(layer, params)(arrays["x"], mask=options["mask"][:, None, None])

    def theirs(params: dict, arrays: Arrays, options: Options) -> np.ndarray:
        return layer_twin(params, twin.layer_of(model.config), arrays["x"], mask=options["mask"][:, None, None])

    return Case(samples, ours, theirs)


def _mask(L: int) -> np.ndarray:
    return np.arange(L)[None] < np.minimum(_VALID, L)[:, None]


def _whole(model: Bert, weights: Arrays) -> Case:
    """What follows the embeddings, on those of tokens (2, L): what no embedding gives, trained layers may blow up. The
    gradient of many layers is that of their rounding; each of them is proven."""
    config = model.config

    def samples(rng: Rng) -> Iterator[Sample]:
        for L in _LENGTHS:
            mask = _mask(min(L, config.max_positions))
            x = twin.embed(weights, config, rng.integers(0, config.vocab_size, mask.shape))
            what = described(x=x.shape, valid=tuple(mask.sum(axis=1).tolist()))
            yield Sample(what, {"x": x.astype(np.float64)}, {"mask": mask})

    def ours(_: dict, arrays: dict, options: Options) -> Any:
        return model.encoder(arrays["x"], mask=options["mask"][:, None, None])

    def theirs(_: dict, arrays: Arrays, options: Options) -> np.ndarray:
        return twin.encode(weights, config, arrays["x"], options["mask"])

    return Case(samples, ours, theirs, vjp=False)


def _fixed(
    width: int,
    ours: Callable[[mx.array, mx.array], mx.array],
    theirs: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> Case:
    """A function of x (2, L, width) and which of it is valid, (2, L), whose weights stay as they are."""

    def samples(rng: Rng) -> Iterator[Sample]:
        for L in _LENGTHS:
            x, mask = rng.normal(size=(2, L, width)), _mask(L)
            yield Sample(described(x=x.shape, valid=tuple(mask.sum(axis=1).tolist())), {"x": x}, {"mask": mask})

    def form(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda _, arrays, options: function(arrays["x"], options["mask"])

    return Case(samples, form(ours), form(theirs))
