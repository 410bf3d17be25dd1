"""Vaswani's Transformer: look-ahead safety, masks, embeddings, refusals; and generation given a memory."""

import copy
import json
import pickle
import re
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.harness import assert_within_budget
from support.models import HEADS, HIDDEN, PROGRAMS, E, I, L, S, V, noise, transformer, unrepeated
from support.models import decode as decoded
from support.models import make_llm_prep as made

from mlx_xformer.models.bound import Conditioned
from mlx_xformer.models.guides.llm_prep import AutoregressiveTransformerModel, EncoderDecoder
from mlx_xformer.models.transformer import TransformerConfig
from mlx_xformer.reference.models import transformer as twin
from mlx_xformer.text.generation import batch_generate, generate
from mlx_xformer.text.samplers import greedy, make_sampler

LENGTHS = (L, 4, 7)


class Noting(nn.Module):
    """Notes what it gets, and gives it back."""

    def __call__(self, x, **_):
        self._got = x
        return x

    @property
    def got(self):
        return self._got


def tokens(*shape, seed=0, size=V):
    return np.random.default_rng(seed).integers(0, size, shape)


def params_of(model, kind=np.float64):
    return {name: np.array(x).astype(kind) for name, x in tree_flatten(model.parameters())}


def truths(model, *given, **masks):
    return [
        twin.transformer(params_of(model, kind), model.config, *given, **masks) for kind in (np.float64, np.float32)
    ]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("batch", [1, 3])
def test_caches_give_what_the_full_pass_gives(batch, program):
    model = transformer()
    lengths, targets = (S, 3, 4)[:batch], LENGTHS[:batch]
    source, target = tokens(batch, S, seed=1), tokens(batch, L)
    mask = np.arange(S) < np.array(lengths)[:, None]
    padded = np.stack([np.concatenate([tokens(L - n, seed=9), target[row, :n]]) for row, n in enumerate(targets)])
    padding = None if batch == 1 else [L - n for n in targets]
    memory = model.encode(mx.array(source), source_mask=mx.array(mask))
    out = np.array(decoded(model, mx.array(padded), PROGRAMS[program], memory, mx.array(mask), padding=padding))
    for row, n in enumerate(targets):
        own = source[row : row + 1, : lengths[row]], target[row : row + 1, :n]
        assert_within_budget(out[row : row + 1, L - n :], *truths(model, *own))


@pytest.mark.parametrize("options", [{}, {"norm_first": True, "final_norm": True}, {"vocab_size": None}])
def test_look_ahead(options):
    """S4-08, T4.2: a random change at a position of the target leaves all before it bit-equal."""
    model = transformer(**options)
    vectors = model.config.vocab_size is None
    source = mx.array(noise(1, S, E, seed=1)) if vectors else mx.array(tokens(1, S, seed=1))
    target = mx.array(noise(1, L, E)) if vectors else mx.array(tokens(1, L))
    source, target = (x.astype(mx.float32) if vectors else x for x in (source, target))
    before = model(source, target)
    for t in range(L):
        changed = mx.array(target)
        changed[:, t] = mx.array(noise(1, E, seed=t + 3)) if vectors else (target[:, t] + 1) % V
        after = model(source, changed)
        assert mx.array_equal(before[:, :t], after[:, :t]) and not mx.array_equal(before[:, t], after[:, t]), t


def test_padding_is_ignored_on_both_sides():
    model = transformer()
    source, target = mx.array(tokens(2, S, seed=1)), mx.array(tokens(2, L))
    seen, own = mx.array([[True] * S, [True] * 2 + [False] * 3]), mx.array([[True] * L, [True] * 7 + [False] * 4])
    out = model(source, target, source_mask=seen, target_mask=own)
    other = model(mx.where(seen, source, 0), mx.where(own, target, 1), source_mask=seen, target_mask=own)
    assert mx.array_equal(mx.where(own[..., None], out, 0), mx.where(own[..., None], other, 0))
    alone = model(source[1:, :2], target[1:, :7])
    assert mx.allclose(out[1:, :7], alone, rtol=0, atol=1e-5)


def test_shapes():
    """T4.3: the output has the target's length, whatever the source's; S4-10."""
    model = transformer()
    assert model(mx.array(tokens(2, S)), mx.array(tokens(2, L))).shape == (2, L, V)
    assert model(mx.array(tokens(2, S)), mx.array(tokens(2, L)), last=2).shape == (2, 2, V)
    bare = transformer(vocab_size=None)
    assert bare(mx.zeros((2, S, E)), mx.zeros((2, L, E))).shape == (2, L, E)


