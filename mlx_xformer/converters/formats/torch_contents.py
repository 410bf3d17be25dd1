"""What a PyTorch file holds: a state dict, wrapped or not, a package of demucs, a training run's file, a whole module.

Sources: demucs/states.py (a package is {klass, args, kwargs, state, training_args}), demucs/solver.py (a training run's
checkpoint.th is {state, best_state, optimizer, history, args}), torch/nn/modules/module.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from ...storage.messages import shorten
from .demucs_values import encode_value
from .torch_values import Opaque, Symbol, View, describe_value

_PACKAGE = {"klass", "args", "kwargs", "state"}
_BEST = "best_state"
_RUN = ("model", "model_segment", "dset", "htdemucs")  # what tells the model in the arguments of demucs' training run
_WRAPPERS = ("state_dict", "model_state_dict", "state", "model")  # names under which programs save a state dict
_MODULE_WRAPPERS = ("module", "_orig_mod")  # the one child of DataParallel, and of what torch.compile makes
_MAX_WRAPPERS = 4
_MAX_NODES = 10_000  # values in the arguments of a model, or modules in a whole model
_MAX_DEPTH = 8  # of values in the arguments
_MAX_MODULES = 32  # of modules in modules


def read_contents(value: Any) -> tuple[dict[str, View], dict[str, str]]:
    """The named tensors that a file holds, and what it says of them.

    Args:
        value: What read_pickle made of the file.

    Returns:
        The tensors, and metadata: `klass`, `args` and `kwargs` of a package or a model of demucs, in JSON text as
        demucs/hf.py has them; `place`, the name under which the tensors are, if they are not all; `training`, of a
        training run of demucs the arguments that tell the model, in JSON text.

    Raises:
        ValueError: There are no named tensors, or several names that may be meant.
    """
    names: list[str] = []
    run = _describe_run(value) if isinstance(value, dict) and _BEST in value else {}
    while (name := _find_wrapper(value)) is not None and len(names) < _MAX_WRAPPERS:
        names.append(name)
        value = value[name]
    metadata = run | ({"place": ".".join(names)} if names else {})
    if isinstance(value, dict) and value.keys() >= _PACKAGE:
        if not isinstance(value["klass"], Symbol):
            raise ValueError("a demucs package must hold a class, a tuple and a dict as klass, args and kwargs")
        return _check_state(value["state"]), metadata | _describe(value["klass"].name, value["args"], value["kwargs"])
    if _is_module(value):
        value = _unwrap_module(value)
        return _check_state(dict(_walk(value, "", [_MAX_NODES], _MAX_MODULES))), metadata | _describe_module(value)
    if not isinstance(value, dict):
        raise ValueError(f"must hold a dict of tensors or a demucs package, got {describe_value(value)}")
    return _check_state(value), metadata


def _find_wrapper(value: Any) -> str | None:
    """The name under which a dict has tensors, if it is not a state dict or a package itself.

    A training run of demucs has its last state and its best one, which is meant.
    """
    if not isinstance(value, dict) or value.keys() >= _PACKAGE:
        return None
    if _has_tensors(value.get(_BEST)):
        return _BEST
    found = [name for name in _WRAPPERS if _has_tensors(value.get(name))]
    if len(found) > 1:
        raise ValueError(f"must hold the tensors of one model, got {' and '.join(found)}: save one of them alone")
    return found[0] if found else None


def _has_tensors(value: Any) -> bool:
    if not isinstance(value, dict):
        return _is_module(value)
    inner = (*_WRAPPERS, _BEST)
    return any(isinstance(x, View) or (name in inner and isinstance(x, (dict, Opaque))) for name, x in value.items())


def _check_state(value: Any) -> dict[str, View]:
    """The state dict, if it is one."""
    if isinstance(value, dict) and value.get("__quantized"):
        raise ValueError("weights quantised with DiffQ are not supported")
    if not isinstance(value, dict):
        raise ValueError(f"the state must be a dict from names to tensors, got {describe_value(value)}")
    if others := [name for name in value if not isinstance(name, str)]:
        raise ValueError(f"the state must be a dict from names to tensors, got {describe_value(others[0])}")
    others = sorted(name for name, entry in value.items() if not isinstance(entry, View))
    if others or not value:
        what = f"{shorten(', '.join(others))}: {describe_value(value[others[0]])}" if others else "nothing at all"
        raise ValueError(f"every value must be a tensor, got {what}")
    return value


def _is_module(value: Any) -> bool:
    """Whether a value stands for a whole module, as torch.save(model, ...) writes it."""
    return isinstance(value, Opaque) and isinstance(value.state, dict) and isinstance(value.state.get("_modules"), dict)


def _unwrap_module(module: Opaque) -> Opaque:
    """The module that others are wrapped around."""
    for _ in range(_MAX_WRAPPERS):
        children = module.state["_modules"]
        name = next(iter(children), None)
        if len(children) != 1 or name not in _MODULE_WRAPPERS or not _is_module(children[name]):
            break
        module = children[name]
    return module


def _walk(module: Any, prefix: str, budget: list[int], depth: int) -> Iterator[tuple[str, Any]]:
    """The parameters and buffers of a module under the names of its state dict. The budget and the depth bound modules
    that share or contain themselves."""
    budget[0] -= 1
    if budget[0] < 0 or depth == 0:
        raise ValueError("the modules of the model are nested too deep or too many")
    for kind in ("_parameters", "_buffers"):
        tensors = module.state.get(kind)
        if not isinstance(tensors, dict):
            raise ValueError(f"a module must have {kind}, got {describe_value(tensors)}")
        yield from ((f"{prefix}{name}", x) for name, x in tensors.items() if x is not None)
    for name, child in module.state["_modules"].items():
        if _is_module(child):
            yield from _walk(child, f"{prefix}{name}.", budget, depth - 1)
        elif child is not None:
            raise ValueError(f"module {shorten(prefix + str(name))} must be a module, got {describe_value(child)}")


def _describe_module(module: Opaque) -> dict[str, str]:
    """The class and the arguments of a model of demucs, which demucs.states.capture_init keeps."""
    match module.state.get("_init_args_kwargs"):
        case (tuple() | list() as args, dict(kwargs)):
            return _describe(module.name, args, kwargs)
    return {}


def _describe_run(run: dict[str, Any]) -> dict[str, str]:
    """The arguments of a training run of demucs that tell its model, if they are plain values."""
    args = run.get("args")
    if isinstance(args, Opaque) and args.name.startswith("omegaconf.") and isinstance(args.state, dict):
        args = args.state.get("_content")
    if not isinstance(args, dict):
        return {}
    try:
        told = {key: _make_plain(args[key], [_MAX_NODES], _MAX_DEPTH) for key in _RUN if key in args}
    except ValueError:
        return {}
    return {"training": json.dumps(told)}


def _describe(klass: str, args: Any, kwargs: Any) -> dict[str, str]:
    """The metadata of a package or model of demucs."""
    budget = [_MAX_NODES]
    args, kwargs = _make_plain(args, budget, _MAX_DEPTH), _make_plain(kwargs, budget, _MAX_DEPTH)
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise ValueError("a demucs package must hold a class, a tuple and a dict as klass, args and kwargs")
    return {"klass": klass, "args": json.dumps(args), "kwargs": json.dumps(kwargs)}


def _make_plain(value: Any, budget: list[int], depth: int) -> Any:
    """A value as JSON holds it. The budget and the depth bound values that share or contain themselves."""
    budget[0] -= 1
    if budget[0] < 0 or depth == 0:
        raise ValueError("the arguments of the model are nested too deep or too many")
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _make_plain(item, budget, depth - 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_make_plain(item, budget, depth - 1) for item in value]
    if value is None or isinstance(value, (bool, int, float, str, Fraction)):
        return encode_value(value)
    if isinstance(value, Opaque) and value.name.startswith("omegaconf.") and isinstance(value.state, dict):
        for key in ("_content", "_val"):  # of a list or dict, and of a node
            if key in value.state:
                return _make_plain(value.state[key], budget, depth - 1)
    raise ValueError(f"the arguments of the model hold {describe_value(value)}, not plain values")
