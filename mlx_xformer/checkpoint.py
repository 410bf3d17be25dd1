"""Checkpoints: a folder with config.json and model.safetensors and, of a language model, the files of its tokenizer.

config.json holds `format`, `family`, `config` (the model's) and `provenance`. Weights keep their stored dtype on disk.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from safetensors import SafetensorError, safe_open

from .models.attention_layer import AttentionLayer, AttentionLayerConfig
from .models.bert import Bert, BertConfig
from .models.decoder import Decoder, DecoderConfig
from .models.htdemucs import Bag, BagConfig, HTDemucs, HTDemucsConfig
from .models.seq2seq import SequenceCheckpoint
from .models.seq2seq import make as make_seq2seq
from .models.stack import EncoderDecoder, EncoderDecoderConfig, StackConfig, TransformerStack
from .models.t5 import T5, T5Config
from .models.transformer import Transformer, TransformerConfig
from .models.whisper import Whisper, WhisperConfig

FORMAT = 1
FAMILIES: dict[str, tuple[Any, Any]] = {  # name -> (configuration, module)
    "htdemucs": (HTDemucsConfig, HTDemucs),
    "htdemucs_bag": (BagConfig, Bag),
    "decoder": (DecoderConfig, Decoder),
    "bert": (BertConfig, Bert),
    "t5": (T5Config, T5),
    "whisper": (WhisperConfig, Whisper),
    "attention_layer": (AttentionLayerConfig, AttentionLayer),
    "transformer_stack": (StackConfig, TransformerStack),
    "stack_encoder_decoder": (EncoderDecoderConfig, EncoderDecoder),
    "seq2seq": (SequenceCheckpoint, make_seq2seq),
    "transformer": (TransformerConfig, Transformer),
}
SENTENCES = ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json")  # of sentence-transformers
EXTRAS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("generation_config.json", "chat_template.jinja"),
    *SENTENCES,
)
DTYPES = {  # in the words of safetensors
    "F64": mx.float64,
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "I64": mx.int64,
    "I32": mx.int32,
    "I16": mx.int16,
    "I8": mx.int8,
    "U32": mx.uint32,
    "U8": mx.uint8,
    "BOOL": mx.bool_,
}
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_FILES = {_CONFIG, _WEIGHTS, *(name.partition("/")[0] for name in EXTRAS)}
_LISTED = 20


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds. `weights` are lazy: a tensor is read when it is first computed with."""

    family: str
    config: dict[str, Any]
    weights: dict[str, mx.array]
    provenance: dict[str, Any]


def misfit(problems: Sequence[tuple[str, str]]) -> str:
    """The message for (kind, line) pairs: how many there are of each kind, then the lines, twenty at most."""
    counts = Counter(kind for kind, _ in problems)
    lines = [f"  {kind}: {line}" for kind, line in sorted(problems)]
    if len(lines) > _LISTED:
        lines[_LISTED:] = [f"  ... and {len(lines) - _LISTED} more"]
    summary = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))
    return "\n".join([f"the tensors do not fit the model: {summary}", *lines])


def is_checkpoint(folder: str | Path) -> bool:
    """Whether `folder` holds a config.json of ours."""
    try:
        content = json.loads((Path(folder) / _CONFIG).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"format", "family"} <= content.keys()


@contextlib.contextmanager
def new_folder(folder: str | Path, *, replace: bool) -> Iterator[Path]:
    """A temporary folder beside `folder`, which takes its place when the block ends well and vanishes when not.

    `folder` must be new or empty or, with `replace`, an older checkpoint: FileExistsError otherwise.
    """
    target = Path(os.path.realpath(folder))
    _check_replaceable(target, replace)
    made = [parent for parent in target.parents if not parent.exists()]
    mark = f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}"
    fresh, old = target.parent / f"{mark}.new", target.parent / f"{mark}.old"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        yield fresh
        try:
            if target.exists():
                target.rename(old)
            fresh.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
    except BaseException as error:
        shutil.rmtree(fresh, ignore_errors=True)
        with contextlib.suppress(OSError):
            for parent in made:
                parent.rmdir()
        if isinstance(error, OSError):
            raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(folder)) from None
        raise
    shutil.rmtree(old, ignore_errors=True)


def _check_replaceable(target: Path, replace: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} must be a folder or new, got a file")
    names = {path.name for path in target.iterdir()}
    if not names or (replace and names <= _FILES and is_checkpoint(target)):
        return
    other = sorted(names - _FILES) or sorted(names)
    raise FileExistsError(f"{target} must be new or empty{' or a checkpoint' if replace else ''}, it holds {other[0]}")


def save_checkpoint(
    folder: str | Path,
    weights: Mapping[str, mx.array],
    *,
    family: str,
    config: Mapping[str, Any],
    provenance: Mapping[str, Any],
    arrays: Iterable[tuple[str, mx.array]] | None = None,
    extras: Mapping[str, bytes] | None = None,
) -> None:
    """Writes a checkpoint, whole or not at all. An older checkpoint is replaced; any other folder is refused. `arrays`:
    see write_safetensors. `extras`: files of EXTRAS by their names."""
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    wide = sorted(name for name, x in weights.items() if x.dtype == mx.float64)
    if wide:
        raise ValueError(f"weights must not be float64, which MLX cannot store, got {wide[0]}")
    if unknown := sorted((extras or {}).keys() - set(EXTRAS)):
        raise ValueError(f"extras must be among {', '.join(EXTRAS)}, got {unknown[0]}")
    content = {"format": FORMAT, "family": family, "config": dict(config), "provenance": dict(provenance)}
    text = json.dumps(content, indent=2) + "\n"
    with new_folder(folder, replace=True) as fresh:
        write_safetensors(fresh / _WEIGHTS, weights, {"format": "mlx"}, arrays)
        (fresh / _CONFIG).write_text(text, "utf-8")
        write_extras(fresh, extras or {})


