"""What the oracle can be asked. Every request returns (JSON values, arrays)."""

from __future__ import annotations

import hashlib
import json
import random
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from checkpoints import read_repository, write_checkpoints
from demucs import transformer
from demucs.apply import BagOfModels, apply_model
from demucs.htdemucs import HTDemucs
from samples import music
from torch import nn
from torch.nn import functional as F
from weights import build, decode, encode, state_of

Arrays = dict[str, np.ndarray]
Answer = tuple[dict[str, Any], Arrays]


@contextmanager
def default_dtype(name: str):
    """Everything that is created inside (windows, positions) has this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, name))
    try:
        yield getattr(torch, name)
    finally:
        torch.set_default_dtype(before)


def versions(arrays: Arrays) -> Answer:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "demucs", "numpy")}, {}


def tap(model: nn.Module, taps: Arrays) -> list:
    """Hooks that copy the output of every level (and the inputs of the first ones) into `taps`."""

    def keep(name: str, value: torch.Tensor) -> None:
        taps[f"tap/{name}"] = value.detach().numpy().copy()

    def output(name: str):
        return lambda _, __, value: keep(name, value[0] if isinstance(value, tuple) else value)

    def given(name: str):
        return lambda _, inputs: keep(name, inputs[0])

    handles = []
    for name, child in model.named_modules():
        parts = name.split(".")
        level = len(parts) == 2 and parts[0] in ("encoder", "tencoder", "decoder", "tdecoder")
        layer = len(parts) == 3 and parts[1] in ("layers", "layers_t")
        if level or layer or name.startswith("channel_"):
            handles.append(child.register_forward_hook(output(name)))
        if name == "crosstransformer":
            for index, branch in enumerate(("freq", "time")):
                handles.append(
                    child.register_forward_hook(
                        lambda _, __, value, index=index, branch=branch: keep(
                            f"crosstransformer.{branch}", value[index]
                        )
                    )
                )
    starts = {"normalised.freq": model.encoder[0], "normalised.time": model.tencoder[0]}
    if model.depth > 1:
        starts["embedded"] = model.encoder[1]
    handles += [child.register_forward_pre_hook(given(name)) for name, child in starts.items()]
    return handles


def htdemucs(
    arrays: Arrays,
    kwargs: dict,
    seed: int,
    signal_seed: int,
    length: int | None,
    dtype: str,
    taps: bool,
    batch: int,
    half: bool,
    state: bool,
) -> Answer:
    """One forward pass of demucs.htdemucs.HTDemucs; `mix` (B, C, N) in `arrays` replaces the signal."""
    model = build("htdemucs", kwargs, seed, half)
    training_length = int(model.segment * model.samplerate)
    mix = arrays.get("mix")
    if mix is None:
        length = training_length if length is None else length
        signals = [music(length, model.audio_channels, signal_seed + i, model.samplerate) for i in range(batch)]
        mix = np.stack(signals)
    result = {f"state/{name}": value for name, value in state_of(model).items()} if state else {}
    with torch.no_grad(), default_dtype(dtype) as kind:
        model.to(kind)
        x = torch.from_numpy(mix).to(kind)
        if taps:
            whole = training_length if model.use_train_segment else 0
            padded = F.pad(x, (0, max(0, whole - x.shape[-1])))
            result["tap/spectrogram"] = model._magnitude(model._spec(padded)).numpy()
            tap(model, result)
        output = model(x)
    return {}, {**result, "mix": mix, "output": output.numpy()}


def apply(
    arrays: Arrays,
    models: list[dict],
    seeds: list[int],
    weights: list[list[float]] | None,
    bag: bool,
    bag_segment: Any,
    random_seed: int,
    half: bool,
    state: bool,
    normalise: bool,
    options: dict,
) -> Answer:
    """demucs.apply.apply_model on `mix` (C, N), with the normalisation of demucs.api around it."""
    members = [build("htdemucs", kwargs, seed, half) for kwargs, seed in zip(models, seeds, strict=True)]
    model = BagOfModels(members, weights, decode(bag_segment)) if bag else members[0]
    wav = torch.from_numpy(arrays["mix"])
    ref = wav.mean(0)
    mean, std = (ref.mean(), ref.std() + 1e-8) if normalise else (0.0, 1.0)
    random.seed(random_seed)
    output = apply_model(model, ((wav - mean) / std)[None], **decode(options))
    output = output * std + mean
    result = {"output": output[0].numpy(), "next_draw": np.array(random.random())}
    if state:
        for index, member in enumerate(members):
            prefix = f"models.{index}." if bag else ""
            result |= {f"state/{prefix}{name}": value for name, value in state_of(member).items()}
    return {}, result


def differentiated(outputs: Any, leaves: dict[str, torch.Tensor], cotangents: Arrays, result: Arrays) -> None:
    """Adds out/0, out/1, ... and, where cotangents are given, gradient/NAME for every leaf."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs = tuple(value for value in outputs if value is not None)
    for index, value in enumerate(outputs):
        result[f"out/{index}"] = value.detach().numpy().copy()
    if not cotangents:
        return
    chosen = [(outputs[int(index)], torch.from_numpy(value)) for index, value in cotangents.items()]
    chosen = [(value, cotangent.to(value.dtype)) for value, cotangent in chosen]
    gradients = torch.autograd.grad(
        [value for value, _ in chosen],
        list(leaves.values()),
        [cotangent for _, cotangent in chosen],
        allow_unused=True,
    )
    for name, gradient in zip(leaves, gradients, strict=True):
        zero = torch.zeros_like(leaves[name])
        result[f"gradient/{name}"] = (zero if gradient is None else gradient).numpy().copy()


