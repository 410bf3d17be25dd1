"""Three cases for two checkouts of this project (compare.py): they import names that both have.

FOLDER is a checkout's own, and the folder above it holds llama/, a model in Hugging Face's layout. A run repeats what
is short.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from cases.common import describe_ours, set_weights
from mlx_xformer import HTDemucs, HTDemucsConfig, convert, generate, load
from mlx_xformer.models.transformer import Transformer, TransformerConfig

# isort: split
import mlx.core as mx  # after mlx_xformer, which chooses the BLAS

TOKENS, PROMPT = 64, 64
SOURCE, VOCABULARY, START = 256, 1000, 1  # of the encoder-decoder
DECODES, TRANSLATIONS = 3, 5  # in a run


def segment(_: Path) -> dict[str, Any]:
    """One segment of the official htdemucs, 7.8 s, batch 1."""
    config = HTDemucsConfig(sources=("drums", "bass", "other", "vocals"), segment=Fraction(39, 5), bottom_channels=512)
    model: Any = HTDemucs(config)
    set_weights(model)
    model.eval()
    samples = round(config.segment * config.samplerate)
    mix = mx.array(np.random.default_rng(1).normal(scale=0.1, size=(1, 2, samples)).astype(np.float32))
    return describe_ours(lambda: np.array(model(mix)))


def decode(folder: Path) -> dict[str, Any]:
    """TOKENS tokens after a prompt of PROMPT, by a Llama in float32."""
    convert(folder.parent / "llama", folder / "checkpoint")
    model: Any = load(folder / "checkpoint")
    prompt = np.random.default_rng(1).integers(0, 8192, PROMPT).tolist()

    def run() -> np.ndarray:
        return np.array([[token.id for token in generate(model, prompt, max_tokens=TOKENS)] for _ in range(DECODES)])

    return describe_ours(run)


def make_encoder_decoder() -> tuple[Transformer, mx.array]:
    """The model, and a source (1, SOURCE)."""
    config = TransformerConfig(
        VOCABULARY,
        embed_dim=256,
        num_heads=8,
        num_encoder_layers=4,
        num_decoder_layers=4,
        hidden_dim=1024,
        tie_embeddings=False,
    )
    model = Transformer(config)
    set_weights(model)
    model.eval()
    source = mx.array(np.random.default_rng(1).integers(0, VOCABULARY, (1, SOURCE)))
    mx.eval(source)
    return model, source


def sample_unrepeated(logits: mx.array, history: mx.array) -> mx.array:
    """The most likely token that is none of the last five. Random weights would give one token again and again."""
    return mx.argmax(mx.put_along_axis(logits, history[:, -5:], mx.array(-mx.inf), axis=-1), axis=-1)


def generate_over(model: Any, source: mx.array) -> list[int]:
    """TOKENS tokens over a source, after START."""
    found = generate(model.conditioned(source), [START], max_tokens=TOKENS, sampler=sample_unrepeated)
    return [token.id for token in found]


def translate(_: Path) -> dict[str, Any]:
    """TOKENS tokens over a source of SOURCE by an encoder-decoder with its caches."""
    model, source = make_encoder_decoder()
    return describe_ours(lambda: np.array([generate_over(model, source) for _ in range(TRANSLATIONS)]))
