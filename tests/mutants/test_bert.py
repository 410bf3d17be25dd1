"""Planted bugs in BERT and T5, their conversions and the vectors of sentences: the tests beside must fail with each."""

import pytest
from support.planted import outcomes, source_of, task

BERT, T5, SENTENCES, INPUTS = "models.bert", "models.t5", "sentences", "inputs"
FROM_BERT, FROM_T5 = "converters.bert", "converters.t5"

# name: (module, source, planted)
MUTANTS = {
    "positions begin at 1": (BERT, ".weight[: tokens.shape[1]]", ".weight[1 : tokens.shape[1] + 1]"),
    "no segments": (BERT, "self.token_type_embeddings(token_types) + ", ""),
    "segments are the tokens'": (BERT, "mx.zeros_like(tokens) if token_types", "mx.ones_like(tokens) if token_types"),
    "no norm of the embeddings": (
        BERT,
        "return self.norm(self.word_embeddings(tokens) + self.token_type_embeddings(token_types) + places)",
        "return self.word_embeddings(tokens) + self.token_type_embeddings(token_types) + places",
    ),
    "the norm of embeddings with another eps": (
        BERT,
        "self.norm = LayerNorm(config.embed_dim, config.norm_eps)",
        "self.norm = LayerNorm(config.embed_dim)",
    ),
    "layers with another eps": (
        BERT,
        "activation=self.activation, norm_eps=self.norm_eps",
        "activation=self.activation",
    ),
    "layers with another activation": (BERT, "activation=self.activation, norm", 'activation="relu", norm'),
    "pre-norm": (BERT, "norm_eps=self.norm_eps)", "norm_eps=self.norm_eps, norm_first=True)"),
    "causal": (BERT, "norm_eps=self.norm_eps)", "norm_eps=self.norm_eps, causal=True)"),
    "padding is seen": (BERT, "mask=keys)", "mask=None)"),
    "padding sees nothing, and is seen": (BERT, "mask=keys)", "mask=None if keys is None else keys.swapaxes(2, 3))"),
    "the pooler reads the last token": (BERT, "self.pooler(hidden[:, 0])", "self.pooler(hidden[:, -1])"),
    "the pooler without tanh": (BERT, "mx.tanh(self.pooler(hidden[:, 0]))", "self.pooler(hidden[:, 0])"),
    "the mean counts padding": (BERT, "mx.maximum(valid.sum(axis=-1), 1)", "hidden.shape[1]"),
    "the mean has NaN of padding": (
        BERT,
        "valid @ mx.where(mask[..., None], hidden, mx.array(0, hidden.dtype))",
        "valid @ hidden",
    ),
    "lengths are squared": (BERT, "mx.linalg.norm(x, axis=-1, keepdims=True)", "(x * x).sum(axis=-1, keepdims=True)"),
    "tokens are not checked": (INPUTS, "wrong = [end for end in ends if not 0 <= end < size]", "wrong = []"),
    "one token too many": (INPUTS, "0 <= end < size", "0 <= end <= size"),
    "sentences in another order": (SENTENCES, "mx.array(np.argsort(order))", "mx.array(np.array(order))"),
    "sentences are cut at the positions": (SENTENCES, "_longest(folder) or ", ""),
    "sentences are padded inside": (SENTENCES, "< lengths[:, None]", "<= lengths[:, None]"),
    "vectors are never normed": (SENTENCES, 'return "Normalize" in names', "return False"),
    "vectors are always normed": (SENTENCES, 'return "Normalize" in names', "return True"),
    "keys and values of BERT": (FROM_BERT, '("key", "k"), ("value", "v")', '("key", "v"), ("value", "k")'),
    "norms of BERT": (
        FROM_BERT,
        '_norm(names, layer + "attention.output.LayerNorm", ours + "norm1"),\n',
        '_norm(names, layer + "attention.output.LayerNorm", ours + "norm3"),\n',
    ),
    "scaled scores": (T5, "scale=1.0", "scale=None"),
    "biases of projections": (T5, "            bias=False,\n", "            bias=True,\n"),
    "post-norm": (T5, "norm_first=True", "norm_first=False"),
    "another eps": (T5, "norm_eps=self.norm_eps", "norm_eps=1e-5"),
    "an encoder that looks back only": (T5, "bidirectional = not self.stack.config.causal", "bidirectional = False"),
    "a decoder that looks both ways": (T5, "self._layer(causal=True, cross=True)", "self._layer(cross=True)"),
    "distances the other way": (
        T5,
        "mx.arange(S)[None] - mx.arange(L)[:, None] + (L - 1)",
        "mx.arange(L)[:, None] - mx.arange(S)[None] + (S - 1)",
    ),
    "distances of a cache forgotten": (T5, "held = caches[0].length if caches else 0", "held = 0"),
    "no bias by distance": (T5, "bias=bias, caches", "bias=None, caches"),
    "logits are not scaled": (T5, "x = x * self.config.embed_dim**-0.5", "pass"),
    "logits are always scaled": (T5, "if self.config.scale_logits:", "if True:"),
    "the head is always tied": (T5, "if self.config.tie_embeddings else self.lm_head(x)", "if True else x"),
    "the text's padding is seen by answers": (
        T5,
        "memory_mask = expand_key_mask(",
        "memory_mask = None and expand_key_mask(",
    ),
    "the text's padding is seen by the text": (T5, 'mask=expand_key_mask("mask", mask, source.shape)', "mask=None"),
    "no first dropout": (T5, "self.stack(apply_dropout(x, rate, first), ", "self.stack(x, "),
    "no final dropout": (
        T5,
        "return apply_dropout(x, rate, last)",
        "return x if rate else apply_dropout(x, rate, last)",
    ),
    "the memory is projected anew": (T5, '"cross_caches": cross_caches, "key"', '"cross_caches": None, "key"'),
    "gates of T5": (FROM_T5, '"wi_0": "gate_proj", "wi_1": "up_proj"', '"wi_0": "up_proj", "wi_1": "gate_proj"'),
    "keys of T5": (FROM_T5, '("k", "k_proj"), ("v", "v_proj")', '("k", "v_proj"), ("v", "k_proj")'),
    "sides of T5": (
        FROM_T5,
        'Rule(_RELATIVE.format(side=side), side + ".relative.weight")',
        'Rule(_RELATIVE.format(side="decoder" if side == "encoder" else "encoder"), side + ".relative.weight")',
    ),
    "exact GELU in T5 1.1": (FROM_T5, '"gelu_new" if word == "gelu" else word', "word"),
}

