"""Small models of drawn weights, their configurations, and the folders and files that hold them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import tokenizers
from mlx.utils import tree_flatten
from safetensors.numpy import save_file
from support.harness import as32, assert_within_budget, draw
from tokenizers import models as tokenizer_models
from tokenizers import normalizers, pre_tokenizers, processors

from mlx_xformer.converters.families import bert as bert_names
from mlx_xformer.converters.families import whisper as whisper_names
from mlx_xformer.converters.rules import inverse_shapes, plan
from mlx_xformer.models.bert import BertConfig
from mlx_xformer.models.families import parameter_shapes
from mlx_xformer.models.guides.llm_prep import FFNConfig, SequenceConfig
from mlx_xformer.models.htdemucs import Bag, BagConfig, HTDemucs, HTDemucsConfig
from mlx_xformer.models.transformer import Transformer, TransformerConfig
from mlx_xformer.models.whisper import Whisper, WhisperConfig
from mlx_xformer.nn.cache import CrossCache
from mlx_xformer.reference.models.guides import llm_prep as llm_prep_twin
from mlx_xformer.storage.checkpoint import save_checkpoint

# 9896 samples: 10 frames of 2048 frequencies; the waveform falls to 39 tokens and the spectrogram to 80.
BASE = {
    "sources": ["drums", "voice", "rest"],
    "samplerate": 8000,
    "segment": "1237/1000",
    "channels": 4,
    "dconv_mode": 3,
    "dconv_comp": 2,
    "bottom_channels": 24,
    "t_heads": 3,
    "t_layers": 3,
}

OPTIONS = {
    "base": {},
    "segment as a float": {"segment": 1.25},
    "one source": {"sources": ["all"]},
    "mono": {"audio_channels": 1},
    "three channels": {"audio_channels": 3},
    "other channels": {"channels": 6, "dconv_comp": 3},
    "channels_time": {"channels_time": 6, "t_layers": 0},
    "growth": {"growth": 1.5, "t_layers": 0, "bottom_channels": 0},
    "no bottom_channels": {"bottom_channels": 0, "t_heads": 4},
    "resamplers without transformer": {"t_layers": 0},
    "nfft 2048": {"nfft": 2048},
    "nfft 1024, merging at depth 4": {"nfft": 1024},
    "depth 1": {"depth": 1, "t_layers": 0},
    "depth 3": {"depth": 3},
    "depth 5, branches merge": {"depth": 5},
    "depth 6, below the merge": {"depth": 6, "t_layers": 0},
    "depth 6, time_stride 3": {"depth": 6, "t_layers": 0, "time_stride": 3},
    "no rewrite": {"rewrite": False},
    "no freq_emb": {"freq_emb": 0.0},
    "emb_scale": {"emb_scale": 3, "freq_emb": 0.7},
    "kernel_size 4, stride 2": {"kernel_size": 4, "stride": 2, "nfft": 512},
    "kernel_size 6": {"kernel_size": 6},
    "context 0": {"context": 0},
    "context 2": {"context": 2},
    "context_enc 1": {"context_enc": 1},
    "norm_starts 0": {"norm_starts": 0, "norm_groups": 2},
    "norm_starts 2": {"norm_starts": 2},
    "norms below the merge": {"depth": 6, "t_layers": 0, "norm_starts": 1, "norm_groups": 2},
    "dconv_mode 0": {"dconv_mode": 0},
    "dconv_mode 1": {"dconv_mode": 1},
    "dconv_mode 2": {"dconv_mode": 2},
    "dconv_depth 3": {"dconv_depth": 3},
    "dconv_depth -2, undilated": {"dconv_depth": -2},
    "dconv_comp 1.5": {"dconv_comp": 1.5},
    "t_layers 1": {"t_layers": 1},
    "t_layers 4": {"t_layers": 4},
    "t_emb cape": {"t_emb": "cape"},
    "t_emb cape, not centered": {"t_emb": "cape", "t_cape_mean_normalize": False},
    "t_emb scaled": {"t_emb": "scaled", "t_max_positions": 60},
    "t_hidden_scale": {"t_hidden_scale": 1.5},
    "t_heads 1": {"t_heads": 1},
    "t_norm_in off": {"t_norm_in": False},
    "t_norm_in_group": {"t_norm_in": False, "t_norm_in_group": 1},
    "t_norm_in_group 3": {"t_norm_in": False, "t_norm_in_group": 3},
    "t_group_norm": {"t_group_norm": 1},
    "t_group_norm 4": {"t_group_norm": 4},
    "t_norm_first off": {"t_norm_first": False},
    "t_norm_first off, t_group_norm": {"t_norm_first": False, "t_group_norm": 2},
    "t_norm_out off": {"t_norm_out": False},
    "t_max_period": {"t_max_period": 77.0},
    "t_layer_scale off": {"t_layer_scale": False},
    "t_gelu off": {"t_gelu": False},
    "t_weight_pos_embed": {"t_weight_pos_embed": 0.3},
    "t_cross_first": {"t_cross_first": True},
    "use_train_segment off": {"use_train_segment": False},
}  # fmt: skip


def options(name: str) -> dict:
    """The keyword arguments of one configuration."""
    return BASE | OPTIONS[name]


STEMS = ("drums", "voice", "rest")
TINY = {"nfft": 256, "depth": 2, "t_layers": 2, "segment": "128/1000", "t_heads": 2, "bottom_channels": 8}
# The waveform's branch alone, in few steps: hours of audio take seconds (with mode="time_only").
FAST = {"depth": 1, "t_layers": 0, "channels": 2, "dconv_mode": 0, "bottom_channels": 0, "rewrite": False}


def checkpoint(folder: Path, seed: int = 1, **changes: Any) -> Path:
    """A folder with a tiny HTDemucs of drawn weights."""
    config = HTDemucsConfig.from_dict(options("base") | TINY | changes)
    model = HTDemucs(config)
    draw(model, seed)
    return _save_model(folder, "htdemucs", model, config.to_dict())


def bag_checkpoint(folder: Path, weights: Any, **changes: Any) -> Path:
    """A folder with a bag of as many tiny HTDemucs as `weights` has rows."""
    config = HTDemucsConfig.from_dict(options("base") | TINY | changes)
    bag = Bag(BagConfig((config,) * len(weights), weights))
    for seed, member in enumerate(bag.models):
        draw(member, seed)
    return _save_model(folder, "htdemucs_bag", bag, bag.config.to_dict())


def _save_model(folder: Path, family: str, model: Any, config: dict) -> Path:
    weights = dict(tree_flatten(model.parameters()))
    save_checkpoint(folder, weights, family=family, config=config, provenance={})
    return folder


def drawn_as(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Tensors of these names and shapes: matrices of about unit gain, no gain and no bias 0 or 1."""
    rng = np.random.default_rng(seed)
    state = {}
    for name, shape in shapes.items():
        low, high = (-0.2, 0.2) if name.endswith("bias") else (0.7, 1.3)
        drawn = rng.uniform(low, high, shape) if len(shape) == 1 else rng.normal(size=shape) * shape[-1] ** -0.5
        state[name] = drawn.astype(np.float32)
    return state


