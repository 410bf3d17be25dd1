"""Whisper of transformers: a random one, what it makes of a spectrogram, and the spectrograms themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

Arrays = dict[str, np.ndarray]
Answer = tuple[dict[str, Any], Arrays]


def whisper_make(arrays: Arrays, values: dict[str, Any], folder: str, seed: int) -> Answer:
    """Saves a random model as transformers does; no gain and no bias is 0 or 1."""
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(WhisperConfig(**values, attn_implementation="eager"))
    rng = np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if name == "model.encoder.embed_positions.weight":
            continue  # a formula's
        if parameter.ndim == 1:
            drawn = rng.uniform(*((-0.2, 0.2) if name.endswith("bias") else (0.7, 1.3)), shape)
        else:
            drawn = rng.normal(size=shape) * np.prod(shape[1:]) ** -0.5
            drawn *= 4 if name == "model.decoder.embed_positions.weight" else 1  # or it says one thing for ever
        parameter.data.copy_(torch.from_numpy(drawn.astype(np.float32)))
    model.save_pretrained(folder)
    return {}, {}


def whisper_answers(arrays: Arrays, folder: str, dtypes: list[str], count: int) -> Answer:
    """Of mel (B, F, T) and tokens (B, L), in each dtype: memory and logits and, of their sum with the cotangent, the
    gradients by mel ("mel") and by every parameter. And `count` tokens that are the likeliest after the first of the
    tokens, without caches ("greedy")."""
    answers = {}
    for dtype in dtypes:
        kind = getattr(torch, dtype)
        model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=kind, attn_implementation="eager").eval()
        mel = torch.from_numpy(arrays["mel"]).to(kind).requires_grad_()
        tokens = torch.from_numpy(arrays["tokens"]).long()
        out = model(input_features=mel, decoder_input_ids=tokens, use_cache=False)
        answers |= {f"{dtype}/memory": out.encoder_last_hidden_state, f"{dtype}/logits": out.logits}
        (out.logits * torch.from_numpy(arrays["cotangent"]).to(kind)).sum().backward()
        answers[f"{dtype}/mel"] = mel.grad
        answers |= {f"{dtype}/{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    said = tokens[:, :1]
    with torch.no_grad():
        for _ in range(count):
            logits = model(input_features=mel, decoder_input_ids=said, use_cache=False).logits
            said = torch.cat([said, logits[:, -1:].argmax(-1)], dim=1)
    answers["greedy"] = said
    return {}, {name: x.detach().numpy() for name, x in answers.items()}


def whisper_features(arrays: Arrays, bins: int) -> Answer:
    """The spectrogram of audio (B, N) as transformers makes it, (B, bins, 3000), and its filters (201, bins)."""
    extractor = WhisperFeatureExtractor(feature_size=bins)
    made = extractor(list(arrays["audio"]), sampling_rate=16000, return_tensors="np", device="cpu")
    return {}, {"mel": made["input_features"], "filters": np.asarray(extractor.mel_filters)}


OPS = {"whisper_make": whisper_make, "whisper_answers": whisper_answers, "whisper_features": whisper_features}
