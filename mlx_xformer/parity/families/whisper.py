"""Whisper: its layers with the model's own weights, then both sides whole, the decoder through caches as well.

Axes: B batch, T frames, S positions of the memory, L tokens, E embed_dim.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...models.whisper import Whisper, WhisperConfig
from ...nn.cache import CrossCache
from ...reference.models import whisper as twin
from ..samples import Case
from .common import CHUNKS, chunks_in_words, fixed_case, in_chunks, layer_case, table_case, weights_of

_FRAMES, _TOKENS, _MEMORY = 22, sum(CHUNKS), 7


def examples() -> dict[str, nn.Module]:
    """Small models by what they are."""
    sizes = {"vocab_size": 53, "embed_dim": 22, "num_heads": 2, "hidden_dim": 29, "mel_bins": 7}
    counts = {"encoder_layers": 2, "decoder_layers": 3, "source_positions": 13, "target_positions": 41}
    return {"base": Whisper(WhisperConfig(**sizes, **counts))}


def cases(model: Whisper) -> dict[str, Case]:
    """A case for the convolutions, for every layer, for the tables, for the encoder, for the decoder, and for the
    decoder through caches."""
    config, E = model.config, model.config.embed_dim
    encoder, decoder = weights_of(model.encoder), weights_of(model.decoder)
    mel = [{"mel": (1, min(_FRAMES, 2 * config.source_positions), config.mel_bins)}]
    found = {"encoder.embed": fixed_case(model.encoder.embed, lambda mel: twin.convolved(encoder, mel), mel)}
    for side, stack in (("encoder", model.encoder.stack), ("decoder", model.decoder.stack)):
        sizes = {"x": (2, _TOKENS, E), **({"memory": (2, _MEMORY, E)} if side == "decoder" else {})}
        for index, layer in enumerate(stack.layers):
            found[f"{side}.stack.layers.{index}"] = layer_case(
                layer, lambda params, arrays, _: twin.layer(params, config, **arrays), [sizes]
            )
    found["encoder"] = fixed_case(model.encoder, lambda mel: twin.encoder(encoder, config, mel), mel, vjp=False)
    tokens = min(_TOKENS, config.target_positions)
    found["decoder.embed"] = table_case(
        model.decoder.embed, lambda tokens: twin.embed(decoder, tokens), config.vocab_size, [tokens]
    )
    found["logits"] = fixed_case(model.decoder.logits, lambda x: twin.logits(decoder, x), [{"x": (1, 3, E)}])

    def at_once(x: mx.array, memory: mx.array) -> mx.array:
        return model.decoder.logits(model.decoder.stack(x, memory))

    def theirs(x: np.ndarray, memory: np.ndarray) -> np.ndarray:
        return twin.from_embedded(decoder, config, x, memory)

    sizes = {"x": (1, tokens, E), "memory": (1, _MEMORY, E)}
    scale = float(np.abs(decoder["embed_tokens.weight"]).mean())
    found["decoder"] = fixed_case(at_once, theirs, [sizes], vjp=False, scale=scale)
    if tokens == _TOKENS:
        found["decoder, cached"] = fixed_case(
            lambda x, memory: _cached(model, x, memory), theirs, [sizes], vjp=False, scale=scale, note=chunks_in_words()
        )
    return found


def _cached(model: Whisper, x: mx.array, memory: mx.array) -> mx.array:
    """Embedded tokens (1, L, E), some at a time, with the memory's keys and values made once -> logits (1, L, V)."""
    stack = model.decoder.stack
    caches, crosses = stack.make_caches(), [CrossCache() for _ in stack.layers]
    return in_chunks(lambda part: model.decoder.logits(stack(part, memory, caches=caches, cross_caches=crosses)), x)