def same_gradients(kind: Any, model: nn.Module, loss: Callable[[], mx.array], theirs: dict[str, np.ndarray]) -> None:
    """Those of a loss by every parameter, against "float64/NAME" and "float32/NAME" of the original's."""
    _, ours = nn.value_and_grad(model, loss)()
    ours = dict(tree_flatten(ours))
    names = [name.removeprefix("float64/") for name in theirs if name.startswith("float64/")]
    moves, problems = plan(kind.rules(model.config, dict.fromkeys(names)), names)
    assert not problems, problems
    found = {move.targets[0]: move.sources[0] for move in moves if move.targets}
    assert found.keys() == ours.keys()
    largest = max(np.abs(theirs[f"float64/{name}"]).max() for name in names)
    for target, source in found.items():
        truth, single = theirs[f"float64/{source}"], theirs[f"float32/{source}"]
        if np.abs(truth).max() < 1e-9 * largest:  # what a softmax does not see: the bias of keys
            assert np.abs(np.array(ours[target])).max() < 1e-5 * largest, target
            continue
        assert_within_budget(ours[target], truth, single, target)


BERT_MASK = np.arange(11)[None] < np.array([11, 7, 1])[:, None]


BERT_VALUES = {
    "model_type": "bert",
    **{"vocab_size": 31, "hidden_size": 21, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 29},
    **{"max_position_embeddings": 17, "type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12},
}


def write_bert(folder, *, prefix="", old=False, pooler=True, extra=(), seed=1, **values):
    """A folder of Hugging Face with drawn weights; returns its tensors."""
    folder.mkdir(parents=True)
    config = bert_names.config({**BERT_VALUES, **values}, {})
    config = BertConfig.from_dict(config.to_dict() | {"pooler": pooler})
    rules = bert_names.rules(config, {prefix + "embeddings.word_embeddings.weight": None})
    shapes = inverse_shapes(rules, parameter_shapes("bert", config.to_dict()))
    state = drawn_as(shapes, seed)
    if old:
        words = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for now, before in words.items():
            state = {name.replace(now, before): x for name, x in state.items()}
    state |= {name: np.ones(shape, np.float32) for name, shape in extra}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**BERT_VALUES, **values}))
    return state


