"""What tests of generation share: a model that is a rule, obeying the contract of models and caches; tokenizers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import tokenizers
from mlx.utils import tree_flatten
from support.harness import draw, set_params
from tokenizers import decoders, models, pre_tokenizers, processors

from mlx_xformer.models.causal_lm.model import CausalLM, CausalLMConfig
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
    library = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
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
    library = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    library.decoder = decoders.Sequence(parts)
    folder.mkdir(parents=True, exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    return folder


def word_tokenizer(folder: Path) -> Path:
    """A tokenizer of the words w0, w1 ... w262, with spaces between: every text of them is there and back the same."""
    library = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(263)}, unk_token="w0"))
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
