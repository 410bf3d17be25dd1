"""Whisper: an encoder of log-mel spectrograms and a decoder of tokens that listens to it.

Sources: Radford et al. 2022, arXiv 2212.04356; openai/whisper, whisper/model.py. Axes: B batch, T frames of the
spectrogram, F mel bins, S positions of the memory, L tokens, E embed_dim, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from ..backend.activations import gelu
from ..nn.cache import CacheMaker, CacheOptions, CrossCache, KVCache
from ..nn.checks import check_last, check_tokens
from ..nn.config import Config
from ..nn.layers import Embedding
from ..nn.positions import sinusoidal_1d
from ..nn.transformer import LayerConfig, Stack, last_positions
from .bound import Conditioned


@dataclass(frozen=True)
class WhisperConfig(Config):
    """The fields of a Whisper, checked.

    Attributes:
        vocab_size: Tokens, V.
        embed_dim: Channels of a token and of the memory.
        num_heads: Heads of each attention.
        hidden_dim: Channels inside the feed-forward networks.
        encoder_layers: Layers of the encoder.
        decoder_layers: Layers of the decoder.
        mel_bins: Bins of the spectrogram.
        source_positions: The most positions of the memory, half as many as the spectrogram has frames.
        target_positions: The most tokens.

    Raises:
        ValueError: A field is unknown, of the wrong type or out of range; the message names it.
    """

    _what: ClassVar[str] = "Whisper"

    vocab_size: int
    embed_dim: int
    num_heads: int
    hidden_dim: int
    encoder_layers: int
    decoder_layers: int
    mel_bins: int = 80
    source_positions: int = 1500
    target_positions: int = 448

    def __post_init__(self) -> None:
        self._check_whole("vocab_size", "embed_dim", "num_heads", "hidden_dim", "encoder_layers", "decoder_layers")
        self._check_whole("mel_bins", "source_positions", "target_positions")
        self._check_multiple("embed_dim", "num_heads")
        if self.embed_dim < 4 or self.embed_dim % 2:
            raise ValueError(f"embed_dim must be even and at least 4, got {self.embed_dim}")

    def layer(self, *, decoder: bool) -> LayerConfig:
        """The layers of the encoder, or of the decoder. Keys have no bias: it would change no weight of attention."""
        return LayerConfig(
            self.embed_dim,
            self.num_heads,
            self.hidden_dim,
            activation="gelu",
            norm_first=True,
            bias=("q", "v", "out"),
            causal=decoder,
            cross=decoder,
        )


class Encoder(nn.Module):
    """Two convolutions, the second of which halves the frames, positions, and layers with a norm after the last."""

    def __init__(self, config: WhisperConfig):
        super().__init__()
        self.config = config
        E = config.embed_dim
        self.conv1 = nn.Conv1d(config.mel_bins, E, 3, padding=1)
        self.conv2 = nn.Conv1d(E, E, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(config.source_positions, E)
        cosines, sines = mx.split(sinusoidal_1d(config.source_positions, E), 2, axis=1)
        self.embed_positions.weight = mx.concatenate([sines, cosines], axis=1)
        self.embed_positions.freeze()  # they are a formula's: training leaves them alone
        self.stack = Stack(config.layer(decoder=False), config.encoder_layers, final_norm=True)

    def __call__(self, mel: mx.array) -> mx.array:
        """mel (B, T, F) -> the memory (B, S, E) with S = T / 2, rounded up."""
        config, longest = self.config, 2 * self.config.source_positions
        if mel.ndim != 3 or mel.shape[2] != config.mel_bins or not 1 <= mel.shape[1] <= longest:
            raise ValueError(f"mel must be (B, 1 to {longest} frames, {config.mel_bins} bins), got shape {mel.shape}")
        x = self.embed(mel)
        return self.stack(x + self.embed_positions.weight[: x.shape[1]])

    def embed(self, mel: mx.array) -> mx.array:
        """What the convolutions make of it, (B, T, F) -> (B, S, E)."""
        return gelu(self.conv2(gelu(self.conv1(mel))))


class Decoder(nn.Module):
    """Tokens and learned positions through causal layers that attend to the memory, with a norm after the last."""

    def __init__(self, config: WhisperConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.embed_dim)
        self.embed_positions = nn.Embedding(config.target_positions, config.embed_dim)
        self.stack = Stack(config.layer(decoder=True), config.decoder_layers, final_norm=True)

    def embed(self, tokens: mx.array, offset: int | mx.array = 0) -> mx.array:
        """tokens (B, L), the first at position `offset`, of each row if (B,) -> (B, L, E)."""
        places = mx.arange(tokens.shape[1]) + (offset if isinstance(offset, int) else offset[:, None])
        return self.embed_tokens(tokens) + self.embed_positions(mx.maximum(places, 0))  # below 0 is padding

    def logits(self, x: mx.array) -> mx.array:
        """What the stack gives, (B, L, E) -> (B, L, V), by the table of the embeddings."""
        return self.embed_tokens.as_linear(x)


class Whisper(CacheMaker, nn.Module):
    """A spectrogram and the tokens so far to the logits of the tokens after them."""

    def __init__(self, config: WhisperConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def __call__(self, mel: mx.array, tokens: mx.array) -> mx.array:
        """mel (B, T, F), tokens (B, L) -> logits (B, L, V). ValueError for tokens outside the vocabulary."""
        check_tokens("tokens", tokens, self.config.vocab_size)
        return self.decode(tokens, self.encoder(mel))

    def decode(
        self,
        tokens: mx.array,
        memory: mx.array,
        *,
        caches: Sequence[KVCache] | None = None,
        cross_caches: Sequence[CrossCache] | None = None,
        last: int | None = None,
        check: bool = True,
    ) -> mx.array:
        """Computes the logits of the token after each, given a memory.

        Args:
            tokens: (B, L), from 0 to vocab_size - 1.
            memory: (B, S, E), what the encoder gives.
            caches: One for each layer. They hold the tokens before these, and these are appended.
            cross_caches: One for each layer, for what is projected of the memory.
            last: Of how many of the last positions to compute the logits; by default of all.
            check: Whether to refuse tokens outside the vocabulary, for which the call waits until the tokens are
                computed. A loop that feeds a model its own tokens, as generate() does, goes without.

        Returns:
            Logits (B, L, V), or (B, last, V).

        Raises:
            ValueError: An argument does not fit, or a token is outside the vocabulary.
        """
        E, most = self.config.embed_dim, self.config.target_positions
        check_tokens("tokens", tokens, self.config.vocab_size if check else None)
        if memory.ndim != 3 or memory.shape[0] != tokens.shape[0] or memory.shape[2] != E:
            raise ValueError(f"memory must be ({tokens.shape[0]}, length, {E}), got shape {memory.shape}")
        check_last(last)
        before = caches[0].length if caches else 0
        if before + tokens.shape[1] > most:
            raise ValueError(f"tokens must be at most {most}, one a position, got {before + tokens.shape[1]}")
        x = self.decoder.embed(tokens, caches[0].offset if caches else 0)
        x = self.decoder.stack(x, memory, caches=caches, cross_caches=cross_caches)
        return self.decoder.logits(last_positions(x, last))

    def caches_for(self, options: CacheOptions) -> list[KVCache]:
        """See make_caches(): of the layers of the decoder. Unless a capacity is given, they hold as many tokens as the
        model has positions."""
        if options.capacity is None:
            options = replace(options, capacity=self.config.target_positions)
        return self.decoder.stack.caches_for(options)

    def listen(self, mel: mx.array) -> Conditioned:
        """A model of the tokens of one recording, mel (T, F), for generate(), or of several, (B, T, F), for
        batch_generate()."""
        if mel.ndim not in (2, 3):
            raise ValueError(f"mel must be (T, F) or (B, T, F), got shape {mel.shape}")
        return Conditioned(self, self.encoder(mel[None] if mel.ndim == 2 else mel))