def split(arrays: Arrays, prefix: str) -> Arrays:
    return {name[len(prefix) :]: value for name, value in arrays.items() if name.startswith(prefix)}


def tensors(arrays: Arrays, kind: torch.dtype, gradient: bool) -> dict[str, torch.Tensor]:
    """Inputs as tensors; floating ones in `kind` and, if asked, as leaves of the gradient."""
    result = {}
    for name, value in arrays.items():
        tensor = torch.from_numpy(value)
        if tensor.is_complex():
            tensor = tensor.to(torch.complex128 if kind == torch.float64 else torch.complex64)
        elif tensor.is_floating_point():
            tensor = tensor.to(kind).requires_grad_(gradient)
        result[name] = tensor
    return result


def module(arrays: Arrays, name: str, kwargs: dict, seed: int, dtype: str, half: bool, options: dict) -> Answer:
    """One module of weights.MODULES, called with the arrays input/NAME as keywords."""
    built = build(name, kwargs, seed, half)
    given = split(arrays, "state/")
    if given:
        built.load_state_dict({key: torch.from_numpy(value) for key, value in given.items()})
    result = {f"state/{key}": value for key, value in state_of(built).items()}
    cotangents = split(arrays, "cotangent/")
    with default_dtype(dtype) as kind, torch.set_grad_enabled(bool(cotangents)):
        built.to(kind)
        inputs = tensors(split(arrays, "input/"), kind, bool(cotangents))
        outputs = built(**inputs, **decode(options))
        leaves = {key: value for key, value in inputs.items() if value.requires_grad}
        differentiated(outputs, leaves | dict(built.named_parameters()), cotangents, result)
    return {}, result


def _spec(x: torch.Tensor, nfft: int) -> torch.Tensor:
    return HTDemucs._spec(SimpleNamespace(hop_length=nfft // 4, nfft=nfft), x)


def _ispec(z: torch.Tensor, nfft: int, length: int) -> torch.Tensor:
    return HTDemucs._ispec(SimpleNamespace(hop_length=nfft // 4, nfft=nfft), z, length)


FUNCTIONS = {
    "sdpa": F.scaled_dot_product_attention,
    "gelu": F.gelu,
    "glu": F.glu,
    "softmax": F.softmax,
    "layer_norm": F.layer_norm,
    "group_norm": F.group_norm,
    "conv1d": F.conv1d,
    "conv2d": F.conv2d,
    "conv_transpose1d": F.conv_transpose1d,
    "conv_transpose2d": F.conv_transpose2d,
    "std": torch.std,
    "var": torch.var,
    "mean": torch.mean,
    "stft": _spec,
    "istft": _ispec,
    "sin_embedding": transformer.create_sin_embedding,
    "sin_embedding_2d": transformer.create_2d_sin_embedding,
    "sin_embedding_cape": transformer.create_sin_embedding_cape,
}


def function(arrays: Arrays, name: str, dtype: str, options: dict) -> Answer:
    """One function of FUNCTIONS, called with the arrays input/NAME and the options as keywords."""
    cotangents, result = split(arrays, "cotangent/"), {}
    with default_dtype(dtype) as kind, torch.set_grad_enabled(bool(cotangents)):
        inputs = tensors(split(arrays, "input/"), kind, bool(cotangents))
        outputs = FUNCTIONS[name](**inputs, **decode(options))
        leaves = {key: value for key, value in inputs.items() if value.requires_grad}
        differentiated(outputs, leaves, cotangents, result)
    return {}, result


def load(arrays: Arrays, path: str) -> Answer:
    """demucs.hf.load_safetensors_model, or demucs' own loading of a .th package."""
    from demucs.hf import load_safetensors_model
    from demucs.states import load_model

    model = load_safetensors_model(path) if path.endswith(".safetensors") else load_model(path)
    args, kwargs = model._init_args_kwargs
    klass = f"{type(model).__module__}.{type(model).__name__}"
    return {"klass": klass, "args": encode(list(args)), "kwargs": encode(kwargs)}, state_of(model)


def package(arrays: Arrays, kwargs: dict, seed: int, folder: str, signature: str, half: bool) -> Answer:
    """Writes SIGNATURE-CHECKSUM.th and SIGNATURE.safetensors as the released models are written."""
    from demucs.states import save_with_checksum
    from safetensors.torch import save_file

    model = build("htdemucs", kwargs, seed, half)
    state = {key: value.half() if half else value for key, value in model.state_dict().items()}
    content = {"klass": HTDemucs, "args": (), "kwargs": decode(kwargs), "state": state, "training_args": {}}
    save_with_checksum(content, Path(folder) / f"{signature}.th")
    metadata = {"klass": "demucs.htdemucs.HTDemucs", "args": "[]", "kwargs": json.dumps(kwargs)}
    tensors_path = Path(folder) / f"{signature}.safetensors"
    save_file({key: value.contiguous() for key, value in state.items()}, tensors_path, metadata)
    (th,) = Path(folder).glob(f"{signature}-*.th")
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (th, tensors_path)}
    return {"th": th.name, "safetensors": tensors_path.name, "sha256": digests}, {}


def op_samples(arrays: Arrays, **request: Any) -> Answer:
    """PyTorch's own samples of an operation and its answers: see op_db.py, which takes seconds to import."""
    import op_db

    return op_db.op_samples(arrays, **request)


OPS = {
    "op_samples": op_samples,
    "versions": versions,
    "htdemucs": htdemucs,
    "apply": apply,
    "module": module,
    "function": function,
    "load": load,
    "package": package,
    "write_checkpoints": write_checkpoints,
    "read_repository": read_repository,
}
