"""Small language models, folders of Hugging Face that hold them, tokenizers, and a model that is a rule."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tokenizers
from mlx.utils import tree_flatten
from safetensors.numpy import save_file
from support.harness import as32, assert_within_budget, draw, set_params
from tokenizers import decoders, pre_tokenizers, processors
from tokenizers import models as tokenizer_models

from mlx_xformer.converters.families import causal_lm as causal_lm_names
from mlx_xformer.converters.formats.source import read_source
from mlx_xformer.converters.rules import apply_rules, inverse_shapes
from mlx_xformer.models.causal_lm.model import CausalLM, CausalLMConfig
from mlx_xformer.models.families import load_model, parameter_shapes
from mlx_xformer.nn.moe import MoEConfig
from mlx_xformer.nn.rotary import RotaryScaling
from mlx_xformer.reference.models.causal_lm import decoder as causal_lm_twin
from mlx_xformer.storage.checkpoint import save_checkpoint

END, START = 256, 257  # the special tokens of byte_tokenizer
CHAT = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


class RuleCache:
    """Holds the tokens themselves."""

    def __init__(self, padding=None, capacity=None, window=None, slack=0, keep=0, bits=None):
        self.rows, self.padding = None, padding
        self.capacity, self.window, self.slack, self.arrays = capacity, window, slack, []

    @property
    def length(self):
        return len(self.rows[0]) if self.rows else 0

    def trim(self, n):
        assert 0 <= n <= self.length
        self.rows = [row[: len(row) - n] for row in self.rows or []]

    def select(self, rows):
        other = copy.copy(self)
        other.rows = [list(self.rows[i]) for i in rows]
        other.padding = self.padding and [self.padding[i] for i in rows]
        return other


class Rule:
    """A model that says `rule(tokens so far)`, or by default what a hash of them says, with the certainty `scale`.

    calls: (rows, tokens, last) of every call."""

    def __init__(self, size=258, rule=None, scale=9.0):
        self.config = SimpleNamespace(vocab_size=size)
        self.rule, self.scale, self.calls = rule or self.hashed, scale, []

    def hashed(self, tokens):
        value = 17
        for token in tokens:
            value = (value * 31 + token + 1) % 65521
        return value % self.config.vocab_size

    def make_caches(self, **options):
        return [RuleCache(**options)]

    def __call__(self, tokens, *, caches, last, check=True):
        (cache,) = caches
        self.calls.append((*tokens.shape, last))
        cache.rows = cache.rows or [[] for _ in range(tokens.shape[0])]
        logits = np.zeros((*tokens.shape, self.config.vocab_size), np.float32)
        for i, new in enumerate(tokens.tolist()):
            for j, token in enumerate(new):
                cache.rows[i].append(token)
                real = cache.rows[i][cache.padding[i] if cache.padding else 0 :]
                logits[i, j, self.rule(real)] = self.scale
        return mx.array(logits[:, -last:])

    def follow(self, prompt, count):
        """What follows a prompt."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(self.rule(tokens))
        return tokens[len(prompt) :]