def test_embeddings_are_scaled():
    """S4-09, T4.6: the table times sqrt(E) and positions are what the first layer gets."""
    model = transformer(tie_embeddings=True)
    model.encoder = Noting()
    source = tokens(1, S)
    model.encode(mx.array(source))
    params, got = params_of(model), model.encoder.got
    assert_within_budget(got, *(twin.embedded({k: v.astype(kind) for k, v in params.items()}, model.config, "source",
                                                 source) for kind in (np.float64, np.float32)))  # fmt: skip
    spread = np.array(got)[0] - np.array(twin.sinusoidal(S, E))
    assert np.allclose(spread, params["embed.weight"][source[0]] * E**0.5, atol=1e-5)


def test_tables():
    names = {name: x.shape for name, x in tree_flatten(transformer(tie_embeddings=True).parameters())}
    assert names["embed.weight"] == (V, E) and "lm_head.weight" not in names
    names = {name: x.shape for name, x in tree_flatten(transformer(source_vocab_size=29).parameters())}
    assert names["source_embed.weight"] == (29, E) and names["target_embed.weight"] == (V, E)
    assert names["lm_head.weight"] == (V, E)
    lone = {name.split(".")[0] for name, _ in tree_flatten(transformer(num_decoder_layers=0).parameters())}
    assert lone == {"source_embed", "encoder"}
    lone = {name.split(".")[0] for name, _ in tree_flatten(transformer(num_encoder_layers=0).parameters())}
    assert lone == {"target_embed", "decoder", "lm_head"}


def test_dropout_is_of_embeddings_too():
    model = transformer(dropout=0.4, num_encoder_layers=1, num_decoder_layers=1)
    source, target = mx.array(tokens(1, S)), mx.array(tokens(1, L))
    quiet = model(source, target, key=mx.random.key(0))
    assert mx.array_equal(quiet, model(source, target))
    model.train()
    one, two = (model(source, target, key=mx.random.key(seed)) for seed in (1, 2))
    assert not mx.array_equal(one, two) and mx.array_equal(one, model(source, target, key=mx.random.key(1)))
    model.encoder = Noting()
    model.encode(source, key=mx.random.key(3))
    assert 0.2 < float((model.encoder.got == 0).mean()) < 0.6
    with pytest.raises(ValueError, match="dropout in training needs a random key, got none"):
        transformer(dropout=0.4).train()(source, target)


def test_gradients_reach_every_parameter():
    model = transformer(tie_embeddings=True, dropout=0.0)
    model.train()
    source, target = mx.array(tokens(2, S, seed=1)), mx.array(tokens(2, L))

    def loss(source, target):
        return nn.losses.cross_entropy(model(source, target[:, :-1]), target[:, 1:]).mean()

    _, gradients = nn.value_and_grad(model, loss)(source, target)
    for name, gradient in tree_flatten(gradients):
        assert name.endswith("k_proj.bias") or mx.abs(gradient).max() > 1e-7, name


# Generation


def without_caches(model, source, prompt, count, sampler=unrepeated):
    """Each step a full pass."""
    found = list(prompt)
    for _ in range(count):
        logits = model(source, mx.array([found]), last=1)[:, -1]
        found.append(int(sampler(logits, mx.array([found]))[0]))
    return found[len(prompt) :]


def ids(model, prompt, sampler=unrepeated, **options):
    return [token.id for token in generate(model, prompt, sampler=sampler, **options)]


@pytest.mark.parametrize("seed", [1, 2])
def test_generation_gives_what_full_passes_give(seed):
    model, source = transformer(seed), mx.array(tokens(1, S, seed=seed))
    expected = without_caches(model, source, [3, 1], 20)
    assert len(set(expected)) > 3
    assert ids(model.conditioned(source), [3, 1], max_tokens=20) == expected
    other = without_caches(model, mx.array(tokens(1, S, seed=seed + 9)), [3, 1], 20)
    assert other != expected, "the source matters"
    sampler = make_sampler(0.8, seed=5)
    for chosen in (greedy, sampler):
        expected = without_caches(model, source, [3, 1], 20, chosen)
        assert ids(model.conditioned(source), [3, 1], chosen, max_tokens=20) == expected
    assert len(set(expected)) > 3


def test_generation_ends_at_a_stop():
    given = transformer().conditioned(mx.array(tokens(1, S)))
    found = ids(given, [3], max_tokens=12)
    until = list(generate(given, [3], max_tokens=12, sampler=unrepeated, eos=[found[4]]))
    assert [token.id for token in until] == found[:5] and until[-1].finish == "eos"


