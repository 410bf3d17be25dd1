"""The models of llm_prep, at once and through caches; and the layers of a checkpoint with its own weights, then all of
it.

Axes: B batch, L target positions, S source positions, I input_dim, E embed_dim, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ....models.guides.llm_prep import AutoregressiveTransformerModel, EncoderDecoder, SequenceConfig, TransformerModel
from ....nn.cache import CrossCache
from ....nn.moe import FFNConfig
from ....reference.models.guides import llm_prep as twin
from ....reference.nn.transformer import layer as layer_twin
from ...samples import Arrays, Case, Options, Rng, Sample, described, with_params
from ..common import drawn_smooth, in_chunks, layer_case, of_length, padding, weights_of

I, O, E, HEADS, HIDDEN, V = 5, 7, 18, 6, 13, 11
CHUNKS = (4, 1, 1, 3)  # positions that go through the caches at once
_ALL = {"use_moe": True, "num_experts": 3, "topk": 3}  # rounding cannot change who is chosen
CONFIGS: dict[str, dict[str, Any]] = {
    "multi-head": {},
    "multi-query": {"attention_type": "mqa"},
    "grouped": {"attention_type": "gqa", "num_kv_heads": 2},
    "grouped by half": {"attention_type": "gqa"},
    "mixture": {"attention_type": "gqa", "num_kv_heads": 2, "ffn": _ALL},
    "mixture, capacity": {"ffn": _ALL | {"capacity": 9}},
    "one layer": {"num_layers": 1, "num_decoder_layers": 3},
    "window": {"window": 3},
    "vocabulary": {"vocab_size": V},
}
_CALLED = ("mask", "source_mask")


def _config(options: Options) -> SequenceConfig:
    given: dict[str, Any] = {
        "input_dim": I,
        "output_dim": O,
        "embed_dim": E,
        "num_layers": 2,
        "num_heads": HEADS,
        "max_len": 23,
    }
    given |= {name: value for name, value in options.items() if name in SequenceConfig.__dataclass_fields__}
    return SequenceConfig(**{**given, "ffn": FFNConfig(E, HIDDEN, **options.get("ffn", {}))})


def _sequences(kind: Callable[[SequenceConfig], nn.Module], *names: str) -> Callable[[Rng], Iterator[Sample]]:
    """Samples of a model of llm_prep with these configurations."""

    def samples(rng: Rng) -> Iterator[Sample]:
        for what in names:
            for batch, L in ((1, 9), (2, 7), (2, 1)):
                options = CONFIGS[what]
                arrays: Arrays = {}
                called: dict[str, Any] = {}
                target = "target" if kind is EncoderDecoder else "x"
                if kind is EncoderDecoder:
                    arrays["source"] = rng.normal(size=(batch, 5, I))
                    if batch > 1:
                        called["source_mask"] = padding(rng, batch, 5)
                if "vocab_size" in options:
                    called[target] = rng.integers(0, V, (batch, L))
                else:
                    arrays[target] = rng.normal(size=(batch, L, I))
                if kind is TransformerModel and batch > 1:
                    called["mask"] = padding(rng, batch, L)
                facts = described(shape=(batch, L), masked=any(name in called for name in _CALLED))
                params = drawn_smooth(kind(_config(options)), rng)
                yield Sample(f"{what}: {facts}", arrays, {**options, **called}, params, joint=True)

    return samples


def _ours(kind: Callable[[SequenceConfig], nn.Module]) -> Callable[..., mx.array]:
    def form(params: dict, arrays: dict, options: Options) -> mx.array:
        return with_params(kind(_config(options)), params)(**arrays, **_given(options))

    return form


def _given(options: Options) -> dict[str, Any]:
    return {name: options[name] for name in (*_CALLED, "x", "source", "target") if name in options}


def _theirs(form: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda params, arrays, options: form(params, _config(options), **arrays, **_given(options))


def _cached(model: Any, arrays: dict) -> mx.array:
    """A model through caches."""
    caches = model.make_caches()
    if isinstance(model, AutoregressiveTransformerModel):
        return in_chunks(lambda x: model(x, caches=caches), arrays["x"], CHUNKS)
    mask = arrays.get("source_mask")
    memory = model.encode(arrays["source"], source_mask=mask)
    given: dict[str, Any] = {"memory_mask": mask, "caches": caches, "cross_caches": [CrossCache() for _ in caches]}
    return in_chunks(lambda x: model.decode(x, memory, **given), arrays["target"], CHUNKS)


def _through_caches(make: Callable[[Options], nn.Module]) -> Callable[..., mx.array]:
    return lambda params, arrays, options: _cached(
        with_params(make(options), params).eval(), {**arrays, **_given(options)}
    )


_SINGLE = tuple(name for name in CONFIGS if name not in ("one layer",))
_POOLED = tuple(name for name in _SINGLE if name not in ("window", "vocabulary"))
_FREE = tuple(name for name in CONFIGS if name != "mixture, capacity")  # which makes steps differ from a full pass
_FREE_SINGLE = tuple(name for name in _FREE if name in _SINGLE)
_auto, _pair = AutoregressiveTransformerModel, EncoderDecoder
_HALF: dict[str, Any] = {"half": 6.0, "half_vjp": 16.0}
CASES = {
    "TransformerModel": Case(
        _sequences(TransformerModel, *_POOLED), _ours(TransformerModel), _theirs(twin.regression), **_HALF
    ),
    "AutoregressiveTransformerModel": Case(
        _sequences(_auto, *_SINGLE), _ours(_auto), _theirs(twin.autoregressive), **_HALF
    ),
    "AutoregressiveTransformerModel.cached": Case(
        of_length(_sequences(_auto, *_FREE_SINGLE), sum(CHUNKS)),
        _through_caches(lambda options: _auto(_config(options))),
        _theirs(twin.autoregressive),
        half=6.0,
        vjp=False,
    ),
    "EncoderDecoder": Case(_sequences(_pair, *CONFIGS), _ours(_pair), _theirs(twin.encoder_decoder), **_HALF),
    "EncoderDecoder.cached": Case(
        of_length(_sequences(_pair, *_FREE), sum(CHUNKS)),
        _through_caches(lambda options: _pair(_config(options))),
        _theirs(twin.encoder_decoder),
        half=6.0,
        vjp=False,
    ),
}


# A model with its own weights

_TWINS: dict[type, Callable[..., np.ndarray]] = {
    TransformerModel: twin.regression,
    AutoregressiveTransformerModel: twin.autoregressive,
    EncoderDecoder: twin.encoder_decoder,
}
_LENGTHS = (3, sum(CHUNKS))


def examples() -> dict[str, nn.Module]:
    """Small models by what they are."""
    return {
        "regression, grouped": TransformerModel(_config(CONFIGS["grouped"])),
        "autoregressive, mixture": AutoregressiveTransformerModel(_config(CONFIGS["mixture"])),
        "autoregressive, window": AutoregressiveTransformerModel(_config(CONFIGS["window"])),
        "encoder-decoder": EncoderDecoder(_config(CONFIGS["vocabulary"])),
    }


def cases(model: Any) -> dict[str, Case]:
    """A case for every layer, for the whole, and for that through caches, unless experts overflow, as other tokens do
    in chunks than at once."""
    found = {}
    for side in ("stack", "encoder", "decoder"):
        for index, layer in enumerate(model[side].layers if side in model else ()):
            found[f"{side}.layers.{index}"] = _layer(layer, side, model)
    found["model"] = _whole(model, lambda **arrays: model(**arrays), _LENGTHS)
    overflows = model.config.ffn.use_moe and model.config.ffn.capacity is not None
    if not isinstance(model, TransformerModel) and not overflows:
        found["model.cached"] = _whole(model, lambda **arrays: _cached(model, arrays), _LENGTHS[-1:])
    return found


def _layer(layer: nn.Module, side: str, model: Any) -> Case:
    E, decoder = model.config.embed_dim, side == "decoder"
    causal = decoder or isinstance(model, AutoregressiveTransformerModel)
    kind = twin.layer_config(model.config, causal=causal, cross=decoder)
    memory = {"memory": (2, 5, E)} if decoder else {}
    return layer_case(
        layer,
        lambda given, arrays, _: layer_twin(given, kind, **arrays),
        [{"x": (2, L, E), **memory} for L in _LENGTHS],
    )


def _whole(model: Any, ours: Callable[..., mx.array], lengths: tuple[int, ...]) -> Case:
    """All of the model. Gradients are not compared: rounding alone moves that of many layers."""
    config, weights = model.config, weights_of(model)
    target = "target" if isinstance(model, EncoderDecoder) else "x"

    def samples(rng: Rng) -> Iterator[Sample]:
        for L in lengths:
            arrays: Arrays = {"source": rng.normal(size=(1, 5, config.input_dim))} if target == "target" else {}
            options: dict[str, Any] = {}
            if config.vocab_size is None:
                arrays[target] = rng.normal(size=(1, L, config.input_dim))
            else:
                options[target] = rng.integers(0, config.vocab_size, (1, L))
            yield Sample(described(length=L), arrays, options)

    return Case(
        samples,
        lambda _, arrays, options: ours(**arrays, **options),
        lambda _, arrays, options: _TWINS[type(model)](weights, config, **arrays, **options),
        vjp=False,
    )
