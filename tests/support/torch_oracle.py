"""Asks PyTorch and the original demucs, which run in a process of their own.

MLX_XFORMER_TORCH_PYTHON names the Python of their environment (tests/oracle/requirements.txt).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import selectors
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

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
