"""A small Whisper of drawn weights, and what it is elsewhere: a folder of Hugging Face, a CTranslate2 file."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from safetensors.numpy import save_file
from support.harness import draw

from mlx_xformer.converters.families import whisper as names
from mlx_xformer.models.whisper import Whisper, WhisperConfig
from mlx_xformer.storage.checkpoint import save_checkpoint

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
    """The tensors under other names and in their layout, spelt out."""
    ours = {name: np.array(x) for name, x in weights(model, dtype).items()}
    return (_ctranslate2 if layout == "ctranslate2" else _hugging_face)(model.config, ours)


def _hugging_face(config: WhisperConfig, ours: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    words = {"norm1": "self_attn_layer_norm", "norm2": "encoder_attn_layer_norm", "norm3": "final_layer_norm"}
    words |= {"cross_attn": "encoder_attn", "mlp.linear1": "fc1", "mlp.linear2": "fc2"}
    out = {}
    for name, x in ours.items():
        name = name.replace("stack.norm.", "layer_norm.").replace("stack.", "")
        for word, other in words.items():
            name = name.replace(f".{word}.", f".{other}.")
        out[f"model.{name}"] = np.ascontiguousarray(x.transpose(0, 2, 1) if x.ndim == 3 else x)
    return out


def _ctranslate2(config: WhisperConfig, ours: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    out = {"decoder/embeddings/weight": ours["decoder.embed_tokens.weight"]}
    leaves = {"gamma": "weight", "beta": "bias"}
    for conv in ("conv1", "conv2"):  # (out, kernel, in) here, (out, in, kernel) there
        out[f"encoder/{conv}/weight"] = np.ascontiguousarray(ours[f"encoder.{conv}.weight"].transpose(0, 2, 1))
        out[f"encoder/{conv}/bias"] = ours[f"encoder.{conv}.bias"]
    for side, count in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        out[f"{side}/position_encodings/encodings"] = ours[f"{side}.embed_positions.weight"]
        norms = {f"{side}/layer_norm": f"{side}.stack.norm"}
        for i in range(count):
            there, here = f"{side}/layer_{i}", f"{side}.stack.layers.{i}"
            w = {n.removeprefix(here + "."): x for n, x in ours.items() if n.startswith(here + ".")}
            zeros = np.zeros_like(w["self_attn.q_proj.bias"])
            q, k, v = (w[f"self_attn.{p}_proj.weight"] for p in "qkv")
            out[f"{there}/self_attention/linear_0/weight"] = np.concatenate([q, k, v])
            q, v = w["self_attn.q_proj.bias"], w["self_attn.v_proj.bias"]
            out[f"{there}/self_attention/linear_0/bias"] = np.concatenate([q, zeros, v])
            norms |= {f"{there}/self_attention/layer_norm": f"{here}.norm1", f"{there}/ffn/layer_norm": f"{here}.norm3"}
            plain = {"self_attention/linear_1": "self_attn.out_proj"}
            plain |= {"ffn/linear_0": "mlp.linear1", "ffn/linear_1": "mlp.linear2"}
            if side == "decoder":
                norms[f"{there}/attention/layer_norm"] = f"{here}.norm2"
                plain |= {"attention/linear_0": "cross_attn.q_proj", "attention/linear_2": "cross_attn.out_proj"}
                k, v = w["cross_attn.k_proj.weight"], w["cross_attn.v_proj.weight"]
                out[f"{there}/attention/linear_1/weight"] = np.concatenate([k, v])
                out[f"{there}/attention/linear_1/bias"] = np.concatenate([zeros, w["cross_attn.v_proj.bias"]])
            for a, b in plain.items():
                out |= {f"{there}/{a}/{leaf}": w[f"{b}.{leaf}"] for leaf in ("weight", "bias")}
        for a, b in norms.items():
            out |= {f"{a}/{theirs}": ours[f"{b}.{leaf}"] for theirs, leaf in leaves.items()}
    return out


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
