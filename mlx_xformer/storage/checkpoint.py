"""Checkpoints: a folder with config.json and model.safetensors and, for models of text, the files of the tokenizer.

config.json holds `format`, `family`, `config` (the model's) and `provenance`. Weights keep their stored dtype on disk.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from .files import write_extras, write_safetensors

FORMAT = 1
SENTENCES = ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json")  # of sentence-transformers
EXTRAS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("generation_config.json", "chat_template.jinja"),
    *SENTENCES,
)
FORMER_FAMILIES = {  # names in files that were written before, and today's
    "decoder": "causal_lm",
    "attention_layer": "ferrotorch",
    "transformer_stack": "scratch",
    "stack_encoder_decoder": "scratch_encoder_decoder",
    "seq2seq": "llm_prep",
}
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_FILES = {_CONFIG, _WEIGHTS, *(name.partition("/")[0] for name in EXTRAS)}


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds.

    Attributes:
        family: The name of the model's family.
        config: The model's configuration as plain values.
        weights: The tensors, each read when it is first computed with.
        provenance: Where the model is from.
    """

    family: str
    config: dict[str, Any]
    weights: dict[str, mx.array]
    provenance: dict[str, Any]


def is_checkpoint(folder: str | Path) -> bool:
    """Whether `folder` holds the config.json of a checkpoint."""
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
    """Writes a checkpoint, whole or not at all.

    Args:
        folder: A new or empty folder, or an older checkpoint, which is replaced.
        weights: The tensors, or lazy arrays of their shapes and dtypes.
        family: A name of models.families.FAMILIES.
        config: The model's configuration as plain values.
        provenance: Where the model is from, as plain values.
        arrays: The values one by one, see write_safetensors.
        extras: Contents of files of EXTRAS by their names.

    Raises:
        FileExistsError: The folder holds something else.
        ValueError: A tensor is of float64, which MLX cannot store, or an extra is none of EXTRAS.
        OSError: The folder cannot be written.
    """
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
    config, provenance = content.get("config"), content.get("provenance", {})
    if not isinstance(config, dict) or not isinstance(provenance, dict):
        raise ValueError(f"{folder / _CONFIG}: config and provenance must be objects")
    family = FORMER_FAMILIES.get(content["family"], content["family"])
    return Checkpoint(family, config, _read_weights(folder / _WEIGHTS), provenance)


def _read_weights(path: Path) -> dict[str, mx.array]:
    try:
        with safe_open(path, framework="numpy"):  # the header, and that the file is as long as it says
            pass
        return cast(dict[str, mx.array], mx.load(str(path)))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
