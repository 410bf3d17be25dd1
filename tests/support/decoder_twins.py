"""Small decoders beside their twins."""

import numpy as np
from support.decoders import config
from support.harness import as32, draw

from mlx_xformer.models.causal_lm.model import CausalLM
from mlx_xformer.reference.models.causal_lm import decoder as twin

TOKENS = np.random.default_rng(0).integers(0, 31, (2, 11))


def drawn(name, seed=0, **changes):
    model = CausalLM(config(name, **changes))
    return model, draw(model, seed)


def truths(params, own, tokens=TOKENS):
    """The twin's logits in double and in single precision."""
    return twin(params, own, tokens), twin(as32(params), own, tokens)


WIDE = {"embed_dim": 64, "hidden_dim": 96, "head_dim": 32, "num_heads": 2, "num_kv_heads": 1}
