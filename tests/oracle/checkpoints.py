"""Files of one HTDemucs in every form that programs on PyTorch write, and what the original makes of a mix."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demucs.htdemucs import HTDemucs
from demucs.repo import AnyModelRepo, BagOnlyRepo, LocalRepo
from samples import music
from torch import nn
from weights import build, decode, state_of

State = dict[str, torch.Tensor]


def write_checkpoints(arrays: dict[str, np.ndarray], kwargs: dict, seed: int, folder: str) -> tuple[dict, dict]:
    """Writes the files; `mix` (1, C, N) and the outputs out/NAME (S, C, N) of the model with the weights of each."""
    model = build("htdemucs", kwargs, seed)
    state, keywords = model.state_dict(), decode(kwargs)
    mix = music(int(model.segment * model.samplerate), model.audio_channels, seed, model.samplerate)[None]
    results = {"mix": mix}
    for name, (content, weights, given) in _files(model, state, keywords).items():
        torch.save(content, Path(folder) / name, **given)
        model.load_state_dict({key: x.float() for key, x in weights.items()})
        with torch.no_grad():
            results[f"out/{name}"] = model(torch.from_numpy(mix))[0].numpy()
    return {}, results


def _files(model: HTDemucs, state: State, kwargs: dict) -> dict[str, tuple[Any, State, dict[str, Any]]]:
    """By name: the content, the weights that are meant, and arguments of torch.save."""
    state = {key: x.clone() for key, x in state.items()}
    rest = {key: x for key, x in kwargs.items() if key != "sources"}
    anything = {"lr": np.float64(3e-4), "path": Path("/data"), 3: torch.float16, "seen": {1, 2}}

    def package(weights: State, **more: Any) -> dict[str, Any]:
        return {"klass": HTDemucs, "args": (), "kwargs": kwargs, "state": weights, "training_args": {}, **more}

    def changed(change: Callable[[torch.Tensor], torch.Tensor]) -> State:
        return {key: change(x) for key, x in state.items()}

    best = changed(lambda x: x * 0.98)
    half, brain = changed(torch.Tensor.half), changed(torch.Tensor.bfloat16)
    double = changed(lambda x: x.double() * (1 + 1e-9))
    strided = changed(lambda x: x.flip(0).transpose(0, -1).contiguous().transpose(0, -1))
    training = {"state": state, "best_state": best, "optimizer": torch.optim.Adam(model.parameters()).state_dict()}
    training |= {"history": [{"train": {"loss": 0.1}}], "ema_batch_0": {"state": state, "count": torch.tensor(3.0)}}
    segment = np.float32(kwargs["segment"])
    whole = nn.DataParallel(HTDemucs(**kwargs))
    whole.module.load_state_dict(state)
    return {
        "half.th": (package(half), half, {}),
        "bfloat16.pt": (package(brain), brain, {}),
        "double.pth": (package(double), double, {}),
        "strided.th": (package(strided), strided, {}),
        "parameters.th": (package(changed(nn.Parameter)), state, {}),
        "legacy.th": (package(half), half, {"_use_new_zipfile_serialization": False}),
        "protocol4.th": (package(half, training_args=anything), half, {"pickle_protocol": 4}),
        "protocol5.th": (package(half, training_args=anything), half, {"pickle_protocol": 5}),
        "protocol2.th": (package(half, training_args=anything, date=datetime.datetime.now()), half, {}),
        "positional.th": (package(half, args=(kwargs["sources"],), kwargs=rest), half, {}),
        "numpy.th": (package(half, kwargs={**kwargs, "segment": segment}), half, {}),
        "unknown.th": (package(half, kwargs={**kwargs, "num_subbands": 1, "later": None}), half, {}),
        "checkpoint.th": (training, best, {}),
        "state.ckpt": (state, state, {}),
        "lightning.ckpt": ({"state_dict": {f"model.{key}": x for key, x in state.items()}, "epoch": 3}, state, {}),
        "parallel.pth": ({"model": {f"module.{key}": x for key, x in state.items()}}, state, {}),
        "legacy_state.pth": (state, state, {"_use_new_zipfile_serialization": False}),
        "whole.pth": (whole.module, state, {}),
        "whole_parallel.pt": (whole, state, {"pickle_protocol": 4}),
    }


def read_repository(arrays: dict[str, np.ndarray], folder: str, name: str) -> tuple[dict, dict]:
    """The model that `demucs --repo FOLDER -n NAME` loads: its weights, options, and output for `mix` (B, C, N)."""
    root = Path(folder)
    models = LocalRepo(root)
    model = AnyModelRepo(models, BagOnlyRepo(root, models)).get_model(name)
    model = model.models[0] if hasattr(model, "models") else model
    with torch.no_grad():
        output = model.eval()(torch.from_numpy(arrays["mix"]))[0].numpy()
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in root.glob("*.th")}
    sources = list(model.sources)
    return {"sources": sources, "sha256": digests}, {
        **{f"state/{k}": x for k, x in state_of(model).items()},
        "out": output,
    }