BERT_WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "cat", "dog", "sleeps", "barks", "the"]


def bert_tokenizer(folder):
    library = tokenizers.Tokenizer(
        tokenizer_models.WordLevel({word: n for n, word in enumerate(BERT_WORDS)}, unk_token="[UNK]")
    )
    library.normalizer = normalizers.Lowercase()
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    library.save(str(folder / "tokenizer.json"))


def sentence_modules(folder, *, names=("Transformer", "Pooling", "Normalize"), pooling=None, texts=None):
    steps = [{"idx": n, "type": f"sentence_transformers.models.{name}"} for n, name in enumerate(names)]
    (folder / "modules.json").write_text(json.dumps(steps))
    (folder / "1_Pooling").mkdir()
    pooling = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False} if pooling is None else pooling
    (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 6} if texts is None else texts))


WHISPER_SIZES = {
    **{"vocab_size": 53, "embed_dim": 22, "num_heads": 2, "hidden_dim": 29, "encoder_layers": 2, "decoder_layers": 3},
    **{"mel_bins": 7, "source_positions": 13, "target_positions": 41},
}
WHISPER_CONFIG = WhisperConfig(**WHISPER_SIZES)
_NUMBERS = {"F32": (0, "<f4"), "I8": (1, "<i1"), "I16": (2, "<i2"), "F16": (4, "<f2")}
WHISPER_SCALARS = {
    **{"decoder/activation": ("I8", 3), "decoder/alibi": ("I8", 0), "decoder/alignment_heads": ("I16", 1)},
    **{"decoder/alignment_layer": ("I16", -1), "decoder/num_heads": ("I16", 2), "decoder/pre_norm": ("I8", 1)},
    **{"decoder/scale_embeddings": ("I8", 0), "decoder/start_from_zero_embedding": ("I8", 0)},
    "encoder/num_heads": ("I16", 2),
}
WHISPER_ALIASES = {"decoder/projection/weight": "decoder/embeddings/weight"}


def whisper(seed: int = 1, config: WhisperConfig = WHISPER_CONFIG, positions: float = 16.0) -> Whisper:
    """positions: how much larger those of the decoder are than other matrices, so that it has more than one thing to
    say."""
    model = Whisper(config)
    draw(model, seed)
    model.decoder.embed_positions.weight *= positions
    return model


def whisper_weights(model: Whisper, dtype: mx.Dtype = mx.float32) -> dict[str, mx.array]:
    return {name: x.astype(dtype) for name, x in tree_flatten(model.parameters())}


def whisper_folder(folder: Path, seed: int = 1) -> Path:
    """A checkpoint."""
    model = whisper(seed)
    save_checkpoint(folder, whisper_weights(model), family="whisper", config=model.config.to_dict(), provenance={})
    return folder


def whisper_tensors(model: Whisper, layout: str, dtype: mx.Dtype = mx.float16) -> dict[str, np.ndarray]:
    """The tensors under other names and in their layout, spelt out."""
    ours = {name: np.array(x) for name, x in whisper_weights(model, dtype).items()}
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


