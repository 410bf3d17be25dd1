"""A small Whisper of drawn weights, and what it is elsewhere: a folder of Hugging Face, a CTranslate2 file."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
from harness import draw
from mlx.utils import tree_flatten
from mlx_xformer.converters import whisper as names
from mlx_xformer.converters.rules import apply_rules, inverse_shapes, invert
from safetensors.numpy import save_file

from mlx_xformer.checkpoint import save_checkpoint
from mlx_xformer.models.whisper import Whisper, WhisperConfig

SIZES = {
    **{"vocab_size": 53, "embed_dim": 22, "num_heads": 2, "hidden_dim": 29, "encoder_layers": 2, "decoder_layers": 3},
    **{"mel_bins": 7, "source_positions": 13, "target_positions": 41},
}
CONFIG = WhisperConfig(**SIZES)
NUMBERS = {"F32": (0, "<f4"), "I8": (1, "<i1"), "I16": (2, "<i2"), "F16": (4, "<f2")}
SCALARS = {
    **{"decoder/activation": ("I8", 3), "decoder/alibi": ("I8", 0), "decoder/alignment_heads": ("I16", 1)},
    **{"decoder/alignment_layer": ("I16", -1), "decoder/num_heads": ("I16", 2), "decoder/pre_norm": ("I8", 1)},
    **{"decoder/scale_embeddings": ("I8", 0), "decoder/start_from_zero_embedding": ("I8", 0)},
    "encoder/num_heads": ("I16", 2),
}
ALIASES = {"decoder/projection/weight": "decoder/embeddings/weight"}


def whisper(seed: int = 1, config: WhisperConfig = CONFIG, positions: float = 16.0) -> Whisper:
    """positions: how much larger those of the decoder are than other matrices, so that it has more than one thing to
    say."""
    model = Whisper(config)
    draw(model, seed)
    model.decoder.embed_positions.weight *= positions
    return model


def weights(model: Whisper, dtype: mx.Dtype = mx.float32) -> dict[str, mx.array]:
    return {name: x.astype(dtype) for name, x in tree_flatten(model.parameters())}


def whisper_folder(folder: Path, seed: int = 1) -> Path:
    """A checkpoint."""
    model = whisper(seed)
    save_checkpoint(folder, weights(model), family="whisper", config=model.config.to_dict(), provenance={})
    return folder


def theirs(model: Whisper, layout: str, dtype: mx.Dtype = mx.float16) -> dict[str, np.ndarray]:
    """The tensors under other names, by the inverted table."""
    ours = weights(model, dtype)
    marker = {"encoder/conv1/weight", "decoder/embeddings/weight"} | {
        f"{s}/position_encodings/encodings" for s in ("encoder", "decoder")
    }
    rules = names.rules(model.config, marker if layout == "ctranslate2" else ())
    shapes = inverse_shapes(rules, {name: x.shape for name, x in ours.items()})
    return {name: np.ascontiguousarray(x) for name, x in apply_rules(invert(rules), ours, shapes).items()}


def hugging_face(folder: Path, model: Whisper, **changes) -> Path:
    """As transformers saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(theirs(model, "hugging face"), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**names.original(model.config), **changes}))
    return folder


def text(word: str) -> bytes:
    return struct.pack("<H", len(word) + 1) + word.encode() + b"\0"


def variable(name: str, x: np.ndarray, number: int) -> bytes:
    shape = struct.pack(f"<B{x.ndim}I", x.ndim, *x.shape)
    return text(name) + shape + struct.pack("<BI", number, x.nbytes) + x.tobytes()


def ctranslate2(
    path: Path, tensors: dict[str, np.ndarray], scalars=None, aliases=None, version: int = 6, spec: str = "WhisperSpec"
) -> Path:
    """A model.bin as CTranslate2's converter writes it, byte for byte."""
    scalars, aliases = SCALARS if scalars is None else scalars, ALIASES if aliases is None else aliases
    parts = {name: (x, NUMBERS["F16"][0]) for name, x in tensors.items()}
    for name, (kind, value) in scalars.items():
        number, dtype = NUMBERS[kind]
        parts[name] = (np.array(value, dtype), number)
    out = struct.pack("<I", version) + text(spec) + struct.pack("<II", 3, len(parts))
    out += b"".join(variable(name, *part) for name, part in sorted(parts.items()))
    out += struct.pack("<I", len(aliases)) + b"".join(text(a) + text(b) for a, b in aliases.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(out)
    return path
