"""Precision: what a conversion makes of the numbers of a language model, floats of a dtype or packed matrices.

A packed (quantised) matrix is stored as `weight`, `scales` and `biases` of one layer, see mlx.core.quantize.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..models.causal_lm.model import DTYPES, Quantization
from ..storage.messages import describe_misfits
from .stored import StoredTensor, make_blanks

Packing = tuple[int, int] | None  # bits and group size of a packed matrix; None: floats


@dataclass(frozen=True)
class Precision:
    """What becomes of the numbers of a language model.

    Attributes:
        quantize: 4 or 8 packs matrices in as many bits; 0 makes floats of packed ones; None leaves them as they are.
        group_size: How many numbers of a row share a scale: 32, 64 or 128.
        dtype: Of the floats; None leaves them as they are.
    """

    quantize: int | None = None
    group_size: int = 64
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.quantize not in (None, 0, 4, 8):
            raise ValueError(f"quantize must be 4, 8, or 0 for floats, got {self.quantize}")
        if self.group_size not in (32, 64, 128):
            raise ValueError(f"group_size must be 32, 64 or 128, got {self.group_size}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    def choose_config(self, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> Any:
        """The configuration of the checkpoint to write. Matrices whose rows groups do not divide stay floats.

        Args:
            config: That of the source.
            shapes: Of the model's parameters if all were floats.
        """
        if self.dtype is not None:
            config = dataclasses.replace(config, dtype=None)
        if self.quantize is None:
            return config
        if self.quantize == 0:
            return dataclasses.replace(config, quantization=None)
        kept = sorted(n for n, shape in shapes.items() if len(shape) > 1 and shape[-1] % self.group_size)
        layers: dict[str, Packing] = {name.removesuffix(".weight"): None for name in kept}
        return dataclasses.replace(config, quantization=Quantization(self.quantize, self.group_size, layers))


@dataclass(frozen=True)
class Repacking:
    """Packs the matrices of layers in another way and casts their floats.

    Attributes:
        before: How they are packed.
        after: How they shall be packed.
        dtype: Of the floats; None leaves them as they are.
    """

    before: Quantization | None
    after: Quantization | None
    dtype: str | None = None

    def __call__(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The arrays of whole layers, layer by layer. Nothing is computed here."""
        layers: dict[str, dict[str, mx.array]] = {}
        for name, x in arrays.items():
            layer, _, leaf = name.rpartition(".")
            layers.setdefault(layer, {})[leaf] = x
        repacked: dict[str, mx.array] = {}
        for layer, leaves in layers.items():
            if "weight" not in leaves:
                raise ValueError(describe_misfits([("missing", f"{layer}.weight")]))
            repacked |= {f"{layer}.{leaf}": x for leaf, x in self._repack(layer, leaves).items()}
        return repacked

    def _repack(self, layer: str, leaves: dict[str, mx.array]) -> dict[str, mx.array]:
        before, after = (_packing(quantization, layer, leaves) for quantization in (self.before, self.after))
        if before is not None and before != after:
            scales, biases = (leaves.pop(leaf).astype(mx.float32) for leaf in ("scales", "biases"))
            leaves["weight"] = mx.dequantize(leaves["weight"], scales, biases, bits=before[0], group_size=before[1])
        if self.dtype is not None:
            dtype = getattr(mx, self.dtype)
            leaves = {leaf: x.astype(dtype) if mx.issubdtype(x.dtype, mx.floating) else x for leaf, x in leaves.items()}
        if after is not None and before != after:
            packed = mx.quantize(leaves["weight"], bits=after[0], group_size=after[1])
            leaves |= dict(zip(("weight", "scales", "biases"), packed, strict=True))
        return leaves


def _packing(quantization: Quantization | None, layer: str, leaves: Mapping[str, mx.array]) -> Packing:
    """How a layer is packed."""
    return quantization.of(layer) if quantization is not None and leaves["weight"].ndim > 1 else None


def unpack_tensors(tensors: Mapping[str, StoredTensor], quantization: Quantization | None) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint with floats in the place of packed matrices, each unpacked when it is read."""
    unpack = Repacking(quantization, None)
    unpacked = unpack(make_blanks(tensors))

    def read(name: str) -> mx.array:
        layer = name.rpartition(".")[0]
        leaves = {f"{layer}.{leaf}" for leaf in ("weight", "scales", "biases")}
        if name not in leaves or leaves - tensors.keys():
            return tensors[name].read()
        return unpack({leaf: tensors[leaf].read() for leaf in sorted(leaves)})[name]

    return {name: StoredTensor(x.dtype, x.shape, functools.partial(read, name)) for name, x in unpacked.items()}


def round_doubles(tensors: Mapping[str, StoredTensor]) -> tuple[dict[str, StoredTensor], list[str]]:
    """The tensors with those of float64, which MLX cannot store, rounded to float32 when they are read.

    The second value is a line for the report, if there are any.
    """
    doubles = {name for name, x in tensors.items() if x.dtype == mx.float64}

    def read(x: StoredTensor) -> mx.array:
        return x.read().astype(mx.float32, stream=mx.cpu)  # the one device that has float64

    rounded = {
        name: StoredTensor(mx.float32, x.shape, functools.partial(read, x)) if name in doubles else x
        for name, x in tensors.items()
    }
    lines = [f"{len(doubles)} tensors of float64 are rounded to float32, which MLX can store"] if doubles else []
    return rounded, lines