CHECK = """
import tempfile
from pathlib import Path

def bert(folder):
    import pytest, test_bert
    for activation in ("gelu", "relu"):
        test_bert.test_forward_and_gradient(activation)
    test_bert.test_padding_changes_nothing()
    test_bert.test_sides_segments_and_places_count()
    test_bert.test_pooling()
    for number in (31, -1):
        with pytest.raises(ValueError, match="tokens must be from 0 to 30"):
            test_bert.Bert(test_bert.CONFIG)(test_bert.mx.array([[number]]))
    test_bert.test_each_tensor_has_its_place(folder / "places")
    with pytest.MonkeyPatch.context() as patch:
        for name, test in (("a", lambda *given: test_bert.test_sentences(*given, patch)),
                           ("b", test_bert.test_vectors_that_are_not_normed)):
            (folder / name).mkdir()
            test_bert.write_original(folder / name / "hf")
            test_bert.tokenizer(folder / name / "hf")
            test(folder / name / "hf", folder / name)

def t5(folder):
    import test_t5
    for changes in ({}, test_t5.NEWER, test_t5.NEAR):
        test_t5.test_forward_and_gradient(changes)
        test_t5.test_cached_equals_uncached(changes, (4, 1, 5, 1))
    test_t5.test_look_ahead()
    test_t5.test_padding_of_the_text_changes_nothing()
    test_t5.test_dropout()
    test_t5.test_each_tensor_has_its_place(folder / "places")
    values = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    test_t5.test_there_and_back(folder / "back", values, {}, test_t5.NEWER)

def found(*kinds):
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            try:
                (Path(folder) / kind).mkdir()
                globals()[kind](Path(folder) / kind)
            except BaseException as error:
                return f"{type(error).__name__}: {error}"[:300]
"""


@pytest.fixture(scope="module")
def caught():
    """What became of each mutant, and of the unchanged source."""
    mutants = [task(name, *mutant, "t5" if mutant[0] in (T5, FROM_T5) else "bert") for name, mutant in MUTANTS.items()]
    return outcomes([("nothing", BERT, source_of(BERT), "bert", "t5"), *mutants], CHECK)


def test_the_unchanged_source_passes(caught):
    assert caught["nothing"] is None
    assert caught.keys() == {"nothing", *MUTANTS}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_caught(caught, name):
    assert caught[name], f"the tests pass with {name}"
