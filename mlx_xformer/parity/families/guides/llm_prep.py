"""Samples of llm_prep's models and of the Transformer, at once and through caches; and the layers of a converted one
with its own weights, then all of it.

Axes: B batch, L target positions, S source positions, I input_dim, E embed_dim, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ....models.guides.llm_prep import AutoregressiveTransformerModel, EncoderDecoder, SequenceConfig, TransformerModel
from ....models.transformer import Transformer, TransformerConfig
from ....nn.cache import CrossCache
from ....nn.moe.layer import FFNConfig
from ....reference.models import transformer as twin_transformer
from ....reference.models.guides import llm_prep as twin
from ...samples import Arrays, Case, Options, Rng, Sample, described, drawn, with_params

I, O, E, HEADS, HIDDEN, V = 5, 7, 18, 6, 13, 11
CHUNKS = (4, 1, 1, 3)
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
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "base": {},
    "vectors": {"vocab_size": None},
    "vectors, pre-norm": {"vocab_size": None, "norm_first": True, "final_norm": True, "activation": "gelu"},
    "apart": {"tie_embeddings": False, "source_vocab_size": 17, "norm_eps": 1e-3},
    "pre-norm": {"norm_first": True, "final_norm": True, "activation": "gelu"},
}
_CALLED = ("mask", "source_mask", "target_mask")


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


def _transformer_config(options: Options) -> TransformerConfig:
    given = {"vocab_size": V, "embed_dim": E, "num_heads": HEADS, "hidden_dim": HIDDEN, "max_len": 23, "dropout": 0.2}
    given |= {"num_encoder_layers": 2, "num_decoder_layers": 3}
    return TransformerConfig(
        **(given | {name: x for name, x in options.items() if name in TransformerConfig.__dataclass_fields__})
    )


def _drawn(model: nn.Module, rng: Rng) -> Arrays:
    """Parameters that keep ReLU far from where it has no derivative, and experts of about unit gain."""
    params = drawn(model, rng)
    for name, value in params.items():
        if value.ndim == 3:
            params[name] = rng.normal(size=value.shape) * value.shape[-1] ** -0.5
        elif name.endswith("linear1.bias"):
            params[name] = rng.uniform(22, 23, value.shape) * rng.choice([-1, 1], value.shape)
    return params


def _padding(rng: Rng, batch: int, length: int) -> np.ndarray:
    """(B, L): some positions of each row, among them its first; in the last row no others."""
    mask = rng.random((batch, length)) > 0.4
    mask[:, 0], mask[-1, 1:] = True, False
    return mask


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
                        called["source_mask"] = _padding(rng, batch, 5)
                if "vocab_size" in options:
                    called[target] = rng.integers(0, V, (batch, L))
                else:
                    arrays[target] = rng.normal(size=(batch, L, I))
                if kind is TransformerModel and batch > 1:
                    called["mask"] = _padding(rng, batch, L)
                facts = described(shape=(batch, L), masked=any(name in called for name in _CALLED))
                params = _drawn(kind(_config(options)), rng)
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


def _in_chunks(step: Callable[..., mx.array], x: mx.array) -> mx.array:
    """What `step` gives of x (B, L, ...), some positions at a time."""
    parts, at = [], 0
    for n in CHUNKS:
        parts.append(step(x[:, at : at + n]))
        at += n
    return mx.concatenate(parts, axis=1)


def cached(model: Any, arrays: dict) -> mx.array:
    """A model of llm_prep, or the Transformer, through caches."""
    caches = model.make_caches()
    if isinstance(model, AutoregressiveTransformerModel):
        return _in_chunks(lambda x: model(x, caches=caches), arrays["x"])
    mask = arrays.get("source_mask")
    memory = model.encode(arrays["source"], source_mask=mask)
    given: dict[str, Any] = {"memory_mask": mask, "caches": caches, "cross_caches": [CrossCache() for _ in caches]}
    return _in_chunks(lambda x: model.decode(x, memory, **given), arrays["target"])


def _through_caches(make: Callable[[Options], nn.Module]) -> Callable[..., mx.array]:
    return lambda params, arrays, options: cached(
        with_params(make(options), params).eval(), {**arrays, **_given(options)}
    )


def _long(samples: Callable[[Rng], Iterator[Sample]]) -> Callable[[Rng], Iterator[Sample]]:
    """Of several lengths the one that chunks are of."""
    return lambda rng: (sample for sample in samples(rng) if f",{sum(CHUNKS)})" in sample.what)


def _transformers(rng: Rng) -> Iterator[Sample]:
    for what, options in TRANSFORMERS.items():
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
                    called[f"{side}_mask"] = _padding(rng, batch, length)
            facts = described(shape=(batch, L), source=S, masked=batch > 1)
            params = _drawn(Transformer(_transformer_config(options)), rng)
            yield Sample(f"{what}: {facts}", arrays, {**options, **called}, params, joint=True)


def _our_transformer(params: dict, arrays: dict, options: Options) -> mx.array:
    return with_params(Transformer(_transformer_config(options)), params).eval()(**arrays, **_given(options))


def _their_transformer(params: Arrays, arrays: Arrays, options: Options) -> np.ndarray:
    return twin_transformer.transformer(params, _transformer_config(options), **arrays, **_given(options))


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
        _long(_sequences(_auto, *_FREE_SINGLE)),
        _through_caches(lambda options: _auto(_config(options))),
        _theirs(twin.autoregressive),
        half=6.0,
        vjp=False,
    ),
    "EncoderDecoder": Case(_sequences(_pair, *CONFIGS), _ours(_pair), _theirs(twin.encoder_decoder), **_HALF),
    "EncoderDecoder.cached": Case(
        _long(_sequences(_pair, *_FREE)),
        _through_caches(lambda options: _pair(_config(options))),
        _theirs(twin.encoder_decoder),
        half=6.0,
        vjp=False,
    ),
    "Transformer": Case(_transformers, _our_transformer, _their_transformer, **_HALF),
    "Transformer.cached": Case(
        _long(_transformers),
        _through_caches(lambda options: Transformer(_transformer_config(options))),
        _their_transformer,
        half=6.0,
        vjp=False,
    ),
}
