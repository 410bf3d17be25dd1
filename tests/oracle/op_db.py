"""PyTorch's own sample inputs (torch.testing's op_db) and what PyTorch makes of them, in single and double precision.

A tensor among the arguments is written {"tensor": KEY}; tensors[KEY] says where its values stand.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.testing._internal.common_methods_invocations import op_db

Arrays = dict[str, np.ndarray]


def _entry(name: str, variant: str) -> Any:
    (found,) = [entry for entry in op_db if entry.name == name and entry.variant_test_name == variant]
    return found


def _drawn(entry: Any, seed: int) -> list[tuple[list, dict]]:
    """The samples of an operation, the random numbers starting anew: (positional, keywords) of each."""
    torch.manual_seed(seed)
    samples = entry.sample_inputs("cpu", torch.float32, requires_grad=False)
    return [([sample.input, *sample.args], dict(sample.kwargs)) for sample in samples]


def _packed(value: Any, key: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[key] = value
        return {"tensor": key}
    return list(value) if isinstance(value, tuple | torch.Size) else value


def _unpacked(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    return tensors[value["tensor"]] if isinstance(value, dict) else value


def _answer(name: str, args: list, kwargs: dict, tensors: dict, cotangents: list | None, kind: torch.dtype) -> tuple:
    """Outputs and gradients by the floating tensors, all of them computed in `kind`."""
    leaves = {
        key: value.detach().to(kind).requires_grad_() if value.is_floating_point() else value
        for key, value in tensors.items()
    }
    called = getattr(torch.nn.functional, name.rsplit(".", 1)[-1])  # the entry's own form seeds anew, which is slow
    outputs = called(*(_unpacked(v, leaves) for v in args), **{k: _unpacked(v, leaves) for k, v in kwargs.items()})
    outputs = [value for value in (outputs if isinstance(outputs, tuple) else (outputs,)) if value is not None]
    if cotangents is None:
        rng = np.random.default_rng(0)
        cotangents = [torch.from_numpy(rng.normal(size=tuple(x.shape)).astype(np.float32)) for x in outputs]
    floating = {key: value for key, value in leaves.items() if value.is_floating_point()}
    gradients = torch.autograd.grad(
        outputs,
        list(floating.values()),
        [u.to(x.dtype) for u, x in zip(cotangents, outputs, strict=True)],
        allow_unused=True,
    )
    filled = [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, floating.values(), strict=True)]
    return outputs, dict(zip(floating, filled, strict=True)), cotangents


def _quiet(kwargs: dict) -> dict:
    """The same keywords, with nothing dropped."""
    return {
        **kwargs,
        **{name: value for name, value in {"dropout_p": 0.0, "training": False}.items() if name in kwargs},
    }


class Pack:
    """Thousands of small arrays in a long one, since an .npz is slow for many; float64 holds every value of theirs."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []
        self.length = 0

    def add(self, x: torch.Tensor) -> list:
        """Where it stands: [start, shape, dtype]."""
        value = x.detach().numpy()
        self.parts.append(value.astype(np.float64).ravel())
        self.length += value.size
        return [self.length - value.size, list(value.shape), value.dtype.name]


def op_samples(arrays: Arrays, name: str, variant: str, seed: int, own: list | None) -> tuple[dict, Arrays]:
    """The samples of `name` for a seed, or those of `own`, whose tensors come in `arrays`. For each its arguments, the
    tensors among them, cotangents, and outputs and gradients in double and single precision. Nothing is dropped out."""
    torch.set_num_threads(1)  # more of them wait for one another longer than they work
    entry, pack = _entry(name, variant), Pack()
    samples: list[dict] = []
    for args, kwargs in _drawn(entry, seed) if own is None else [_own(sample, arrays) for sample in own]:
        tensors: dict[str, torch.Tensor] = {}
        args = [_packed(value, str(place), tensors) for place, value in enumerate(args)]
        kwargs = {key: _packed(value, key, tensors) for key, value in kwargs.items()}
        sample: dict = {"args": args, "kwargs": kwargs, "tensors": {key: pack.add(x) for key, x in tensors.items()}}
        cotangents = None
        for kind, out, gradient in (
            (torch.float64, "outputs", "gradients"),
            (torch.float32, "single", "single_gradients"),
        ):
            outputs, gradients, cotangents = _answer(name, args, _quiet(kwargs), tensors, cotangents, kind)
            sample[out] = [pack.add(x) for x in outputs]
            sample[gradient] = {key: pack.add(x) for key, x in gradients.items()}
        sample["cotangents"] = [pack.add(x) for x in cotangents]
        samples.append(sample)
    return {"samples": samples}, {"data": np.concatenate(pack.parts)}


def _own(sample: dict, arrays: Arrays) -> tuple[list, dict]:
    tensors = {key: torch.from_numpy(value) for key, value in arrays.items()}
    return [_unpacked(v, tensors) for v in sample["args"]], {
        k: _unpacked(v, tensors) for k, v in sample["kwargs"].items()
    }