def write_extras(folder: Path, extras: Mapping[str, bytes]) -> None:
    """Files of EXTRAS, some of which have a folder of their own."""
    for name, content in extras.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def write_safetensors(
    path: Path,
    tensors: Mapping[str, mx.array],
    metadata: Mapping[str, str],
    arrays: Iterable[tuple[str, mx.array]] | None = None,
) -> None:
    """Writes a file, a tensor after the other, and checks that it is whole. OSError if it is not.

    `arrays` brings the tensors one by one, in the order of `tensors`, whose shapes and dtypes are then all that counts:
    no more than one of them need be held.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, x in tensors.items():
        begin, end = end, end + x.nbytes
        header[name] = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, x in tensors.items() if arrays is None else arrays:
            like = tensors[name]
            if (x.shape, x.dtype) != (like.shape, like.dtype) or file.tell() != 8 + len(text) + header[name][
                "data_offsets"
            ][0]:
                raise ValueError(f"{name} must be {like.shape} {like.dtype} and in its turn, got {x.shape} {x.dtype}")
            file.write(_bytes_of(x))
    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise OSError(f"{path.name} could not be written whole: {error}") from None


def _bytes_of(x: mx.array) -> memoryview:
    cpu = mx.cpu  # the one device that has float64
    flat = mx.contiguous(x, stream=cpu).reshape(-1, stream=cpu)
    return memoryview(cast(Any, mx.view(flat, mx.uint8, stream=cpu)))


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Reads a checkpoint's configuration and lists its weights. FileNotFoundError or ValueError, in one line."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: {'a file, not a checkpoint folder' if folder.exists() else 'no such folder'}"
        )
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: not a checkpoint, it has no {name}")
    try:
        content = json.loads((folder / _CONFIG).read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / _CONFIG}: not JSON ({error})") from None
    if not is_checkpoint(folder):
        raise ValueError(f"{folder / _CONFIG}: not a checkpoint's, it names no format and family")
    if content["format"] != FORMAT:
        raise ValueError(f"{folder}: format must be {FORMAT}, got {content['format']!r} (from a newer mlx-xformer?)")
    if content["family"] not in FAMILIES:
        raise ValueError(f"{folder}: family must be one of {', '.join(FAMILIES)}, got {content['family']!r}")
    config, provenance = content.get("config"), content.get("provenance", {})
    if not isinstance(config, dict) or not isinstance(provenance, dict):
        raise ValueError(f"{folder / _CONFIG}: config and provenance must be objects")
    return Checkpoint(content["family"], config, _read_weights(folder / _WEIGHTS), provenance)


def _read_weights(path: Path) -> dict[str, mx.array]:
    try:
        with safe_open(path, framework="numpy"):  # the header, and that the file is as long as it says
            pass
        return cast(dict[str, mx.array], mx.load(str(path)))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None


def make_model(family: str, config: Mapping[str, Any]) -> nn.Module:
    """The family's module with fresh weights. ValueError for a configuration that makes no model."""
    configuration, module = FAMILIES[family]
    try:
        return module(configuration.from_dict(dict(config)))
    except (ArithmeticError, TypeError, AttributeError, RuntimeError, MemoryError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"the configuration makes no model: {type(error).__name__}, {reason}") from None


def parameter_shapes(family: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every parameter of the family's module and its shape."""
    return _shapes(make_model(family, config))


def parameter_count(family: str, config: Mapping[str, Any]) -> int:
    """How many numbers the model has; those in packed matrices count one by one."""
    floats = {**config, "quantization": None} if family == "decoder" else config
    return sum(math.prod(shape) for shape in parameter_shapes(family, floats).values())


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    parameters = cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
    return {name: x.shape for name, x in parameters}


def load_model(folder: str | Path) -> nn.Module:
    """The model of a checkpoint, ready to run, in float32 (a decoder: in its configuration's dtype, or as stored).
    Names and shapes must fit exactly: one ValueError lists what is missing, unexpected or misshapen.

    A bag's weights stay lazy, so that members which are never run are never read; evaluate `model.parameters()`
    before handing a bag to another thread.
    """
    checkpoint = read_checkpoint(folder)
    try:
        model = make_model(checkpoint.family, checkpoint.config)
        _check_fit(checkpoint.weights, _shapes(model))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    wanted = checkpoint.config.get("dtype") if checkpoint.family == "decoder" else "float32"
    floats = {
        name: x.astype(getattr(mx, wanted)) if wanted and mx.issubdtype(x.dtype, mx.floating) else x
        for name, x in checkpoint.weights.items()
    }
    model.load_weights(list(floats.items()), strict=True)
    model.eval()
    if not isinstance(model, Bag):
        mx.eval(model.parameters())
    return model


def _check_fit(weights: Mapping[str, mx.array], shapes: Mapping[str, tuple[int, ...]]) -> None:
    problems = [("missing", f"{name} {shapes[name]}") for name in shapes.keys() - weights.keys()]
    problems += [("unexpected", f"{name} {weights[name].shape}") for name in weights.keys() - shapes.keys()]
    problems += [
        ("misshapen", f"{name} must be {shapes[name]}, got {weights[name].shape}")
        for name in weights.keys() & shapes.keys()
        if weights[name].shape != shapes[name]
    ]
    if problems:
        raise ValueError(misfit(problems))