def byte_tokenizer(folder: Path, merges=(("h", "e"), ("l", "l"), ("he", "ll")), *, bos=False, chat=False) -> Path:
    """A tokenizer of bytes and a few merges; 256 ends a text, 257 begins one if `bos`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"<end>": END, "<start>": START}
    vocabulary |= {a + b: 258 + i for i, (a, b) in enumerate(merges)}
    library = tokenizers.Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=list(merges)))
    library.add_special_tokens(["<end>", "<start>"])
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    if bos:
        library.post_processor = processors.TemplateProcessing("<start> $A", None, [("<start>", START)])
    folder.mkdir(parents=True, exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    config = {"bos_token": {"content": "<start>"}, "eos_token": "<end>"} | ({"chat_template": CHAT} if chat else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def fallback_tokenizer(folder: Path) -> Path:
    """A tokenizer of words as Llama's, with bytes where it has no word, and a space that the start of a text loses."""
    words = ["<unk>", "\u2581", "\u2581a", "b", "\u2581girl", "."]
    vocabulary = {word: i for i, word in enumerate(words)} | {f"<0x{i:02X}>": len(words) + i for i in range(256)}
    library = tokenizers.Tokenizer(
        tokenizer_models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    library.decoder = decoders.Sequence(parts)
    folder.mkdir(parents=True, exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    return folder


def word_tokenizer(folder: Path) -> Path:
    """A tokenizer of the words w0, w1 ... w262, with spaces between: every text of them is there and back the same."""
    library = tokenizers.Tokenizer(tokenizer_models.WordLevel({f"w{i}": i for i in range(263)}, unk_token="w0"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.save(str(folder / "tokenizer.json"))
    return folder


TINY = {"vocab_size": 263, "embed_dim": 40, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 53}


def tiny_causal_lm(seed: int = 1, **changes) -> CausalLM:
    """A CausalLM of drawn weights, for the tokens of byte_tokenizer, that has something to say."""
    model = CausalLM(CausalLMConfig.from_dict(TINY | {"attention_bias": ["q", "k", "v"]} | changes))
    params = draw(model, seed)
    params["model.embed_tokens.weight"] *= 6
    set_params(model, params)
    return model


def language_model(folder: Path, seed: int = 1, *, chat=False, **changes) -> Path:
    """A checkpoint folder with a tiny CausalLM and its tokenizer."""
    model = tiny_causal_lm(seed, **changes)
    weights, config = dict(tree_flatten(model.parameters())), model.config.to_dict()
    save_checkpoint(folder, weights, family="causal_lm", config=config, provenance={})
    return byte_tokenizer(folder, chat=chat)


_SIZES = {"vocab_size": 31, "embed_dim": 23, "num_layers": 2, "num_heads": 6, "hidden_dim": 29, "head_dim": 10}
_GEMMA = {
    "norm_plus_one": True,
    "sandwich_norms": True,
    "activation": "gelu_tanh",
    "embed_scale": 23**0.5,
    "attention_scale": 17**-0.5,
    "tie_embeddings": True,
    "window": 3,
    "layer_types": ("local", "global"),
}
_MIXTRAL = {"renormalize": True, "alpha": 0.02}
_QWEN_MOE = {"renormalize": False, "alpha": 0.003}
_SHARED = {"shared_dim": 17, "shared_gate": True}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"num_kv_heads": 2},
    "llama, biases everywhere": {"attention_bias": ("q", "k", "v", "out"), "mlp_bias": True},
    "llama 3.1": {"num_kv_heads": 1, "rope_scaling": RotaryScaling("llama3", 8.0, 97), "rope_theta": 5e4},
    "linear": {"num_kv_heads": 3, "rope_scaling": RotaryScaling("linear", 4.0)},
    "mistral": {"num_kv_heads": 2, "window": 3},
    "qwen2": {"num_kv_heads": 2, "attention_bias": ("q", "k", "v"), "tie_embeddings": True},
    "qwen2, yarn": {
        "num_kv_heads": 2,
        "attention_bias": ("q", "k", "v"),
        "window": 4,
        "layer_types": ("global", "local"),
        "rope_scaling": RotaryScaling("yarn", 4.0, 53, 1.0, 32.0, 1.13862),
    },
    "qwen3": {"num_kv_heads": 2, "qk_norm": True, "norm_eps": 1e-5},
    "mixtral": {"num_kv_heads": 2, "moe": {"hidden_dim": 29, "num_experts": 5, "num_experts_per_tok": 2, **_MIXTRAL}},
    "qwen2 moe": {
        "num_kv_heads": 2,
        "attention_bias": ("q", "k", "v"),
        "num_layers": 3,
        "moe": {"hidden_dim": 13, "num_experts": 7, "num_experts_per_tok": 3, **_QWEN_MOE, **_SHARED},
        "dense_layers": (1,),
    },
    "qwen3 moe": {
        "num_kv_heads": 2,
        "qk_norm": True,
        "moe": {"hidden_dim": 13, "num_experts": 3, "num_experts_per_tok": 2, **_MIXTRAL},
    },
    "olmoe": {
        "embed_dim": 24,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 6,
        "qk_norm": "whole",
        "moe": {"hidden_dim": 29, "num_experts": 5, "num_experts_per_tok": 3, **_QWEN_MOE},
    },
    "gemma 2": {**_GEMMA, "num_kv_heads": 3, "attention_softcap": 1.3, "logit_softcap": 0.7},
    "gemma 3": {**_GEMMA, "num_kv_heads": 1, "qk_norm": True, "rope_theta": 1e6, "local_rope_theta": 77.0},
}


def causal_lm_config(name: str, **changes: Any) -> CausalLMConfig:
    """A small decoder of an architecture."""
    values = {**_SIZES, **ARCHITECTURES[name], **changes}
    if "moe" in values:
        values["moe"] = MoEConfig(values["embed_dim"], **values["moe"])
    if "embed_scale" in values:
        values["embed_scale"] = values["embed_dim"] ** 0.5
    return CausalLMConfig(**values)


def state_of(own: CausalLMConfig, seed: int = 0, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Random tensors under Hugging Face's names."""
    rng = np.random.default_rng(seed)
    shapes = inverse_shapes(causal_lm_names.rules(own), parameter_shapes("causal_lm", own.to_dict()))
    return {
        name: (rng.normal(size=s) * s[1] ** -0.5 if len(s) > 1 else rng.uniform(0.7, 1.3, s)).astype(dtype)
        for name, s in shapes.items()
    }


def write_folder(
    path: Path,
    own: CausalLMConfig,
    *,
    seed: int = 0,
    shards: int = 1,
    dtype: Any = np.float32,
    **values: Any,
) -> dict[str, np.ndarray]:
    """A folder of Hugging Face with random tensors, which are returned; `values` go into its config.json."""
    path.mkdir(parents=True, exist_ok=True)
    state = state_of(own, seed, dtype)
    content = {"architectures": ["X"], "eos_token_id": 2, "bos_token_id": 1, **causal_lm_names.original(own), **values}
    (path / "config.json").write_text(json.dumps(content))
    if shards == 1:
        save_file(state, path / "model.safetensors", {"format": "pt"})
        return state
    where = {}
    for n in range(shards):
        file = f"model-{n + 1:05}-of-{shards:05}.safetensors"
        part = {name: state[name] for name in sorted(state)[n::shards]}
        save_file(part, path / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return state


TOKENS = np.random.default_rng(0).integers(0, 31, (2, 11))


def drawn_causal_lm(name, seed=0, **changes):
    model = CausalLM(causal_lm_config(name, **changes))
    return model, draw(model, seed)


def causal_lm_truths(params, own, tokens=TOKENS):
    """The twin's logits in double and in single precision."""
    return causal_lm_twin(params, own, tokens), causal_lm_twin(as32(params), own, tokens)


WIDE = {"embed_dim": 64, "hidden_dim": 96, "head_dim": 32, "num_heads": 2, "num_kv_heads": 1}


FOLDER_TOKENS = np.random.default_rng(0).integers(0, 31, (2, 5))


def read_tensors(path):
    return read_source(path / "model.safetensors").tensors


def convert_names(own, state):
    """Tensors of Hugging Face under our names, as float64."""
    arrays = {name: mx.array(x) for name, x in state.items()}
    out = apply_rules(causal_lm_names.rules(own, state), arrays, parameter_shapes("causal_lm", own.to_dict()))
    return {name: np.array(x, np.float64) for name, x in out.items()}


def check_logits(folder, params, own, tokens=FOLDER_TOKENS):
    truth = (
        causal_lm_twin(params, own, tokens),
        causal_lm_twin({n: x.astype(np.float32) for n, x in params.items()}, own, tokens),
    )
    assert_within_budget(load_model(folder)(mx.array(tokens)), *truth)


HF_SIZES = {
    "vocab_size": 31,
    "hidden_size": 64,
    "num_hidden_layers": 7,
    "num_attention_heads": 32,
    "intermediate_size": 29,
}


def tensor_counts(report):
    """What a report must say of the tensors before and after, from the files."""
    sides = []
    for path in (report.source, report.out):
        weights = mx.load(str(path / "model.safetensors")).values()
        kinds = Counter({mx.float32: "F32", mx.float16: "F16", mx.uint32: "U32"}[x.dtype] for x in weights)
        sides.append(f"{len(weights)} ({', '.join(f'{n} {kind}' for kind, n in kinds.most_common())})")
    return f"{sides[0]}, all accounted for, become {sides[1]}\n"


def assert_refused(call, reason, start, folder, lines=1):
    before = sorted(folder.rglob("*"))
    with pytest.raises((ValueError, OSError)) as error:
        call()
    text = str(error.value)
    assert reason in text and text.startswith(str(start)) and len(text.splitlines()) <= lines, text
    assert sorted(folder.rglob("*")) == before


def edit_config(path, **values):
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**content, **values}))


MEMORY_CHILD = """
import json, re, sys
from pathlib import Path
import mlx_xformer, mlx.core as mx
from mlx_xformer.converters.conversion import convert
from mlx_xformer.converters.formats.source import read_source

def more(work):
    "The bytes that are resident at most while work() runs, above those before."
    def resident(name):
        return 1024 * int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before

source, out, given = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
convert(source, out, dry_run=True, **given)
print(more(lambda: convert(source, out, **given)))
print(more(lambda: [read_source(path).tensors for path in source.glob("model-*.safetensors")]))
"""
