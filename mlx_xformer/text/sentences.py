"""Sentence vectors: the mean of a BERT's hidden states over the tokens of each sentence, normalized to length 1.

Source: Reimers and Gurevych 2019, arXiv 1908.10084. The settings of a sentence-transformers folder are followed.
Axes: N sentences, B sentences of a batch, L tokens, E embed_dim.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..models.bert import Bert, normalize, pool_mean
from ..models.families import load_model
from ..pretrained.loading import resolve
from ..storage.checkpoint import SENTENCES
from .tokenizer import Tokenizer

_MODULES, _TEXTS, _POOLING = SENTENCES
_KNOWN = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])


class SentenceEncoder:
    """Converts sentences to vectors whose dot products are cosines.

    Args:
        path_or_name: a BERT with its tokenizer: a folder or a name on the hub, see `load`.

    Attributes:
        model: the BERT.
        tokenizer: its tokenizer.
        max_length: the most tokens of a sentence; longer ones are truncated.

    Raises:
        ValueError: if the model is not a BERT, or if its vectors are not means over tokens.
        OSError: if it cannot be read.
    """

    def __init__(self, path_or_name: str | Path):
        folder = resolve(path_or_name)
        model = load_model(folder)
        if not isinstance(model, Bert):
            raise ValueError(f"{path_or_name}: vectors of sentences need a BERT, got a {type(model).__name__}")
        self.model, self.tokenizer = model, Tokenizer(folder)
        self._normalizes = _has_norm(folder)
        self.max_length = min(model.config.max_positions, _read_max_length(folder) or model.config.max_positions)

    def encode(
        self, sentences: Sequence[str], *, batch: int = 32, progress: Callable[[int, int], None] | None = None
    ) -> mx.array:
        """Converts sentences to vectors.

        Args:
            sentences: N texts.
            batch: how many sentences, of similar lengths, run at once.
            progress: called as progress(done, N) after each batch.

        Returns:
            (N, E) float32, in the order of the sentences.

        Raises:
            ValueError: if `sentences` is a single text, or if `batch` is below 1.
        """
        if isinstance(sentences, str):
            raise ValueError(f"sentences must be a sequence of texts, got one text, {sentences!r:.80}")
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        ids = self.tokenizer.encode_all(sentences, max_length=self.max_length)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        parts = []
        for start in range(0, len(order), batch):
            parts.append(self._vectors([ids[i] for i in order[start : start + batch]]))
            mx.eval(parts)
            if progress is not None:
                progress(min(start + batch, len(order)), len(order))
        if not parts:
            return mx.zeros((0, self.model.config.embed_dim))
        return mx.concatenate(parts)[mx.array(np.argsort(order))]

    def _vectors(self, ids: Sequence[Sequence[int]]) -> mx.array:
        """The vectors (B, E) of the tokens of sentences, which are padded to the same length."""
        lengths = np.array([len(row) for row in ids])
        L = max(int(lengths.max()), 1)
        tokens = mx.array([[*row, *[0] * (L - len(row))] for row in ids], mx.int32)
        mask = mx.array(np.arange(L)[None] < lengths[:, None])
        x = pool_mean(self.model(tokens, mask=mask).astype(mx.float32), mask)
        return normalize(x) if self._normalizes else x


def _has_norm(folder: Path) -> bool:
    """Whether vectors are normalized. ValueError if they are made in steps that are not supported."""
    if (folder / _MODULES).is_file():
        modules = _read(folder / _MODULES, list)
        names = [str(one.get("type") if isinstance(one, dict) else one).rpartition(".")[2] for one in modules]
        if names not in _KNOWN:
            steps = " or ".join(", ".join(known) for known in _KNOWN)
            raise ValueError(f"{folder / _MODULES}: the steps must be {steps}, got {', '.join(names):.80}")
    else:
        names = _KNOWN[1]
    if (folder / _POOLING).is_file():
        pooling = _read(folder / _POOLING, dict)
        modes = {key for key, value in pooling.items() if key.startswith("pooling_mode_") and value}
        if modes != {"pooling_mode_mean_tokens"} and pooling.get("pooling_mode") != "mean":
            found = ", ".join(sorted(modes)) or pooling.get("pooling_mode")
            raise ValueError(f"{folder / _POOLING}: the pooling must be pooling_mode_mean_tokens, got {found!s:.80}")
    return "Normalize" in names


def _read_max_length(folder: Path) -> int | None:
    """The most tokens of a sentence, if the folder has a setting for it."""
    if not (folder / _TEXTS).is_file():
        return None
    settings = _read(folder / _TEXTS, dict)
    if settings.get("do_lower_case"):
        raise ValueError(f"{folder / _TEXTS}: do_lower_case must be false, got true: the tokenizer does this")
    length = settings.get("max_seq_length")
    if length is not None and (type(length) is not int or length < 1):
        raise ValueError(f"{folder / _TEXTS}: max_seq_length must be a whole number from 1, got {length!r:.80}")
    return length


def _read(path: Path, kind: type) -> Any:
    """Reads a JSON file that must be an object or a list."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({' '.join(str(error).split())[:160]})") from None
    if not isinstance(found, kind):
        raise ValueError(f"{path}: must be a JSON {'object' if kind is dict else 'list'}, got {type(found).__name__}")
    return found
