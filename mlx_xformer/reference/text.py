"""Samplers, row by row and token by token. Axes: B batch, V vocabulary, n tokens so far."""

from __future__ import annotations

import numpy as np

from .backend import softmax


def greedy(logits: np.ndarray) -> np.ndarray:
    """The likeliest token of each row of (B, V), of several the first: (B,)."""
    return np.array([int(np.argmax(row)) for row in logits])


def penalize(logits: np.ndarray, history: np.ndarray, penalty: float) -> np.ndarray:
    """Tokens of the history (B, n) made less likely: positive logits are divided by `penalty`, negative ones multiplied
    with it, once for each token. -1 in the history is padding. Source: Keskar et al. 2019, arXiv 1909.05858."""
    out = logits.copy()
    for row, tokens in zip(out, history, strict=True):
        for token in {int(t) for t in tokens if t >= 0}:
            row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
    return out


def keep_top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """-inf for tokens less likely than the k-th likeliest of their row."""
    out = logits.copy()
    for row in out:
        ordered = sorted(row, reverse=True)
        row[row < ordered[min(k, len(ordered)) - 1]] = -np.inf
    return out


def keep_top_p(logits: np.ndarray, p: float) -> np.ndarray:
    """-inf for all but the fewest likely tokens of a row whose probabilities add up to p, and those as likely as the
    last of them. Source: Holtzman et al. 2020, arXiv 1904.09751."""
    out = logits.copy()
    for row in out:
        probabilities = softmax(row)
        total, least = 0.0, row.max()
        for token in np.argsort(-row, kind="stable"):
            if total >= p:
                break
            total, least = total + probabilities[token], row[token]
        row[row < least] = -np.inf
    return out


def keep_min_p(logits: np.ndarray, p: float) -> np.ndarray:
    """-inf for tokens less than p times as probable as the likeliest of their row. Source: Nguyen et al. 2025, arXiv
    2407.01082."""
    out = logits.copy()
    for row in out:
        probabilities = softmax(row)
        row[probabilities < p * probabilities.max()] = -np.inf
    return out


def sample(
    logits: np.ndarray,
    history: np.ndarray,
    noise: np.ndarray,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
) -> np.ndarray:
    """One token for each row, (B,), in the order of Hugging Face's steps: the penalty, the temperature, top_k, top_p,
    min_p. Temperature 0 takes the likeliest.

    noise (B, V) is from the Gumbel distribution: the token with the largest sum of logit and noise is drawn with the
    probabilities softmax(logits) (Gumbel 1954).
    """
    if repetition_penalty is not None:
        logits = penalize(logits, history, repetition_penalty)
    if temperature == 0:
        return greedy(logits)
    logits = logits / temperature
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    if min_p is not None:
        logits = keep_min_p(logits, min_p)
    return greedy(logits + noise)
