"""Reads other people's files: .safetensors, PyTorch's .th, .pt and .bin (without PyTorch), CTranslate2's .bin, .npz,
and bags.

Tensors come bit for bit in their stored dtype; nothing is ever unpickled. Every problem with a file is one ValueError
that begins with its path.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import mlx.core as mx
import numpy as np
import yaml
from safetensors import SafetensorError, safe_open

from ...storage.files import DTYPES
from .ctranslate2 import is_ctranslate2, read_ctranslate2
from .torch_file import RawTensor, read_torch
from .torch_pickle import short

_NUMPY = {
    "f8": "F64",
    "f4": "F32",
    "f2": "F16",
    "i8": "I64",
    "i4": "I32",
    "i2": "I16",
    "i1": "I8",
    "u1": "U8",
    "b1": "BOOL",
}
_MAX_NPZ = 32 << 30
_MAX_YAML = 1 << 16
_MAX_BRACKETS = 1000
_LARGE = 1000.0
TORCH_SUFFIXES = (".th", ".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES, ".npz")


@dataclass(frozen=True)
class Source:
    """The tensors of a file by their own names, its metadata and its SHA-256."""

    path: Path
    tensors: dict[str, mx.array]
    metadata: dict[str, str]
    sha256: str

    def listing(self) -> list[tuple[str, tuple[int, ...], str, int]]:
        """(name, shape, dtype, bytes) of every tensor, by name."""
        return [(name, x.shape, dtype_name(x.dtype), x.nbytes) for name, x in sorted(self.tensors.items())]


@dataclass(frozen=True)
class Stored:
    """A tensor of a file that is read when it is asked for."""

    dtype: mx.Dtype
    shape: tuple[int, ...]
    read: Callable[[], mx.array]

    def blank(self) -> mx.array:
        """An array of its shape and dtype, lazy and never to be computed."""
        return mx.zeros(self.shape, self.dtype)


def dtype_name(dtype: mx.Dtype) -> str:
    """The dtype in the words of safetensors."""
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype).removeprefix("mlx.core."))


def read_source(path: str | Path) -> Source:
    """Reads one file by its suffix. FileNotFoundError or ValueError, in one line, for a file that cannot be had."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: a model file must end in {', '.join(SUFFIXES)}, got {path.suffix or 'no suffix'}")
    try:
        with path.open("rb") as file:
            sha256 = sha256_of(path)
            size = file.seek(0, 2)
            file.seek(0)
            if path.suffix == ".safetensors":
                stored, metadata = open_safetensors(path)
                tensors = {name: tensor.read() for name, tensor in stored.items()}
            else:
                if path.suffix == ".npz":
                    raw, metadata = _read_npz(file)
                else:
                    raw, metadata = (read_ctranslate2 if is_ctranslate2(file) else read_torch)(file, size)
                tensors = {name: _array(tensor) for name, tensor in raw.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    mx.eval(tensors)
    return Source(path, tensors, metadata, sha256)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _array(tensor: RawTensor) -> mx.array:
    """The bits under their dtype. The detour over integers keeps every bit of every value, NaNs included."""
    flat = mx.array(tensor.bits.reshape(-1))
    return mx.view(flat, DTYPES[tensor.dtype], stream=mx.cpu).reshape(tensor.bits.shape, stream=mx.cpu)


def _bits(data: bytes, dtype: str, shape: tuple[int, ...]) -> RawTensor:
    bits = np.frombuffer(data, f"u{DTYPES[dtype].size}").reshape(shape)
    if dtype == "BOOL" and bits.max(initial=0) > 1:
        raise ValueError(f"booleans must be 0 or 1, got {bits.max()}")
    return RawTensor(dtype, bits)


def open_safetensors(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a file, not yet read, and its metadata. The library checks the header: its size, its JSON, and
    that the tensors tile the file without gap or overlap. ValueError if they do not."""
    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise ValueError(f"not a whole safetensors file ({short(error)})") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", None) or {}  # null where MLX was given none
    tensors = {}
    for name, entry in header.items():
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if kind not in DTYPES:
            raise ValueError(f"{short(name)} must have one of the dtypes {', '.join(DTYPES)}, got {kind}")

        def read(kind: str = kind, shape: tuple[int, ...] = shape, at: int = 8 + length + begin, to: int = end - begin):
            with path.open("rb") as file:
                file.seek(at)
                return _array(_bits(file.read(to), kind, shape))

        tensors[name] = Stored(DTYPES[kind], shape, read)
    return tensors, metadata


def _read_npz(file: BinaryIO) -> tuple[dict[str, RawTensor], dict[str, str]]:
    try:
        with zipfile.ZipFile(file) as archive:
            total = sum(info.file_size for info in archive.infolist())
        if total > _MAX_NPZ:
            raise ValueError(f"the arrays must take at most {_MAX_NPZ} bytes, got {total}")
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            return {name: _from_numpy(name, arrays[name]) for name in arrays.files}, {}
    except (zipfile.BadZipFile, EOFError, OSError, MemoryError, SyntaxError, RuntimeError, TypeError) as error:
        raise ValueError(f"not a whole .npz file ({short(error)})") from None


def _from_numpy(name: str, array: np.ndarray) -> RawTensor:
    dtype = _NUMPY.get(array.dtype.str[1:])
    if dtype is None or array.dtype.byteorder == ">":
        raise ValueError(f"{short(name)} must have one of the dtypes {', '.join(DTYPES)}, got {array.dtype.str}")
    return _bits(array.tobytes(), dtype, array.shape)


def scan(tensors: dict[str, mx.array]) -> list[str]:
    """A line for every tensor that holds values which are not finite, or above 1000 in magnitude."""
    cpu = mx.cpu  # the one device that has float64
    found = {}
    for name, x in sorted(tensors.items()):
        if mx.issubdtype(x.dtype, mx.floating) and x.size:
            # without an array of magnitudes beside x
            largest = mx.maximum(mx.max(x, stream=cpu), mx.negative(mx.min(x, stream=cpu), stream=cpu), stream=cpu)
            found[name] = mx.sum(mx.logical_not(mx.isfinite(x, stream=cpu), stream=cpu), stream=cpu), largest
    mx.eval(found)
    lines = []
    for name, (count, largest) in found.items():
        if count.item():
            lines.append(f"{name}: {count.item()} of {tensors[name].size} values are not finite")
        elif (magnitude := cast(float, largest.item())) > _LARGE:
            lines.append(f"{name}: values up to {magnitude:.4g} in magnitude")
    return lines


@dataclass(frozen=True)
class BagFile:
    """A bag of models as demucs writes it: the members' signatures, and what combines them."""

    name: str
    signatures: tuple[str, ...]
    weights: Any
    segment: Any


def read_bag(path: str | Path) -> BagFile:
    """Reads `<name>.yaml`: a mapping of models, weights and segment. Signatures are plain names, never paths."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    if path.stat().st_size > _MAX_YAML:
        raise ValueError(f"{path}: a bag must be at most {_MAX_YAML} bytes, got {path.stat().st_size}")
    try:
        text = path.read_text("utf-8")
        if text.count("[") + text.count("{") > _MAX_BRACKETS:
            raise ValueError("too many brackets")  # the time that nested ones take grows with their square
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError("aliases are refused")  # a few lines of them can stand for a value without end
        bag = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not plain YAML ({short(error)})") from None
    if not isinstance(bag, dict) or not all(isinstance(key, str) for key in bag):
        raise ValueError(f"{path}: a bag must be a mapping, got a {type(bag).__name__}")
    if unknown := sorted(set(bag) - {"models", "weights", "segment"}):
        raise ValueError(f"{path}: a bag has models, weights and segment, got {short(', '.join(unknown))}")
    models = bag.get("models")
    if not isinstance(models, list) or not models:
        raise ValueError(f"{path}: models must be a list of one or more signatures")
    try:
        signatures = tuple(plain_name(signature) for signature in models)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return BagFile(path.stem, signatures, bag.get("weights"), bag.get("segment"))


def plain_name(name: Any) -> str:
    """`name` if it can only be a file's own name; ValueError for anything that could lead elsewhere."""
    if not isinstance(name, str):
        raise ValueError(f"a signature must be text (in quotes, if it is all digits), got a {type(name).__name__}")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", name):
        raise ValueError(f"a signature must be a plain name of letters, digits, _ - and ., got {short(ascii(name))}")
    return name


def member(folder: Path, signature: str) -> Path:
    """The one file of a bag's member: `<signature>.safetensors`, or `<signature>[-<checksum>].th`. It lies in the
    folder itself: a symbolic link that leads out of it is refused."""
    plain_name(signature)
    found = [folder / f"{signature}.safetensors"]
    if not found[0].exists():
        pattern = re.compile(re.escape(signature) + r"(-[0-9a-f]+)?\.th")
        found = sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))
    if not found:
        raise FileNotFoundError(f"{folder}: no {signature}.safetensors or {signature}-*.th for the bag's member")
    if len(found) > 1:
        raise ValueError(f"{folder}: one file must be member {signature}, got {', '.join(p.name for p in found)}")
    if found[0].resolve().parent != folder.resolve():
        raise ValueError(f"{found[0]}: a bag's member must lie in the folder itself, this link leads out of it")
    return found[0]