def write_hugging_face(folder: Path, model: Whisper, **changes) -> Path:
    """As transformers saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(whisper_tensors(model, "hugging face"), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**whisper_names.original(model.config), **changes}))
    return folder


def ctranslate2_text(word: str) -> bytes:
    return struct.pack("<H", len(word) + 1) + word.encode() + b"\0"


def ctranslate2_variable(name: str, x: np.ndarray, number: int) -> bytes:
    shape = struct.pack(f"<B{x.ndim}I", x.ndim, *x.shape)
    return ctranslate2_text(name) + shape + struct.pack("<BI", number, x.nbytes) + x.tobytes()


def write_ctranslate2(
    path: Path, tensors: dict[str, np.ndarray], scalars=None, aliases=None, version: int = 6, spec: str = "WhisperSpec"
) -> Path:
    """A model.bin as CTranslate2's converter writes it, byte for byte."""
    scalars, aliases = WHISPER_SCALARS if scalars is None else scalars, WHISPER_ALIASES if aliases is None else aliases
    parts = {name: (x, _NUMBERS["F16"][0]) for name, x in tensors.items()}
    for name, (kind, value) in scalars.items():
        number, dtype = _NUMBERS[kind]
        parts[name] = (np.array(value, dtype), number)
    out = struct.pack("<I", version) + ctranslate2_text(spec) + struct.pack("<II", 3, len(parts))
    out += b"".join(ctranslate2_variable(name, *part) for name, part in sorted(parts.items()))
    out += struct.pack("<I", len(aliases)) + b"".join(
        ctranslate2_text(a) + ctranslate2_text(b) for a, b in aliases.items()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(out)
    return path


I, O, E, HEADS, HIDDEN, V, L, S = 5, 7, 18, 6, 13, 23, 11, 5
TYPES = {"mha": {}, "gqa": {"num_kv_heads": 2}, "mqa": {}}
WINDOWS = {"expanding": None, "sliding": 3}
# How L positions go into caches, at each call
PROGRAMS = {
    "all at once": (11,),
    "prefill, steps": (5, 1, 1, 1, 1, 1, 1),
    "prefill, chunks": (4, 2, 3, 2),
    "steps": (1,) * 11,
}


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def llm_prep_config(attention_type="gqa", **options):
    given = {"attention_type": attention_type, **TYPES[attention_type], "max_len": 31, **options}
    given.setdefault("ffn", FFNConfig(E, HIDDEN))
    return SequenceConfig(
        **{"input_dim": I, "output_dim": O, "embed_dim": E, "num_layers": 2, "num_heads": HEADS, **given}
    )


def make_llm_prep(kind, seed=1, **options):
    """(a model, its parameters in double precision)"""
    model = kind(llm_prep_config(**options))
    return model, draw(model, seed)


def transformer(seed=1, **options):
    """In evaluation."""
    given = {"vocab_size": V, "embed_dim": E, "num_heads": HEADS, "hidden_dim": HIDDEN, "max_len": 41}
    given |= {"num_encoder_layers": 2, "num_decoder_layers": 3, "tie_embeddings": False}
    model = Transformer(TransformerConfig(**given | options))
    draw(model, seed)
    return model.eval()


def unrepeated(logits, history):
    """A sampler: the most likely token that is none of the last five. Drawn weights say one token again and again."""
    recent = (history[:, -5:, None] == mx.arange(logits.shape[1])).any(axis=1)
    return mx.argmax(mx.where(recent, -mx.inf, logits), axis=-1)


def through(step, x, program):
    """step(some positions of x) for each of a program, side by side."""
    parts, at = [], 0
    for n in program:
        parts.append(step(x[:, at : at + n]))
        at += n
    assert at == x.shape[1]
    return mx.concatenate(parts, axis=1)


def decode(model, x, program, memory=None, memory_mask=None, **options):
    """A causal model's outputs through caches of these options."""
    caches = model.make_caches(**options)
    if memory is None:
        return through(lambda some: model(some, caches=caches), x, program)
    given = {"memory_mask": memory_mask, "caches": caches, "cross_caches": [CrossCache() for _ in caches]}
    return through(lambda some: model.decode(some, memory, **given), x, program)


def llm_prep_truths(params, sizes, x, *rest, form=llm_prep_twin.autoregressive):
    """The twin's answer in double and in single precision."""
    return [form(cast(params), sizes, *(cast(array) for array in (x, *rest))) for cast in (lambda value: value, as32)]
