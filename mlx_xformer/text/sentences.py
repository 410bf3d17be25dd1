"""Vectors of sentences: a BERT and its tokenizer, the mean over the tokens of each sentence, to length 1.

Source: Reimers and Gurevych 2019, arXiv 1908.10084; what a folder of sentence-transformers says beside the model is
followed where it is there. Axes: N sentences, B of them at a time, L tokens, E embed_dim.
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
    """Sentences to vectors whose products are cosines. Takes what load() takes: a BERT with its tokenizer.

    longest: tokens of a sentence that count, as many as the model has positions or the folder says. ValueError or
    OSError, in one line, for another model, or for one whose vectors are made in another way.
    """

    def __init__(self, path_or_name: str | Path):
        folder = resolve(path_or_name)
        model = load_model(folder)
        if not isinstance(model, Bert):
            raise ValueError(f"{path_or_name}: vectors of sentences need a BERT, got a {type(model).__name__}")
        self.model, self.tokenizer = model, Tokenizer(folder)
        self._normalizes = _has_norm(folder)
        self.longest = min(model.config.max_positions, _longest(folder) or model.config.max_positions)

    def encode(
        self, sentences: Sequence[str], *, batch: int = 32, progress: Callable[[int, int], None] | None = None
    ) -> mx.array:
        """(N, E) float32. batch: sentences at a time, of like lengths. progress(done, N) is told after each."""
        if isinstance(sentences, str):
            raise ValueError(f"sentences must be a sequence of texts, got one text, {sentences!r:.80}")
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        ids = self.tokenizer.encode_all(sentences, longest=self.longest)
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
        """Of the tokens of sentences, padded to the longest, (B, E)."""
        lengths = np.array([len(row) for row in ids])
        L = max(int(lengths.max()), 1)
        tokens = mx.array([[*row, *[0] * (L - len(row))] for row in ids], mx.int32)
        mask = mx.array(np.arange(L)[None] < lengths[:, None])
        x = pool_mean(self.model(tokens, mask=mask).astype(mx.float32), mask)
        return normalize(x) if self._normalizes else x


def _has_norm(folder: Path) -> bool:
    """Whether vectors become of length 1. ValueError for steps that we do not have."""
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
            told = ", ".join(sorted(modes)) or pooling.get("pooling_mode")
            raise ValueError(f"{folder / _POOLING}: the pooling must be pooling_mode_mean_tokens, got {told!s:.80}")
    return "Normalize" in names


def _longest(folder: Path) -> int | None:
    """Tokens of a sentence, if the folder says how many."""
    if not (folder / _TEXTS).is_file():
        return None
    told = _read(folder / _TEXTS, dict)
    if told.get("do_lower_case"):
        raise ValueError(f"{folder / _TEXTS}: do_lower_case must be false, as tokenizers do it, got true")
    longest = told.get("max_seq_length")
    if longest is not None and (type(longest) is not int or longest < 1):
        raise ValueError(f"{folder / _TEXTS}: max_seq_length must be a whole number from 1, got {longest!r:.80}")
    return longest


def _read(path: Path, kind: type) -> Any:
    """A file of JSON that is an object or a list."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({' '.join(str(error).split())[:160]})") from None
    if not isinstance(found, kind):
        raise ValueError(f"{path}: must be a JSON {'object' if kind is dict else 'list'}, got {type(found).__name__}")
    return found