def test_generation_feeds_what_is_new_and_projects_the_memory_once():
    model, source = transformer(), mx.array(tokens(1, S))
    fed, calls = [], []
    decode = model.decode

    class Counted(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __call__(self, x):
            calls.append(x.shape[1])
            return self.inner(x)

    for layer in model.decoder.layers:
        layer.cross_attn.k_proj = Counted(layer.cross_attn.k_proj)
    told = SimpleNamespace(
        config=model.config,
        caches_for=model.caches_for,
        decode=lambda target, *x, **given: fed.append(target.shape[1]) or decode(target, *x, **given),
    )
    given = Conditioned(told, model.encode(source))
    ids(given, [3, 1, 2], max_tokens=9)
    assert fed == [3] + [1] * 8 and calls == [S] * 3
    ids(given, [4], max_tokens=2)  # another generation: weights may have changed since
    assert calls == [S] * 6


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda caches: pickle.loads(pickle.dumps(caches))])
@pytest.mark.parametrize("rows", [None, [2, 0]])
def test_copies_of_caches_go_on_alike(rows, copied):
    """With the rows of the memory that are theirs, and what is projected of them."""
    model, source, more = transformer(), mx.array(tokens(3, S)), mx.array(tokens(3, 1, seed=1))
    given = model.conditioned(source, mx.array(np.arange(S) < np.array([S, 2, 4])[:, None]))
    caches = given.make_caches(padding=[0, 2, 1])
    given(mx.array(tokens(3, 4, seed=2)), caches=caches)
    if rows is not None:
        caches, more = [cache.select(rows) for cache in caches], more[: len(rows)]
    again = copied(caches)
    first = [given(more, caches=some) for some in (caches, again)]
    assert mx.array_equal(*first) and [cache.length for cache in again] == [cache.length for cache in caches]
    assert mx.array_equal(*[given(more + 1, caches=some) for some in (again, caches)])


def test_a_batch_gives_what_each_row_gives():
    """Rows that end are dropped, and those of the memory with them."""
    model, lengths, prompts = transformer(), (S, 2, 4, 3), [[3], [5, 1, 4], [2, 2], [7]]
    source = mx.array(tokens(4, S))
    mask = mx.array(np.arange(S) < np.array(lengths)[:, None])
    alone = [
        ids(model.conditioned(source[row : row + 1, :n]), prompt, max_tokens=12)
        for row, (n, prompt) in enumerate(zip(lengths, prompts, strict=True))
    ]
    given = model.conditioned(source, mask)
    assert batch_generate(given, prompts, sampler=unrepeated, max_tokens=12) == alone
    stop = alone[2][2]
    ended = [row[: row.index(stop) + 1] if stop in row else row for row in alone]
    assert len({len(row) for row in ended}) > 1
    for _ in range(2):  # a second time with what has been projected
        assert batch_generate(given, prompts, sampler=unrepeated, max_tokens=12, eos=[stop]) == ended
    fresh = model.conditioned(source, mask)
    assert batch_generate(fresh, prompts, sampler=unrepeated, max_tokens=12, eos=[stop], prefill=1) == ended


def test_a_draft_model_guesses_given_its_own_memory():
    model, draft, source = transformer(), transformer(seed=4, num_decoder_layers=1), mx.array(tokens(1, S))
    expected = ids(model.conditioned(source), [3], max_tokens=15)
    assert ids(model.conditioned(source), [3], max_tokens=15, draft=draft.conditioned(source)) == expected
    assert ids(model.conditioned(source), [3], max_tokens=15, draft=model.conditioned(source)) == expected


@pytest.mark.parametrize("attention_type", ["mha", "gqa", "mqa"])
def test_document_1_s_models_generate_tokens(attention_type):
    options = {"attention_type": attention_type, "vocab_size": V, "num_decoder_layers": 3}
    model, _ = made(EncoderDecoder, **options)
    source = mx.array(noise(1, S, I).astype(np.float32))
    expected = without_caches(model, source, [3], 15)
    assert ids(model.conditioned(source), [3], max_tokens=15) == expected
    single, _ = made(AutoregressiveTransformerModel, **{**options, "num_decoder_layers": None})
    found = without_caches(lambda _, target, **given: single(target, **given), None, [3], 15)
    assert ids(single, [3], max_tokens=15) == found


def test_windows_of_caches_change_what_is_seen():
    model, source = transformer(), mx.array(tokens(1, S))
    given = model.conditioned(source)
    narrow = ids(given, [3, 1, 4, 1, 5, 9, 2, 6], max_tokens=8, caches=given.make_caches(window=2))
    assert narrow != ids(given, [3, 1, 4, 1, 5, 9, 2, 6], max_tokens=8)


