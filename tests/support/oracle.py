"""PyTorch and the original demucs, which run in a process of their own; PyTorch's operations and files without PyTorch.

MLX_XFORMER_TORCH_PYTHON names the Python of their environment (tests/oracle/requirements.txt).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import selectors
import struct
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_xformer.backend import activations
from mlx_xformer.converters.attention import load_attention
from mlx_xformer.nn import layers
from mlx_xformer.nn.attention import attention, attention_weights
from mlx_xformer.nn.attention.torch_layout import MultiheadAttention
from mlx_xformer.nn.masks import causal_mask

VARIABLE = "MLX_XFORMER_TORCH_PYTHON"
SERVER = Path(__file__).resolve().parents[1] / "oracle" / "serve.py"
Arrays = dict[str, np.ndarray]


class OracleError(RuntimeError):
    """The oracle is missing, failed, or took too long."""


@dataclass(frozen=True)
class Answer:
    """What came back: arrays in groups (state, tap, out, gradient) and the others under group ""."""

    values: dict[str, Any]
    groups: dict[str, Arrays] = field(default_factory=dict)

    @property
    def state(self) -> Arrays:
        """The weights under demucs' own names, float32."""
        return self.groups.get("state", {})

    @property
    def taps(self) -> Arrays:
        """Activations under the module's name, PyTorch layout."""
        return self.groups.get("tap", {})

    @property
    def outputs(self) -> list[np.ndarray]:
        """The outputs of a module or function, in order."""
        return list(self.groups.get("out", {}).values())

    @property
    def gradients(self) -> Arrays:
        """Gradients by input and parameter name."""
        return self.groups.get("gradient", {})

    def __getitem__(self, name: str) -> np.ndarray:
        return self.groups[""][name]


def encode(value: Any) -> Any:
    """A JSON value; fractions as demucs writes them."""
    if isinstance(value, Fraction):
        return {"_type": "fraction", "numerator": value.numerator, "denominator": value.denominator}
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    return [encode(item) for item in value] if isinstance(value, list | tuple | range) else value


