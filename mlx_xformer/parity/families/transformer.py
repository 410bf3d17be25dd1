"""The Transformer, at once and through caches; and the layers of a checkpoint with its own weights, then all of it. A
model may lack its encoder or its decoder.

Axes: B batch, L positions, S positions of a memory, E embed_dim, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...models.transformer import Transformer, TransformerConfig
from ...nn.cache import CrossCache
from ...reference.models import transformer as twin
from ...reference.nn.transformer import layer as layer_twin
from ..samples import Arrays, Case, Options, Rng, Sample, described, with_params
from .common import drawn_smooth, in_chunks, layer_case, of_length, padding, weights_of

E, HEADS, HIDDEN, V = 18, 6, 13, 11
CHUNKS = (4, 1, 1, 3)  # positions that go through the caches at once
CONFIGS: dict[str, dict[str, Any]] = {
    "base": {},
    "vectors": {"vocab_size": None},
    "vectors, pre-norm": {"vocab_size": None, "norm_first": True, "final_norm": True, "activation": "gelu"},
    "apart": {"tie_embeddings": False, "source_vocab_size": 17, "norm_eps": 1e-3},
    "pre-norm": {"norm_first": True, "final_norm": True, "activation": "gelu"},
}
_CALLED = ("source_mask", "target_mask")


def _config(options: Options) -> TransformerConfig:
    given = {"vocab_size": V, "embed_dim": E, "num_heads": HEADS, "hidden_dim": HIDDEN, "max_len": 23, "dropout": 0.2}
    given |= {"num_encoder_layers": 2, "num_decoder_layers": 3}
    return TransformerConfig(
        **(given | {name: x for name, x in options.items() if name in TransformerConfig.__dataclass_fields__})
    )


def _samples(rng: Rng) -> Iterator[Sample]:
    for what, options in CONFIGS.items():
        for batch, S, L in ((1, 5, 9), (2, 7, 3), (2, 1, 1)):
            sizes = {"source": S, "target": L}
            arrays: Arrays = {}
            called: dict[str, Any] = {}
            for side, length in sizes.items():
                size = options.get("source_vocab_size", V) if side == "source" else V
                if options.get("vocab_size", V) is None:
                    arrays[side] = rng.normal(size=(batch, length, E))
                else:
                    called[side] = rng.integers(0, size, (batch, length))
                if batch > 1:
                    called[f"{side}_mask"] = padding(rng, batch, length)
            facts = described(shape=(batch, L), source=S, masked=batch > 1)
            params = drawn_smooth(Transformer(_config(options)), rng)
            yield Sample(f"{what}: {facts}", arrays, {**options, **called}, params, joint=True)


def _ours(params: dict, arrays: dict, options: Options) -> mx.array:
    return with_params(Transformer(_config(options)), params).eval()(**arrays, **_given(options))


def _theirs(params: Arrays, arrays: Arrays, options: Options) -> np.ndarray:
    return twin.transformer(params, _config(options), **arrays, **_given(options))


def _given(options: Options) -> dict[str, Any]:
    return {name: options[name] for name in (*_CALLED, "source", "target") if name in options}


def _cached(model: Transformer, arrays: dict) -> mx.array:
    """The model through caches; a decoder alone takes the memory as its source."""
    memory, mask = arrays["source"], arrays.get("source_mask")
    if "encoder" in model:
        memory = model.encode(memory, source_mask=mask)
    caches = model.make_caches()
    given: dict[str, Any] = {"memory_mask": mask, "caches": caches}
    if "encoder" in model:
        given["cross_caches"] = [CrossCache() for _ in caches]
    return in_chunks(lambda x: model.decode(x, memory, **given), arrays["target"], CHUNKS)


def _through_caches(params: dict, arrays: dict, options: Options) -> mx.array:
    model = Transformer(_config(options))
    with_params(model, params).eval()
    return _cached(model, {**arrays, **_given(options)})


CASES = {
    "Transformer": Case(_samples, _ours, _theirs, half=6.0, half_vjp=16.0),
    "Transformer.cached": Case(of_length(_samples, sum(CHUNKS)), _through_caches, _theirs, half=6.0, vjp=False),
}


# A model with its own weights

_LENGTHS = (3, sum(CHUNKS))


def examples() -> dict[str, nn.Module]:
    """Small models by what they are."""
    sides = {"encoder alone": {"num_decoder_layers": 0}, "decoder alone": {"num_encoder_layers": 0}}
    options = {"base": {}, "pre-norm": CONFIGS["pre-norm"], "apart": CONFIGS["apart"], **sides}
    return {name: Transformer(_config(given)) for name, given in options.items()}


def cases(model: Transformer) -> dict[str, Case]:
    """A case for every layer, for the whole, and with a decoder for that through caches."""
    found = {}
    for side in ("encoder", "decoder"):
        for index, layer in enumerate(model[side].layers if side in model else ()):
            found[f"{side}.layers.{index}"] = _layer(layer, model.config, decoder=side == "decoder")
    found["model"] = _whole(model, lambda arrays: _at_once(model, arrays), _LENGTHS)
    if "decoder" in model:
        found["model.cached"] = _whole(model, lambda arrays: _cached(model, arrays), _LENGTHS[-1:])
    return found


def _at_once(model: Transformer, arrays: dict) -> mx.array:
    if "decoder" not in model:
        return model.encode(arrays["source"])
    if "encoder" not in model:
        return model.decode(arrays["target"], arrays["source"])
    return model(**arrays)


def _twin_at_once(model: Transformer, weights: Arrays, arrays: Arrays) -> np.ndarray:
    if "decoder" not in model:
        return twin.encode(weights, model.config, arrays["source"])
    if "encoder" not in model:
        return twin.decode(weights, model.config, arrays["target"], arrays["source"])
    return twin.transformer(weights, model.config, **arrays)


def _layer(layer: nn.Module, config: TransformerConfig, *, decoder: bool) -> Case:
    kind = twin.layer_config(config, decoder=decoder)
    memory = {"memory": (2, 5, config.embed_dim)} if decoder else {}
    return layer_case(
        layer,
        lambda given, arrays, _: layer_twin(given, kind, **arrays),
        [{"x": (2, L, config.embed_dim), **memory} for L in _LENGTHS],
    )


def _inputs(model: Transformer) -> dict[str, int | None]:
    """What the model is called with: the size of the vocabulary of its tokens, or None for vectors."""
    config = model.config
    found = {}
    if "encoder" in model:
        found["source"] = config.source_vocab_size or config.vocab_size
    else:
        found["source"] = None  # the memory
    if "decoder" in model:
        found["target"] = config.vocab_size
    return found


def _whole(model: Transformer, ours: Callable[[dict], mx.array], lengths: tuple[int, ...]) -> Case:
    """All of the model. Gradients are not compared: rounding alone moves that of many layers."""
    weights, inputs = weights_of(model), _inputs(model)

    def samples(rng: Rng) -> Iterator[Sample]:
        for L in lengths:
            arrays: Arrays = {}
            options: dict[str, Any] = {}
            for name, size in inputs.items():
                length = 5 if name == "source" and len(inputs) > 1 else L
                if size is None:
                    arrays[name] = rng.normal(size=(1, length, model.config.embed_dim))
                else:
                    options[name] = rng.integers(0, size, (1, length))
            yield Sample(described(length=L), arrays, options)

    return Case(
        samples,
        lambda _, arrays, options: ours({**arrays, **options}),
        lambda _, arrays, options: _twin_at_once(model, weights, {**arrays, **options}),
        vjp=False,
    )
