"""A small BERT as its original folder has it."""

from __future__ import annotations

import json

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from support.networks import drawn_as
from tokenizers import models, normalizers, pre_tokenizers, processors

from mlx_xformer.converters.families import bert as names
from mlx_xformer.converters.rules import inverse_shapes
from mlx_xformer.models.bert import BertConfig
from mlx_xformer.models.families import parameter_shapes

MASK = np.arange(11)[None] < np.array([11, 7, 1])[:, None]


VALUES = {
    "model_type": "bert",
    **{"vocab_size": 31, "hidden_size": 21, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 29},
    **{"max_position_embeddings": 17, "type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12},
}


def write_original(folder, *, prefix="", old=False, pooler=True, extra=(), seed=1, **values):
    """A folder of Hugging Face with drawn weights; returns its tensors."""
    folder.mkdir(parents=True)
    config = names.config({**VALUES, **values}, {})
    config = BertConfig.from_dict(config.to_dict() | {"pooler": pooler})
    rules = names.rules(config, {prefix + "embeddings.word_embeddings.weight": None})
    shapes = inverse_shapes(rules, parameter_shapes("bert", config.to_dict()))
    state = drawn_as(shapes, seed)
    if old:
        words = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for now, before in words.items():
            state = {name.replace(now, before): x for name, x in state.items()}
    state |= {name: np.ones(shape, np.float32) for name, shape in extra}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**VALUES, **values}))
    return state


WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "cat", "dog", "sleeps", "barks", "the"]


def tokenizer(folder):
    library = tokenizers.Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    library.normalizer = normalizers.Lowercase()
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    library.save(str(folder / "tokenizer.json"))


def modules(folder, *, names=("Transformer", "Pooling", "Normalize"), pooling=None, texts=None):
    steps = [{"idx": n, "type": f"sentence_transformers.models.{name}"} for n, name in enumerate(names)]
    (folder / "modules.json").write_text(json.dumps(steps))
    (folder / "1_Pooling").mkdir()
    pooling = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False} if pooling is None else pooling
    (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 6} if texts is None else texts))
