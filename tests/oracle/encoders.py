"""BERT and T5 of transformers: random ones of a configuration, what they give, gradients, and what T5 answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers

Arrays = dict[str, np.ndarray]
Answer = tuple[dict[str, Any], Arrays]


def network_make(arrays: Arrays, model: str, values: dict[str, Any], folder: str, seed: int, untie: bool) -> Answer:
    """Saves a random `model` as transformers does; no gain and no bias is 0 or 1. untie: its head is not its table."""
    made = getattr(transformers, model)(transformers.AutoConfig.for_model(**values))
    if untie:
        made.lm_head.weight = torch.nn.Parameter(torch.empty_like(made.lm_head.weight))
    rng = np.random.default_rng(seed)
    for name, parameter in made.named_parameters():
        shape = tuple(parameter.shape)
        if parameter.ndim == 1:
            low, high = (-0.2, 0.2) if name.endswith("bias") else (0.7, 1.3)
            drawn = rng.uniform(low, high, shape)
        else:
            drawn = rng.normal(size=shape) * shape[-1] ** -0.5
        parameter.data.copy_(torch.from_numpy(drawn.astype(np.float32)))
    made.save_pretrained(folder)
    return {}, {}


def network_run(arrays: Arrays, model: str, folder: str, outputs: list[str]) -> Answer:
    """What a saved model gives for integer arrays, by name and dtype, "logits/float64"; and the gradients of the sum of
    each output in `outputs` times the array of its name, "grad/float64/NAME"."""
    answers: Arrays = {}
    inputs = {name: torch.from_numpy(x).long() for name, x in arrays.items() if x.dtype.kind in "iub"}
    for dtype in (torch.float32, torch.float64):
        word = str(dtype).removeprefix("torch.")
        made = getattr(transformers, model).from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
        given = made(**inputs)
        loss = sum((given[name] * torch.from_numpy(arrays[name]).to(dtype)).sum() for name in outputs)
        loss.backward()
        answers |= {f"{name}/{word}": given[name].detach().numpy() for name in outputs}
        answers |= {f"grad/{word}/{name}": p.grad.numpy() for name, p in made.named_parameters() if p.grad is not None}
    return {}, answers


def network_answer(arrays: Arrays, folder: str, count: int) -> Answer:
    """["tokens"]: what a T5 answers to each source (B, S) of which `attention_mask` is valid, greedily."""
    made = transformers.T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float64).eval()
    inputs = {name: torch.from_numpy(x).long() for name, x in arrays.items()}
    # Its caches have as many layers as the encoder, whatever the decoder has.
    options = {"do_sample": False, "use_cache": False, "decoder_start_token_id": 0}
    with torch.no_grad():
        told = made.generate(**inputs, **options, max_new_tokens=count, min_new_tokens=count)
    return {}, {"tokens": told.numpy()}


OPS = {"network_make": network_make, "network_run": network_run, "network_answer": network_answer}