# What is refused


def test_configuration():
    base = TransformerConfig(37000)
    assert (base.embed_dim, base.num_heads, base.hidden_dim, base.num_encoder_layers) == (512, 8, 2048, 6)
    assert not base.norm_first and not base.final_norm and base.tie_embeddings and base.dropout == 0.1
    assert TransformerConfig.from_dict(json.loads(json.dumps(base.to_dict()))) == base


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 17}, "embed_dim must be a multiple of num_heads, 6, got 17"),
        ({"vocab_size": 0}, "vocab_size must be a whole number from 1 to 100000000, got 0"),
        ({"source_vocab_size": 29}, "source_vocab_size must be vocab_size, 23, with tie_embeddings, got 29"),
        ({"source_vocab_size": 29, "vocab_size": None}, "source_vocab_size must come with vocab_size, got 29 alone"),
        ({"num_encoder_layers": 0, "num_decoder_layers": 0}, "num_decoder_layers must not both be 0"),
        ({"num_encoder_layers": -1}, "num_encoder_layers must be a whole number from 0 to 1000, got -1"),
        ({"activation": "tanh"}, "activation must be one of gelu, gelu_tanh, relu, silu, got 'tanh'"),
        ({"norm_first": 1}, "norm_first must be true or false, got 1"),
        ({"norm_eps": 0}, "norm_eps must be a number above 0, got 0"),
        ({"dropout": 1}, "dropout must be a number from 0 to below 1, got 1"),
        ({"causal": False}, "the transformer has no option named causal"),
    ],
)
def test_configurations_that_are_refused(changes, message):
    given = {"vocab_size": V, "embed_dim": E, "num_heads": HEADS, "hidden_dim": HIDDEN}
    with pytest.raises(ValueError, match=re.escape(message)):
        TransformerConfig.from_dict({**given, **changes})


X, Y = mx.array(tokens(1, S)), mx.array(tokens(1, L))


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({}, lambda m: m(mx.zeros((1, 42), mx.int32), Y), "source must be at most max_len, 41 positions,"),
        ({}, lambda m: m(X, mx.zeros((1, 42), mx.int32)), "target must be at most max_len, 41 positions,"),
        ({}, lambda m: m(mx.zeros((1, S)), Y), "source must be (batch, length) whole numbers, got"),
        ({}, lambda m: m(X + V, Y), "source must be from 0 to 22, got "),
        ({}, lambda m: m(X, Y - V), "target must be from 0 to 22, got -"),
        ({}, lambda m: m(X, Y, last=-1), "last must be at least 0, got -1"),
        ({}, lambda m: m(X, Y, source_mask=mx.array([[True]])), "source_mask must be boolean (True = valid) of shape"),
        ({}, lambda m: m.decode(Y, mx.zeros((1, S, E + 1))), "memory must be (batch, length, 18) of floats, got"),
        ({}, lambda m: m.conditioned(mx.array([[1, V]])), "source must be from 0 to 22, got 23"),
        ({}, lambda m: m.conditioned(mx.array([[1, -1]])), "source must be from 0 to 22, got -1"),
        ({}, lambda m: ids(m.conditioned(X), [V]), "prompt must hold tokens from 0 to 22, got 23"),
        ({}, lambda m: ids(m.conditioned(mx.array(tokens(2, S))), [1]), "tokens must be 2 rows, as many as the"),
        ({}, lambda m: batch_generate(m.conditioned(X), [[1], [2]]), "tokens must be 1 rows, as many as the"),
        ({}, lambda m: ids(m.conditioned(X), [1], max_tokens=50), "target must be at most max_len, 41"),
        ({}, lambda m: Conditioned(m, mx.zeros((S, E))), "memory must be (batch, length, channels), got shape (5, 18)"),
        ({"vocab_size": None}, lambda m: m.conditioned(mx.zeros((1, S, E))), "conditioned() needs a vocabulary, got"),
        ({"vocab_size": None}, lambda m: m.encode(X), "source must be (batch, length, 18) of floats, got"),
        ({"num_encoder_layers": 0}, lambda m: m.encode(X), "encode() needs encoder layers, got"),
        ({"num_decoder_layers": 0}, lambda m: m.decode(Y, mx.zeros((1, S, E))), "decode() needs decoder"),
        ({"num_decoder_layers": 0}, lambda m: m.make_caches(), "make_caches() needs decoder layers, got"),
    ],
)  # fmt: skip
def test_calls_that_are_refused(options, call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(transformer(**options))
