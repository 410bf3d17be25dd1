"""The layers of a converted model of llm_prep, or of a Transformer, with its own weights, then all of it, at once and
through caches.

Axes: B batch, L positions, S positions of a memory, E embed_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...models.guides.llm_prep import AutoregressiveTransformerModel, EncoderDecoder, TransformerModel
from ...models.transformer import Transformer
from ...reference.models import transformer as twin_transformer
from ...reference.models.guides import llm_prep as twin
from ...reference.nn import transformer as twin_blocks
from ..samples import Arrays, Case, Options, Rng, Sample, described, flat, with_params
from .guides.llm_prep import CHUNKS, cached

MODELS = (TransformerModel, AutoregressiveTransformerModel, EncoderDecoder, Transformer)
_LENGTHS = (3, sum(CHUNKS))
_TWINS: dict[type, Callable[..., np.ndarray]] = {
    TransformerModel: twin.regression,
    AutoregressiveTransformerModel: twin.autoregressive,
    EncoderDecoder: twin.encoder_decoder,
}


def transformer_cases(model: Any) -> dict[str, Case]:
    """A case for every layer, for the whole, and for that through caches."""
    cases = {}
    for side in ("stack", "encoder", "decoder"):
        for index, layer in enumerate(model[side].layers if side in model else ()):
            cases[f"{side}.layers.{index}"] = _layer(layer, side, model)
    what = _inputs(model)
    whole = _sided(model, what)
    cases["model"] = _whole(model, what, whole, _LENGTHS)
    if _causal(model):
        through = _steps if _alone(model) else cached
        cases["model.cached"] = _whole(model, what, lambda arrays: through(model, arrays), _LENGTHS[-1:])
    return cases


def _causal(model: Any) -> bool:
    """Whether a part of the model is causal and comes out the same step by step, which it does not where experts
    overflow."""
    if isinstance(model, Transformer):
        return "decoder" in model
    overflows = model.config.ffn.use_moe and model.config.ffn.capacity is not None
    return not isinstance(model, TransformerModel) and not overflows


def _alone(model: Any) -> bool:
    """Whether the model is a decoder without an encoder."""
    return isinstance(model, Transformer) and "encoder" not in model


def _inputs(model: Any) -> dict[str, tuple[int | None, int]]:
    """By name the size of the vocabulary, or None, and the width of what a model is called with."""
    config = model.config
    if isinstance(model, Transformer):
        sizes = {"source": config.source_vocab_size or config.vocab_size, "target": config.vocab_size}
        found = {side: (size, config.embed_dim) for side, size in sizes.items()}
        if "encoder" not in model:
            found["source"] = (None, config.embed_dim)  # the memory
        return found if "decoder" in model else {"source": found["source"]}
    if isinstance(model, EncoderDecoder):
        return {"source": (None, config.input_dim), "target": (config.vocab_size, config.input_dim)}
    return {"x": (config.vocab_size, config.input_dim)}


def _sided(model: Any, what: dict[str, Any]) -> Callable[[dict], mx.array]:
    """The call of a model that may lack one of its stacks."""
    if "target" not in what and "source" in what:
        return lambda arrays: model.encode(arrays["source"])
    if _alone(model):
        return lambda arrays: model.decode(arrays["target"], arrays["source"])
    return lambda arrays: model(**arrays)


def _steps(model: Any, arrays: dict) -> mx.array:
    """A decoder alone, through caches."""
    caches, at, parts = model.make_caches(), 0, []
    for n in CHUNKS:
        parts.append(model.decode(arrays["target"][:, at : at + n], arrays["source"], caches=caches))
        at += n
    return mx.concatenate(parts, axis=1)


def _theirs(model: Any, what: dict[str, Any], weights: Arrays, arrays: Arrays) -> np.ndarray:
    config = model.config
    if not isinstance(model, Transformer):
        return _TWINS[type(model)](weights, config, **arrays)
    if "target" not in what:
        return twin_transformer.encode(weights, config, arrays["source"])
    if _alone(model):
        return twin_transformer.decode(weights, config, arrays["target"], arrays["source"])
    return twin_transformer.transformer(weights, config, **arrays)


def _whole(
    model: Any,
    what: dict[str, tuple[int | None, int]],
    ours: Callable[[dict], mx.array],
    lengths: tuple[int, ...],
) -> Case:
    """All of the model. Its gradient is not asked for: rounding alone moves that of many layers."""
    weights = {name: np.array(x.astype(mx.float32), np.float64) for name, x in flat(model).items()}

    def samples(rng: Rng) -> Iterator[Sample]:
        for L in lengths:
            arrays: Arrays = {}
            options: dict[str, Any] = {}
            for name, (size, width) in what.items():
                length = 5 if name == "source" and len(what) > 1 else L
                if size is None:
                    arrays[name] = rng.normal(size=(1, length, width))
                else:
                    options[name] = rng.integers(0, size, (1, length))
            yield Sample(described(length=L), arrays, options, weights)

    def call(given: dict, arrays: dict, options: Options) -> mx.array:
        with_params(model, given)
        return ours({**arrays, **options})

    return Case(samples, call, lambda given, x, options: _theirs(model, what, given, {**x, **options}), vjp=False)


def _layer(layer: nn.Module, side: str, model: Any) -> Case:
    """A layer, differentiated by its weights as well."""
    config, decoder = model.config, side == "decoder"
    causal = decoder or isinstance(model, AutoregressiveTransformerModel)
    if isinstance(model, Transformer):
        own = twin_transformer.layer_config(config, decoder=decoder)
    else:
        own = twin.layer_config(config, causal=causal, cross=decoder)
    params = {name: np.array(x.astype(mx.float32), np.float64) for name, x in flat(layer).items()}

    def samples(rng: Rng) -> Iterator[Sample]:
        for L in _LENGTHS:
            arrays = {"x": rng.normal(size=(2, L, config.embed_dim))}
            if decoder:
                arrays["memory"] = rng.normal(size=(2, 5, config.embed_dim))
            yield Sample(described(x=arrays["x"].shape), arrays, {}, params, joint=True)

    return Case(
        samples,
        lambda given, arrays, _: with_params(layer, given)(**arrays),
        lambda given, arrays, _: twin_blocks.layer(given, own, **arrays),
    )
