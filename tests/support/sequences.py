"""Models of llm_prep and Transformers of prime sizes, with drawn weights, their twins, and what they are fed."""

import mlx.core as mx
import numpy as np
from support.harness import as32, draw

from mlx_xformer.models.guides.llm_prep import FFNConfig, SequenceConfig
from mlx_xformer.models.transformer import Transformer, TransformerConfig
from mlx_xformer.nn.cache import CrossCache
from mlx_xformer.reference.models.guides import llm_prep as twin

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


def config(attention_type="gqa", **options):
    given = {"attention_type": attention_type, **TYPES[attention_type], "max_len": 31, **options}
    given.setdefault("ffn", FFNConfig(E, HIDDEN))
    return SequenceConfig(
        **{"input_dim": I, "output_dim": O, "embed_dim": E, "num_layers": 2, "num_heads": HEADS, **given}
    )


def made(kind, seed=1, **options):
    """(a model, its parameters in double precision)"""
    model = kind(config(**options))
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


def decoded(model, x, program, memory=None, memory_mask=None, **options):
    """A causal model's outputs through caches of these options."""
    caches = model.make_caches(**options)
    if memory is None:
        return through(lambda some: model(some, caches=caches), x, program)
    given = {"memory_mask": memory_mask, "caches": caches, "cross_caches": [CrossCache() for _ in caches]}
    return through(lambda some: model.decode(some, memory, **given), x, program)


def truths(params, sizes, x, *rest, form=twin.autoregressive):
    """The twin's answer in double and in single precision."""
    return [form(cast(params), sizes, *(cast(array) for array in (x, *rest))) for cast in (lambda value: value, as32)]