class Oracle:
    """A child process with PyTorch 2.13.0 and demucs 4.1.0; a context manager."""

    def __init__(self, python: str | None = None, threads: int = 2, timeout: float = 600.0):
        """timeout: seconds that one answer may take."""
        python = python or os.environ.get(VARIABLE)
        if not python:
            raise OracleError(f"{VARIABLE} must name the Python of the PyTorch environment, got nothing")
        if not Path(python).is_file():
            raise OracleError(f"{VARIABLE} must name a Python, got {python}")
        self.timeout = timeout
        self._folder = tempfile.TemporaryDirectory(prefix="oracle-")
        self._errors = Path(self._folder.name) / "stderr"
        self._kept: dict[str, tuple[dict[str, Any], Path]] = {}
        self._count = 0
        with self._errors.open("wb") as errors:
            self._child = subprocess.Popen(
                [python, "-s", str(SERVER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=_environment(threads),
                cwd=self._folder.name,
            )

    def __enter__(self) -> Oracle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the child and removes its folder."""
        child = self._child
        if child.stdin and not child.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
        try:
            child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        if child.stdout:
            child.stdout.close()
        self._folder.cleanup()

    def call(
        self,
        op: str,
        arrays: Mapping[str, np.ndarray] | None = None,
        *,
        timeout: float | None = None,
        keep: bool = False,
        **params: Any,
    ) -> Answer:
        """One request. keep: the same request again is answered from the temporary folder."""
        request: dict[str, Any] = {"op": op, "params": encode(params), "arrays": None}
        key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        if keep and not arrays and key in self._kept:
            return _answer(*self._kept[key])
        self._count += 1
        path = Path(self._folder.name) / f"{self._count}.npz"
        if arrays:
            given = Path(self._folder.name) / "given.npz"
            np.savez(given, **{name: np.asarray(value) for name, value in arrays.items()})
            request["arrays"] = str(given)
        reply = self._exchange(json.dumps({**request, "answer": str(path)}), timeout or self.timeout)
        if not reply["ok"]:
            raise OracleError(f"the oracle failed at {op}:\n{reply['error']}")
        answer = _answer(reply["values"], path)
        if keep and not arrays:
            self._kept[key] = (reply["values"], path)
        else:
            path.unlink()
        return answer

    def _exchange(self, line: str, timeout: float) -> dict[str, Any]:
        child = self._child
        assert child.stdin and child.stdout
        try:
            child.stdin.write(line.encode() + b"\n")
            child.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise OracleError(f"the oracle has ended:\n{self._tail()}") from None
        limit, received = time.monotonic() + timeout, b""
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            while not received.endswith(b"\n"):
                if not selector.select(max(0.0, limit - time.monotonic())):
                    child.kill()
                    raise OracleError(f"the oracle took more than {timeout} s:\n{self._tail()}")
                part = os.read(child.stdout.fileno(), 1 << 16)
                if not part:
                    raise OracleError(f"the oracle has ended (exit {child.wait()}):\n{self._tail()}")
                received += part
        return json.loads(received)

    def _tail(self) -> str:
        return self._errors.read_text(errors="replace")[-4000:]

    def htdemucs(
        self,
        kwargs: Mapping[str, Any],
        seed: int = 0,
        *,
        mix: np.ndarray | None = None,
        signal_seed: int = 0,
        length: int | None = None,
        dtype: str = "float32",
        taps: bool = False,
        batch: int = 1,
        half: bool = False,
        state: bool = True,
    ) -> Answer:
        """HTDemucs(**kwargs) with random weights: state, ["mix"] (B, C, N), ["output"] (B, S, C, N), taps.

        length None: one segment. half: weights rounded to float16. float64: the same weights in double.
        """
        arrays = None if mix is None else {"mix": mix}
        return self.call(
            "htdemucs",
            arrays,
            keep=True,
            kwargs=kwargs,
            seed=seed,
            signal_seed=signal_seed,
            length=length,
            dtype=dtype,
            taps=taps,
            batch=batch,
            half=half,
            state=state,
        )

    def apply(
        self,
        models: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        seeds: int | Sequence[int],
        mix: np.ndarray,
        *,
        weights: Sequence[Sequence[float]] | None = None,
        bag_segment: Any = None,
        random_seed: int = 0,
        half: bool = False,
        state: bool = True,
        normalise: bool = True,
        **options: Any,
    ) -> Answer:
        """apply_model on mix (C, N) with demucs.api's normalisation: ["output"] (S, C, N), state.

        A list of models is a bag (state under models.N.). options: apply_model's own (shifts, overlap, ...).
        ["next_draw"]: random.random() afterwards, which tells how far the generator went.
        """
        bag = not isinstance(models, Mapping)
        return self.call(
            "apply",
            {"mix": mix},
            models=list(models) if bag else [models],
            seeds=list(seeds) if isinstance(seeds, Sequence) else [seeds],
            weights=weights,
            bag=bag,
            bag_segment=bag_segment,
            random_seed=random_seed,
            half=half,
            state=state,
            normalise=normalise,
            options=options,
        )

    def module(
        self,
        name: str,
        kwargs: Mapping[str, Any],
        inputs: Mapping[str, np.ndarray],
        seed: int = 0,
        *,
        cotangents: Sequence[np.ndarray] = (),
        state: Mapping[str, np.ndarray] | None = None,
        dtype: str = "float32",
        half: bool = False,
        **options: Any,
    ) -> Answer:
        """A module of tests/oracle/weights.py: outputs, state and, with cotangents, gradients."""
        arrays = {**_group("input", inputs), **_group("state", state or {}), **_cotangents(cotangents)}
        return self.call("module", arrays, name=name, kwargs=kwargs, seed=seed, dtype=dtype, half=half, options=options)

    def function(
        self,
        name: str,
        inputs: Mapping[str, np.ndarray] | None = None,
        *,
        cotangents: Sequence[np.ndarray] = (),
        dtype: str = "float32",
        **options: Any,
    ) -> Answer:
        """A function of tests/oracle/operations.py: outputs and, with cotangents, gradients."""
        arrays = {**_group("input", inputs or {}), **_cotangents(cotangents)}
        return self.call("function", arrays, name=name, dtype=dtype, options=options)

    def load(self, path: str | Path) -> Answer:
        """The original's own reading of a .safetensors or .th file: values klass, args, kwargs; state."""
        answer = self.call("load", path=str(Path(path).resolve()))
        return Answer(answer.values, {"state": answer.groups.get("", {})})

    def package(
        self,
        kwargs: Mapping[str, Any],
        folder: str | Path,
        seed: int = 0,
        signature: str = "0a1b2c3d",
        half: bool = True,
    ) -> dict[str, Any]:
        """Writes a random model as the released ones are; returns {th, safetensors, sha256: {name: ...}}."""
        folder = str(Path(folder).resolve())
        answer = self.call("package", kwargs=kwargs, folder=folder, seed=seed, signature=signature, half=half)
        return answer.values


def _environment(threads: int) -> dict[str, str]:
    """The environment of the child: no preloaded BLAS, no foreign packages, two threads, no network."""
    dropped = ("LD_PRELOAD", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    count = str(threads)
    return {**kept, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "HF_HUB_OFFLINE": "1"}


def _group(group: str, arrays: Mapping[str, np.ndarray]) -> Arrays:
    return {f"{group}/{name}": np.asarray(value) for name, value in arrays.items()}


def _cotangents(cotangents: Sequence[np.ndarray]) -> Arrays:
    return {f"cotangent/{index}": np.asarray(value) for index, value in enumerate(cotangents)}


def _answer(values: dict[str, Any], path: Path) -> Answer:
    groups: dict[str, Arrays] = {}
    with np.load(path) as stored:
        for name in stored.files:
            group, slash, rest = name.partition("/")
            groups.setdefault(group if slash else "", {})[rest if slash else name] = stored[name]
    return Answer(values, groups)


def _last(x: mx.array, axis: int) -> mx.array:
    return mx.moveaxis(x, axis, -1) if x.ndim else x


def _heads(x: mx.array, batch: int) -> mx.array:
    """(N, L, E) as one head; (H, L, D) beside a batch as that of every item, if it is not one itself."""
    return x if x.ndim == 4 else x[:, None] if not batch else mx.broadcast_to(x, (batch, *x.shape))


def sdpa(query, key, value, *, attn_mask=None, is_causal=False, dropout_p=0.0, dropout_key=None):
    wide = next((x.shape[0] for x in (query, key, value) if x.ndim == 4), 0)
    q, k, v = (_heads(x, wide) for x in (query, key, value))
    mask = causal_mask(q.shape[2], k.shape[2], alignment="upper_left") if is_causal else None
    out = attention(q, k, v, mask=mask, bias=attn_mask, dropout=dropout_p if dropout_key is not None else 0.0,
                    key=dropout_key)  # fmt: skip
    return out if wide else out[:, 0]


def softmax(x, dim):
    """The weights of queries that are 0, whose scores are the bias."""
    rows = _last(x, dim)
    bias = mx.reshape(rows, (1, 1, math.prod(rows.shape[:-1]), rows.shape[-1] if rows.ndim else 1))
    nothing = mx.zeros((1, 1, bias.shape[2], 1)), mx.zeros((1, 1, bias.shape[3], 1))
    weights = attention_weights(*nothing, bias=bias).reshape(rows.shape)
    return mx.moveaxis(weights, -1, dim) if rows.ndim else weights


def gelu(x, *, approximate="none"):
    return activations.gelu_tanh(x) if approximate == "tanh" else activations.gelu(x)


def glu(x, dim=-1):
    return mx.moveaxis(activations.glu(_last(x, dim)), -1, dim)


def _with_affine(module, eps, weight, bias):
    module.eps = eps  # PyTorch's samples have some below 0, which the constructors refuse
    if weight is not None:
        module.weight = weight.flatten()
    if bias is not None:
        module.bias = bias.flatten()
    return module


def layer_norm(x, normalized_shape, weight=None, bias=None, *, eps=1e-5):
    width = math.prod(normalized_shape)
    rows = x.reshape(*x.shape[: x.ndim - len(normalized_shape)], width)
    return _with_affine(layers.LayerNorm(width), eps, weight, bias)(rows).reshape(x.shape)


def group_norm(x, num_groups, *, weight=None, bias=None, eps=1e-5):
    module = _with_affine(layers.GroupNorm(num_groups, x.shape[1]), eps, weight, bias)
    return mx.moveaxis(module(mx.moveaxis(x, 1, -1)), -1, 1)


def _number(x):
    return x[0] if isinstance(x, list) else x


def _by_groups(convolve, x, weight, bias, groups, outputs):
    """convolve(x (B, T, C), weight, bias) for each group of channels; x is (B, C, T) or (C, T), as in PyTorch."""
    batch = x[None] if x.ndim == 2 else x
    parts = zip(mx.split(batch.swapaxes(1, 2), groups, axis=-1), mx.split(weight, groups, axis=0), strict=True)
    biases = mx.split(mx.zeros((outputs,)) if bias is None else bias, groups)
    out = mx.concatenate([convolve(*part, b) for part, b in zip(parts, biases, strict=True)], axis=-1).swapaxes(1, 2)
    return out[0] if x.ndim == 2 else out


def conv1d(x, weight, bias=None, *, stride=1, padding=0, dilation=1, groups=1):
    """DilatedConv1d keeps the length: its kernel gets an odd number of taps, its input the padding."""
    stride, dilation, K = _number(stride), _number(dilation), weight.shape[2]
    total = dilation * (K - 1) if padding == "same" else 0
    left, right = (total // 2, total - total // 2) if isinstance(padding, str) else [_number(padding)] * 2

    def convolve(x, weight, bias):
        module = layers.DilatedConv1d(x.shape[2], weight.shape[0], K + 1 - K % 2, dilation)
        module.weight = mx.pad(weight.swapaxes(1, 2), [(0, 0), (0, 1 - K % 2), (0, 0)])
        module.bias = bias
        out = module(mx.pad(x, [(0, 0), (left, right), (0, 0)]))
        first = module.weight.shape[1] // 2 * dilation
        length = x.shape[1] + left + right - dilation * (K - 1)
        return out[:, first : first + length : stride]

    return _by_groups(convolve, x, weight, bias, groups, weight.shape[0])


def conv_transpose1d(x, weight, bias=None, *, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    """ConvTranspose1d neither dilates nor cuts: zeros between the taps, then what padding takes and adds."""
    stride, padding, extra, dilation = (_number(n) for n in (stride, padding, output_padding, dilation))

    def convolve(x, weight, bias):
        C, O, K = weight.shape
        taps = mx.pad(weight[..., None], [(0, 0)] * 3 + [(0, dilation - 1)]).reshape(C, O, -1)
        taps = taps[..., : dilation * (K - 1) + 1]
        module = layers.ConvTranspose1d(C, O, taps.shape[2], stride)
        module.weight, module.bias = taps.transpose(1, 2, 0), bias
        out = module(x)
        length = (x.shape[1] - 1) * stride - 2 * padding + taps.shape[2] + extra
        missing = max(0, padding + length - out.shape[1])
        out = mx.concatenate([out, mx.broadcast_to(bias, (len(out), missing, O))], axis=1)
        return out[:, padding : padding + length]

    return _by_groups(convolve, x, weight, bias, groups, weight.shape[1] * groups)


def multi_head_attention_forward(
    query, key, value, embed_dim, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v, add_zero_attn, dropout_p,
    out_proj_weight, out_proj_bias, *, training=True, key_padding_mask=None, need_weights=True, attn_mask=None,
    use_separate_proj_weight=False, q_proj_weight=None, k_proj_weight=None, v_proj_weight=None, static_k=None,
    static_v=None, average_attn_weights=True, is_causal=False, dropout_key=None,
):  # fmt: skip
    tensors = {"in_proj_weight": in_proj_weight, "in_proj_bias": in_proj_bias}
    widths = {}
    if use_separate_proj_weight:
        tensors = {"in_proj_bias": in_proj_bias, "q_proj_weight": q_proj_weight}
        tensors |= {"k_proj_weight": k_proj_weight, "v_proj_weight": v_proj_weight}
        widths = {"kdim": k_proj_weight.shape[1], "vdim": v_proj_weight.shape[1]}
    tensors |= {"out_proj.weight": out_proj_weight, "out_proj.bias": out_proj_bias}
    if bias_k is not None:
        tensors |= {"bias_k": bias_k.reshape(1, 1, -1), "bias_v": bias_v.reshape(1, 1, -1)}
    module = MultiheadAttention(
        embed_dim, num_heads, dropout=dropout_p, bias=in_proj_bias is not None, add_bias_kv=bias_k is not None,
        add_zero_attn=add_zero_attn, **widths,
    )  # fmt: skip
    load_attention(
        module,
        {name: value for name, value in tensors.items() if value is not None},
        "pytorch-split" if use_separate_proj_weight else "pytorch",
    )
    module.train(training and dropout_key is not None)
    out, weights = module(
        query, key, value, key_padding_mask=key_padding_mask, need_weights=need_weights, attn_mask=attn_mask,
        average_attn_weights=average_attn_weights, is_causal=is_causal, static_k=static_k, static_v=static_v,
        dropout_key=dropout_key,
    )  # fmt: skip
    return out if weights is None else (out, weights)


_STORAGES = {"f2": "HalfStorage", "f4": "FloatStorage", "f8": "DoubleStorage", "i8": "LongStorage", "b1": "BoolStorage"}
MARK = b"("


class Opcodes(bytes):
    """Pickle opcodes that leave one value on the stack."""


def pickle_global(module: str, name: str) -> Opcodes:
    return Opcodes(b"c" + module.encode() + b"\n" + name.encode() + b"\n")


def pickle_call(function: Opcodes, *args) -> Opcodes:
    return Opcodes(function + opcodes(args) + b"R")


def opcodes(value) -> Opcodes:
    """The opcodes of a plain value; Opcodes pass through."""
    if isinstance(value, Opcodes):
        return value
    if value is None or isinstance(value, bool):
        return Opcodes({None: b"N", True: b"\x88", False: b"\x89"}[value])
    if isinstance(value, int):
        return Opcodes(b"J" + struct.pack("<i", value) if -(2**31) <= value < 2**31 else _long(value))
    if isinstance(value, float):
        return Opcodes(b"G" + struct.pack(">d", value))
    if isinstance(value, str):
        return Opcodes(b"X" + struct.pack("<I", len(value.encode())) + value.encode())
    if isinstance(value, Fraction):
        return pickle_call(pickle_global("fractions", "Fraction"), str(value))
    if isinstance(value, tuple):
        return Opcodes(MARK + b"".join(map(opcodes, value)) + b"t")
    if isinstance(value, list):
        return Opcodes(b"]" + MARK + b"".join(map(opcodes, value)) + b"e")
    if isinstance(value, dict):
        return Opcodes(b"}" + MARK + b"".join(opcodes(k) + opcodes(v) for k, v in value.items()) + b"u")
    raise TypeError(type(value))


def _long(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def pickle_program(value) -> bytes:
    return b"\x80\x02" + opcodes(value) + b"."


def pickle_storage(key: str, numel: int, kind: str = "HalfStorage") -> Opcodes:
    return Opcodes(opcodes(("storage", pickle_global("torch", kind), key, "cpu", numel)) + b"Q")


def pickle_tensor(stored: Opcodes, shape, strides, offset=0) -> Opcodes:
    ordered = pickle_call(pickle_global("collections", "OrderedDict"))
    rebuild = pickle_global("torch._utils", "_rebuild_tensor_v2")
    return pickle_call(rebuild, stored, offset, tuple(shape), tuple(strides), False, ordered)


def write_torch_zip(
    path: Path, pickle: bytes, storages: dict[str, bytes], *, compression=zipfile.ZIP_STORED, **extra
) -> Path:
    """An archive as torch.save lays it out. `extra` adds or, with None, leaves out entries (byteorder, ...)."""
    entries = {"data.pkl": pickle, "byteorder": b"little", "version": b"3\n"}
    entries |= {f"data/{key}": data for key, data in storages.items()} | extra
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            if data is not None:
                archive.writestr(f"archive/{name}", data)
    return path


def pickle_state(arrays: dict[str, np.ndarray]) -> tuple[dict[str, Opcodes], dict[str, bytes]]:
    """The tensors of a state dict by name, and the storages that they fill."""
    state, storages = {}, {}
    for key, (name, array) in enumerate(arrays.items()):
        strides = [s // array.itemsize for s in np.ascontiguousarray(array).reshape(array.shape).strides]
        stored = pickle_storage(str(key), array.size, _STORAGES[array.dtype.str[1:]])
        state[name] = pickle_tensor(stored, array.shape, strides)
        storages[str(key)] = array.tobytes()
    return state, storages


def save_torch(path: Path, arrays: dict[str, np.ndarray], package: dict | None = None) -> Path:
    """What torch.save writes for a dict of tensors or, given klass, args and kwargs, for a demucs package."""
    state, storages = pickle_state(arrays)
    return write_torch_zip(path, pickle_program(state if package is None else {**package, "state": state}), storages)


def save_torch_legacy(
    path: Path, arrays: dict[str, np.ndarray], value=None, *, version: int = 1001, cut: int = 0
) -> Path:
    """What torch.save wrote before version 1.6, and writes with _use_new_zipfile_serialization=False.

    value: makes of the tensors what the file holds.
    """
    state, storages = pickle_state(arrays)
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = (0x1950A86A20F9469CFC6C, version, system, state if value is None else value(state), list(storages))
    content = b"".join(map(pickle_program, parts))
    for array, data in zip(arrays.values(), storages.values(), strict=True):
        content += struct.pack("<q", array.size) + data
    path.write_bytes(content[: len(content) - cut])
    return path
