"""Keys of Hugging Face's config.json that encoders and encoder-decoders share, and checks of all keys."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ...storage.messages import shorten

# What makes no difference to the answers of a loaded model.
HARMLESS = {
    *("architectures", "_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "auto_map"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "initializer_range"),
    *("output_attentions", "output_hidden_states", "chunk_size_feed_forward", "id2label", "label2id", "return_dict"),
    *("torchscript", "finetuning_task", "problem_type", "keys_to_ignore_at_inference", "_attn_implementation_autoset"),
    *("attn_implementation", "gradient_checkpointing", "classifier_dropout", "task_specific_params", "n_positions"),
    *("transformers.js_config", "model_type", "max_length", "min_length", "num_beams", "early_stopping"),
    *("length_penalty", "no_repeat_ngram_size"),  # of how answers are searched
}
# Keys of which one value is understood, in encoders and encoder-decoders.
ONLY: dict[str, tuple[Any, ...]] = {"pruned_heads": ({}, None), "cross_attention_hidden_size": (None,)}

ACTIVATIONS = {
    **{"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"},
    **{"relu": "relu", "silu": "silu", "swish": "silu"},
}


def check_keys(
    values: Mapping[str, Any],
    known: Iterable[str],
    only: Mapping[str, tuple[Any, ...]],
    harmless: Iterable[str] = HARMLESS,
) -> None:
    """Checks the keys of a config.json.

    Args:
        values: The config.json.
        known: The keys that the caller reads.
        only: Keys of which only some values are understood, and these values.
        harmless: Keys that make no difference to the answers of a loaded model.

    Raises:
        ValueError: A key is neither known nor harmless, or has a value that is not understood.
    """
    unknown = sorted(values.keys() - {*known, *only, *harmless})
    if unknown:
        raise ValueError(f"config.json has keys that are not handled: {shorten(', '.join(unknown))}")
    for key, right in only.items():
        if key in values and values[key] not in right:
            raise ValueError(f"{key} must be {json.dumps(right[0])}, got {shorten(values[key])}")


def read_activation(key: str, value: Any) -> str:
    """The name here of an activation that a key names."""
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise ValueError(f"{key} must be one of {', '.join(ACTIVATIONS)}, got {shorten(value)}")
    return ACTIVATIONS[value]


def name_activation(ours: str) -> str:
    """Hugging Face's name of an activation."""
    return {"gelu_tanh": "gelu_new"}.get(ours, ours)


def check_settings(values: Mapping[str, Any], known: Iterable[str], needed: Iterable[str]) -> dict[str, Any]:
    """Checks the settings given for a file of tensors.

    Args:
        values: The settings.
        known: The names that may be set.
        needed: The names that must be set.

    Raises:
        ValueError: A setting is unknown or missing.
    """
    known = list(known)
    if unknown := sorted(values.keys() - set(known)):
        raise ValueError(f"settings must be among {', '.join(known)}, got {shorten(', '.join(unknown))}")
    if missing := [name for name in needed if name not in values]:
        raise ValueError(f"the shapes do not tell {', '.join(missing)}: it must be set")
    return dict(values)


def read_size(tensors: Mapping[str, Any], name: str, axis: int, ndim: int = 2) -> int:
    """The length of a tensor along an axis. ValueError if it is missing or has another number of axes."""
    x = tensors.get(name)
    if x is None:
        raise ValueError(f"the tensors must have {name}")
    if x.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} axes, got shape {x.shape}")
    return int(x.shape[axis])
