"""The families of models: from a checkpoint's configuration and weights to a module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..storage.checkpoint import Checkpoint, read_checkpoint
from ..storage.messages import describe_misfits, find_misfits
from .bert import Bert, BertConfig
from .causal_lm.model import CausalLM, CausalLMConfig
from .guides.ferrotorch import AttentionLayer, AttentionLayerConfig
from .guides.llm_prep import SequenceCheckpoint
from .guides.llm_prep import make as make_llm_prep
from .guides.scratch import EncoderDecoder, EncoderDecoderConfig, StackConfig, TransformerStack
from .htdemucs import Bag, BagConfig, HTDemucs, HTDemucsConfig
from .t5 import T5, T5Config
from .transformer import Transformer, TransformerConfig
from .whisper import Whisper, WhisperConfig

FAMILIES: dict[str, tuple[Any, Any]] = {  # name -> (configuration, module)
    "htdemucs": (HTDemucsConfig, HTDemucs),
    "htdemucs_bag": (BagConfig, Bag),
    "causal_lm": (CausalLMConfig, CausalLM),
    "bert": (BertConfig, Bert),
    "t5": (T5Config, T5),
    "whisper": (WhisperConfig, Whisper),
    "ferrotorch": (AttentionLayerConfig, AttentionLayer),
    "scratch": (StackConfig, TransformerStack),
    "scratch_encoder_decoder": (EncoderDecoderConfig, EncoderDecoder),
    "llm_prep": (SequenceCheckpoint, make_llm_prep),
    "transformer": (TransformerConfig, Transformer),
}


def make_config(family: str, config: Mapping[str, Any]) -> Any:
    """Makes a configuration.

    Args:
        family: A name of FAMILIES.
        config: Plain values, as in a checkpoint's config.json.

    Raises:
        ValueError: The family is unknown, or a value does not fit.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    return FAMILIES[family][0].from_dict(dict(config))


def make_model(family: str, config: Mapping[str, Any]) -> nn.Module:
    """Makes a module with fresh weights. Arguments and errors are those of make_config."""
    try:
        own = make_config(family, config)
        return FAMILIES[family][1](own)
    except (ArithmeticError, TypeError, AttributeError, RuntimeError, MemoryError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"the configuration makes no model: {type(error).__name__}, {reason}") from None


def parameter_shapes(family: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The name and shape of every parameter. Arguments and errors are those of make_config."""
    return _shapes(make_model(family, config))


def parameter_count(family: str, config: Mapping[str, Any]) -> int:
    """How many numbers the model has; those in packed matrices count one by one."""
    floats = {**config, "quantization": None} if family == "causal_lm" else config
    return sum(math.prod(shape) for shape in parameter_shapes(family, floats).values())


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    parameters = cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
    return {name: x.shape for name, x in parameters}


def load_model(folder: str | Path) -> nn.Module:
    """Loads the model of a checkpoint, ready to run.

    Its floats are float32; those of a causal_lm have its configuration's dtype or, without one, stay as stored. The
    weights of a bag are read when they are first evaluated, so that members which are never run are never read. Any
    thread may evaluate them, but only one at a time, as `separate` does: evaluate `model.parameters()` before several
    threads of yours call members.

    Args:
        folder: The checkpoint.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: It cannot be read, or a tensor is missing, unexpected or misshapen; the message lists them all.
    """
    checkpoint = read_checkpoint(folder)
    if checkpoint.family == "htdemucs_bag":
        with mx.stream(mx.new_thread_unsafe_stream(mx.cpu)):  # whose lazy arrays belong to no thread
            return _filled_model(folder, read_checkpoint(folder))
    model = _filled_model(folder, checkpoint)
    mx.eval(model.parameters())
    return model


def _filled_model(folder: str | Path, checkpoint: Checkpoint) -> nn.Module:
    """The model with the weights of its checkpoint, not yet evaluated."""
    try:
        model = make_model(checkpoint.family, checkpoint.config)
        if problems := find_misfits(checkpoint.weights, _shapes(model)):
            raise ValueError(describe_misfits(problems))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    wanted = checkpoint.config.get("dtype") if checkpoint.family == "causal_lm" else "float32"
    floats = {
        name: x.astype(getattr(mx, wanted)) if wanted and mx.issubdtype(x.dtype, mx.floating) else x
        for name, x in checkpoint.weights.items()
    }
    model.load_weights(list(floats.items()), strict=True)
    model.eval()
    return model


def module_of(family: str) -> str:
    """The module of a family, under the name that it has in models, converters.families and parity.families.

    It is "bert" for BERT, and "guides.scratch" for both families of that module.
    """
    parts = FAMILIES[family][0].__module__.removeprefix(f"{__package__}.").split(".")
    return ".".join(parts[: 2 if parts[0] == "guides" else 1])


MODULES = tuple(dict.fromkeys(map(module_of, FAMILIES)))
