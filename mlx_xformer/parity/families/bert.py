"""BERT: its layers with the model's own weights, then all of them.

Axes: B batch, L tokens, E embed_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.nn as nn
import numpy as np

from ...models.bert import Bert, BertConfig, normalize, pool_mean
from ...reference.models import bert as twin
from ...reference.nn.transformer import layer as layer_twin
from ..samples import Arrays, Case, Options, Rng, Sample, described, with_params
from .common import fixed_case, layer_case, weights_of

_LENGTHS = (3, 11)
_VALID = (11, 7)  # tokens of each row of the longest sample


def examples() -> dict[str, nn.Module]:
    """Small models by what they are."""
    sizes: dict[str, Any] = {"vocab_size": 31, "embed_dim": 22, "num_layers": 2, "num_heads": 2, "hidden_dim": 29}
    sizes |= {"max_positions": 13}
    return {
        "base": Bert(BertConfig(**sizes)),
        "without a pooler": Bert(BertConfig(**sizes, activation="gelu_tanh", norm_eps=1e-3, pooler=False)),
    }


def cases(model: Bert) -> dict[str, Case]:
    """A case for the embeddings, for every layer, for the pooler, for vectors of sentences and for what follows the
    embeddings."""
    config, weights, layers = model.config, weights_of(model), {}
    L, E = _LENGTHS[-1], model.config.embed_dim
    for index in range(config.num_layers):
        layers[f"encoder.layers.{index}"] = layer_case(
            model.encoder.layers[index],
            lambda params, arrays, options: layer_twin(params, twin.layer_config(config), **arrays, **options),
            [{"x": (2, L, E), "mask": _mask(L)[:, None, None]}],
        )
    found = {"embeddings": _embeddings(model, weights), **layers}
    if config.pooler:
        found["pooler"] = fixed_case(
            model.pool, lambda hidden: twin.pool(weights, hidden), [{"hidden": (2, n, E)} for n in _LENGTHS]
        )
    found["sentences"] = fixed_case(
        lambda hidden, mask: normalize(pool_mean(hidden, mask)),
        lambda hidden, mask: twin.normalize(twin.pool_mean(hidden, mask)),
        [{"hidden": (2, n, E), "mask": _mask(n)} for n in _LENGTHS],
    )
    found["model"] = _whole(model, weights)
    return found


def _embeddings(model: Bert, weights: Arrays) -> Case:
    """A look-up of tokens (2, L) in the three tables, and the norm, differentiated by the norm's weights."""
    config, norm = model.config, weights_of(model.embeddings.norm)

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


def _mask(L: int) -> np.ndarray:
    """(2, L): which tokens are valid."""
    return np.arange(L)[None] < np.minimum(_VALID, L)[:, None]


def _whole(model: Bert, weights: Arrays) -> Case:
    """What follows the embeddings, on those of tokens (2, L): trained layers may overflow on what no embedding gives.
    Gradients are not compared: rounding alone moves that of many layers, each of which has a case of its own."""
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
