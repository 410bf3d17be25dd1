"""llm_prep's models: caches against the full pass, causality, padding, what they refuse, and the document's traps."""

import dataclasses
import json
import math
import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.harness import as32, assert_within_budget, draw
from support.models import HEADS, HIDDEN, PROGRAMS, TYPES, WINDOWS, E, I, L, O, S, V, noise
from support.models import decode as decoded
from support.models import llm_prep_config as config
from support.models import llm_prep_truths as truths
from support.models import make_llm_prep as made

import mlx_xformer
from mlx_xformer.models.guides.llm_prep import (
    AutoregressiveTransformerModel,
    EncoderDecoder,
    FFNConfig,
    SequenceCheckpoint,
    SequenceConfig,
    TransformerModel,
    auxiliary_loss,
    make,
)
from mlx_xformer.nn.cache import CrossCache
from mlx_xformer.nn.positions import sinusoidal
from mlx_xformer.reference.models.guides import llm_prep as twin

MIXTURE = {"ffn": FFNConfig(E, HIDDEN, use_moe=True, num_experts=3, topk=2)}
KINDS = (TransformerModel, AutoregressiveTransformerModel, EncoderDecoder)
LENGTHS = (L, 4, 7)  # of a ragged batch


def array(x):
    return mx.array(as32(x))


def ragged(x):
    """Rows of LENGTHS, with anything before them."""
    rows = [np.concatenate([noise(L - n, I, seed=n + 50), x[row, :n]]) for row, n in enumerate(LENGTHS)]
    return np.stack(rows), [L - n for n in LENGTHS]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("attention_type", TYPES)
def test_caches_give_what_the_full_pass_gives(attention_type, window, batch, program):
    """T1.5: a step has the position that its cache tells, not 0. T1.7: of two new positions both are attended to."""
    model, params = made(AutoregressiveTransformerModel, attention_type=attention_type, window=WINDOWS[window])
    x = noise(batch, L, I)
    if batch == 1:
        assert_within_budget(decoded(model, array(x), PROGRAMS[program]), *truths(params, model.config, x))
        return
    padded, padding = ragged(x)
    out = np.array(decoded(model, array(padded), PROGRAMS[program], padding=padding))
    for row, n in enumerate(LENGTHS):
        assert_within_budget(out[row : row + 1, L - n :], *truths(params, model.config, x[row : row + 1, :n]))


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("attention_type", TYPES)
def test_caches_of_an_encoder_decoder(attention_type, window, batch, program):
    """T1.6: only what is new is fed, and the memory is projected once."""
    model, params = made(EncoderDecoder, attention_type=attention_type, window=WINDOWS[window], num_decoder_layers=3)
    source, x = noise(batch, S, I, seed=1), noise(batch, L, I)
    lengths = (S, 3, 4)[:batch]
    mask = np.arange(S) < np.array(lengths)[:, None]
    memory = model.encode(array(source), source_mask=mx.array(mask))
    padded, padding = (x, None) if batch == 1 else ragged(x)
    out = np.array(decoded(model, array(padded), PROGRAMS[program], memory, mx.array(mask), padding=padding))
    for row, n in enumerate(LENGTHS[:batch]):
        own = source[row : row + 1, : lengths[row]], x[row : row + 1, :n]
        assert_within_budget(
            out[row : row + 1, L - n :], *truths(params, model.config, *own, form=twin.encoder_decoder)
        )


def test_sliding_caches_are_as_wide_as_their_window():
    """T1.8: the window is not as long as what a call happens to be given. A cache's own slides too."""
    model, params = made(AutoregressiveTransformerModel)
    x = noise(1, L, I)
    out = decoded(model, array(x), PROGRAMS["steps"], window=4)
    narrow = dataclasses.replace(model.config, window=4)
    assert_within_budget(out, *truths(params, narrow, x))
    assert not mx.allclose(out, model(array(x)), rtol=0, atol=1e-2)


@pytest.mark.parametrize("options", [*TYPES, "window", "vocabulary", "mixture"])
def test_autoregression_is_causal(options):
    """T1.1: `apply_causal_mask=True` let every position see the whole sequence. T1.11: nor is the triangle upside
    down, which hides a position from itself."""
    given = {"window": {"window": 3}, "vocabulary": {"vocab_size": V}, "mixture": MIXTURE}.get(
        options, {"attention_type": options}
    )
    model, _ = made(AutoregressiveTransformerModel, **given)
    rng = np.random.default_rng(0)
    tokens = options == "vocabulary"
    x = mx.array(rng.integers(0, V, (1, L))) if tokens else array(noise(1, L, I))
    before = model(x)
    for t in range(L):
        changed = mx.array(x)
        changed[:, t] = (x[:, t] + 1) % V if tokens else array(noise(1, I, seed=t + 1))
        after = model(changed)
        assert mx.array_equal(before[:, :t], after[:, :t]) and not mx.array_equal(before[:, t], after[:, t]), t
        caches = model.make_caches()
        model(x[:, :2], caches=caches)
        chunk = model(changed[:, 2:], caches=[cache.fork() for cache in caches])
        if t >= 2:
            assert mx.array_equal(model(x[:, 2:], caches=caches)[:, : t - 2], chunk[:, : t - 2])


@pytest.mark.parametrize("attention_type", TYPES)
def test_a_decoder_is_causal_in_its_target_and_sees_all_of_its_source(attention_type):
    """T1.1 for the encoder-decoder: its encoder never was causal, its decoder always is."""
    model, _ = made(EncoderDecoder, attention_type=attention_type)
    source, x = array(noise(1, S, I, seed=1)), array(noise(1, L, I))
    before = model(source, x)
    for t in range(L):
        changed = mx.array(x)
        changed[:, t] = array(noise(1, I, seed=t + 2))
        after = model(source, changed)
        assert mx.array_equal(before[:, :t], after[:, :t]) and not mx.array_equal(before[:, t], after[:, t]), t
    other = mx.array(source)
    other[:, -1] = array(noise(1, I, seed=40))
    assert (mx.abs(model(other, x) - before).max(axis=-1) > 1e-5).all()


def test_regression_ignores_padding():
    model, params = made(TransformerModel)
    x, lengths = noise(3, L, I), (L, 4, 1)
    mask = mx.array(np.arange(L) < np.array(lengths)[:, None])
    out = model(array(x), mask=mask)
    garbage = mx.where(mask[..., None], array(x), 1e3)
    assert mx.array_equal(model(garbage, mask=mask), out)
    for row, n in enumerate(lengths):
        assert_within_budget(
            out[row : row + 1], *truths(params, model.config, x[row : row + 1, :n], form=twin.regression)
        )
    assert not mx.allclose(model(array(x))[1], out[1], rtol=0, atol=1e-3)


def test_a_row_of_padding_has_the_mean_zero():
    model, _ = made(TransformerModel)
    out = model(array(noise(2, L, I)), mask=mx.array([[True] * L, [False] * L]))
    assert mx.array_equal(out[1], model.out_proj.bias)


def test_a_long_mean_is_exact():
    """A mean over more than 1024 positions goes through a product: a sum in sequence is off by 6e-6 here."""
    model, _ = made(TransformerModel, output_dim=E, max_len=40_000)
    y = as32(noise(1, 40_000, E) + 3)
    model.stack = lambda *_, **__: mx.array(y)
    model.out_proj = lambda x: x
    expected = y.astype(np.float64).mean(axis=1)
    error = np.abs(np.array(model(mx.zeros((1, 40_000, I)))) - expected).max()
    assert error <= 1e-6 * np.abs(expected).max()


def test_the_document_s_own_calls_work():
    """T1.2: they were ImportErrors and TypeErrors. T1.4: a cache is what a call is given, not a flag of a module."""
    x = array(noise(2, L, I))
    for mixture in ({}, MIXTURE):
        regression, causal, pair = (kind(config(**mixture)) for kind in KINDS)
        assert regression(x).shape == (2, O)
        assert causal(x).shape == (2, L, O)
        assert causal.generate_next_token(x).shape == (2, 1, O)
        memory = pair.encode(x)
        assert memory.shape == (2, L, E) and pair.decode(x[:, :3], memory).shape == (2, 3, O)
        assert mx.allclose(pair(x, x[:, :3]), pair.decode(x[:, :3], memory), rtol=0, atol=1e-6)
    caches = causal.make_caches()
    causal.generate_next_token(x, caches=caches)
    assert [cache.length for cache in caches] == [L, L]
    assert mx.array_equal(causal(x), causal(x)), "a module holds no state"
    assert not any(hasattr(mlx_xformer, name) for name in ("EncoderDecoder", "TransformerModel"))


def test_groups():
    """T1.3: as many groups as heads are multi-head attention, one is multi-query, and one head has a default."""
    models = {}
    for kind, groups in (("mha", None), ("gqa", HEADS), ("mqa", None), ("gqa", 1)):
        model = AutoregressiveTransformerModel(config(attention_type=kind, num_kv_heads=groups))
        draw(model, 3)
        models[kind, groups] = model(array(noise(1, L, I)))
    assert mx.array_equal(models["mha", None], models["gqa", HEADS])
    assert mx.array_equal(models["mqa", None], models["gqa", 1])
    assert config("gqa", num_kv_heads=None).kv_heads == HEADS // 2
    assert config("mha", num_kv_heads=5).kv_heads == HEADS and config("mqa", num_kv_heads=5).kv_heads == 1
    assert SequenceConfig(I, O, 7, 1, 1, "gqa").kv_heads == 1
    with pytest.raises(ValueError, match="num_kv_heads must divide num_heads, 5, got 2"):
        SequenceConfig(I, O, 10, 1, 5, "gqa")


@pytest.mark.parametrize(("attention_type", "groups"), [("mha", 6), ("gqa", 2), ("mqa", 1)])
def test_what_caches_hold(attention_type, groups):
    """T1.9: heads are not repeated in it. T1.10: a cache is memory on top, 2 B G S D numbers a layer."""
    model, _ = made(AutoregressiveTransformerModel, attention_type=attention_type)
    caches = model.make_caches()
    assert sum(cache.nbytes for cache in caches) == 0
    model(array(noise(3, L, I)), caches=caches)
    assert [cache.nbytes for cache in caches] == [2 * 3 * groups * 256 * (E // HEADS) * 4] * 2  # 256 slots at first


def test_parameters_of_attentions():
    """T1.10: those of multi-query attention are D^2 (2 + 2 / H), not 3 D^2."""
    for kind, groups in (("mha", 6), ("gqa", 2), ("mqa", 1)):
        layer = AutoregressiveTransformerModel(config(attention_type=kind)).stack.layers[0]
        weights = [x.size for name, x in tree_flatten(layer.self_attn.parameters()) if name.endswith("weight")]
        assert sum(weights) == E * E * (2 + 2 * groups / HEADS)


def test_generation_feeds_back_what_is_new_alone():
    """T1.6: the document's loop fed the growing target again and again."""
    model, _ = made(EncoderDecoder, output_dim=I)
    source, start, lengths = array(noise(2, S, I, seed=1)), array(noise(2, 2, I)), []
    projections = [layer.cross_attn.k_proj for layer in model.decoder.layers]

    class Counted(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.calls = inner, 0

        def __call__(self, x):
            self.calls += 1
            return self.inner(x)

    for layer, inner in zip(model.decoder.layers, projections, strict=True):
        layer.cross_attn.k_proj = Counted(inner)
    inner_decode = model.decoder_input_proj
    model.decoder_input_proj = lambda x: lengths.append(x.shape[1]) or inner_decode(x)
    out = model.generate(source, start, 9)
    assert lengths == [2] + [1] * 8
    assert [layer.cross_attn.k_proj.calls for layer in model.decoder.layers] == [1, 1]
    model.decoder_input_proj = inner_decode
    fed = mx.concatenate([start, out[:, :-1]], axis=1)
    assert mx.allclose(model(source, fed)[:, 1:], out, rtol=0, atol=1e-5)
    single, _ = made(AutoregressiveTransformerModel, output_dim=I)
    found = single.generate(start, 9)
    assert mx.allclose(single(mx.concatenate([start, found[:, :-1]], axis=1))[:, 1:], found, rtol=0, atol=1e-5)


def test_mixtures_in_every_layer():
    """S1-27: the document's layers took the pair that a mixture gives for a tensor (T1.2)."""
    model, _ = made(EncoderDecoder, num_decoder_layers=3, **MIXTURE)
    routings = []
    out = model(array(noise(2, S, I)), array(noise(2, L, I, seed=1)), routings=routings)
    assert out.shape == (2, L, O) and len(routings) == 2 + 3
    loss = auxiliary_loss(routings)
    assert loss.shape == () and abs(float(loss) - sum(float(r.loss) for r in routings)) < 1e-6
    assert 0.02 * 5 * 0.8 < float(loss) < 0.02 * 5 * 3


def test_positions_are_those_of_the_formula():
    """T4.1: with the exponent doubled most channels hardly move."""
    model, params = made(TransformerModel)
    model.stack = lambda y, **_: y
    x = mx.zeros((1, L, I))
    bias = params["input_proj.bias"]
    table = np.array([[(math.cos if c % 2 else math.sin)(p / 10000 ** (c // 2 * 2 / E)) for c in range(E)]
                      for p in range(L)])  # fmt: skip
    expected = (bias + table).mean(axis=0) @ params["out_proj.weight"].T + params["out_proj.bias"]
    assert np.abs(np.array(model(x))[0] - expected).max() < 1e-5
    doubled = np.array([[math.sin(p / 10000 ** (2 * c / E)) for c in range(0, E, 2)] for p in range(L)])
    assert np.abs(np.array(sinusoidal(L, E))[:, ::2] - doubled).max() > 0.5


def test_odd_widths_have_positions():
    model = AutoregressiveTransformerModel(SequenceConfig(I, O, 7, 1, 1, max_len=9))
    assert model(array(noise(2, 9, I))).shape == (2, 9, O)


@pytest.mark.parametrize("attention_type", TYPES)
def test_configurations_go_through_json(attention_type):
    own = config(attention_type, **MIXTURE, window=3, num_decoder_layers=4)
    for name in ("encoder_decoder",):
        checkpoint = SequenceCheckpoint(name, own)
        assert SequenceCheckpoint.from_dict(json.loads(json.dumps(checkpoint.to_dict()))) == checkpoint
        assert isinstance(make(checkpoint), EncoderDecoder)
    assert SequenceConfig.from_dict(own.to_dict()) == own
    assert SequenceConfig(I, O, E, 2, HEADS).ffn == FFNConfig(E, 4 * E)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "embed_dim must be a multiple of num_heads, 5, got 18"),
        ({"num_heads": 0}, "num_heads must be a whole number from 1 to 100000, got 0"),
        ({"num_layers": 1001}, "num_layers must be a whole number from 1 to 1000, got 1001"),
        ({"max_len": "9"}, "max_len must be a whole number from 1 to 100000000, got '9'"),
        ({"window": 0}, "window must be a whole number from 1 to 100000000, got 0"),
        ({"num_kv_heads": 4}, "num_kv_heads must divide num_heads, 6, got 4"),
        ({"attention_type": "mla"}, "attention_type must be one of mha, mqa, gqa, got 'mla'"),
        ({"ffn": FFNConfig(17, 5)}, "embed_dim of the ffn must be the model's, 18, got 17"),
        ({"ffn": 13}, "ffn must be a FFNConfig, got a int"),
        ({"ffn": {"embed_dim": E, "hidden_dim": 3, "gated": True}}, "ffn has no option named gated"),
        ({"ffn": {"embed_dim": E}}, "ffn must be given hidden_dim"),
        ({"causal": True}, "the sequence model has no option named causal"),
    ],
)
def test_configurations_that_are_refused(changes, message):
    """T4.5: what does not divide is a ValueError."""
    with pytest.raises(ValueError, match=re.escape(message)):
        SequenceConfig.from_dict({**config().to_dict(), **changes})


def test_what_a_checkpoint_must_be_of():
    with pytest.raises(ValueError, match="model must be one of regression, autoregressive, encoder_decoder, got None"):
        SequenceCheckpoint.from_dict(config().to_dict())
    with pytest.raises(ValueError, match="the sequence model must be given num_heads"):
        SequenceConfig.from_dict({"input_dim": 1, "output_dim": 1, "embed_dim": 2, "num_layers": 1})


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (TransformerModel, {"window": 3}, "window must be None: a regression is not causal, got 3"),
        (TransformerModel, {"vocab_size": V}, "vocab_size must be None: a regression is not causal, got 23"),
        (AutoregressiveTransformerModel, {"num_decoder_layers": 2}, "num_decoder_layers must be None: there is one"),
    ],
)
def test_models_that_make_no_sense(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(config(**options))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r, a, p, x: r(x[..., :3]), "x must be (batch, length, 5) of floats, got mlx.core.float32 (2, 11, 3)"),
        (
            lambda r, a, p, x: r(x, mask=mx.ones((2, 3), mx.bool_)),
            "mask must be boolean (True = valid) of shape (2, 11)",
        ),
        (lambda r, a, p, x: r(x, mask=mx.ones((2, L))), "of shape (2, 11), got mlx.core.float32 (2, 11)"),
        (lambda r, a, p, x: r(mx.zeros((1, 32, I))), "x must be at most max_len, 31 positions, got 32"),
        (lambda r, a, p, x: a(x, last=-1), "last must be at least 0, got -1"),
        (lambda r, a, p, x: a(x[0]), "x must be (batch, length, 5) of floats, got mlx.core.float32 (11, 5)"),
        (lambda r, a, p, x: a.generate_next_token(x[:, :0]), "x must hold at least one position, got shape (2, 0, 5)"),
        (lambda r, a, p, x: a.generate(x, 3), "outputs must be inputs to be fed back, 5 wide, got 7"),
        (lambda r, a, p, x: a(x, caches=a.make_caches(padding=[1, 0, 2])), "x must have the 3 rows that the padding"),
        (lambda r, a, p, x: p.encode(mx.zeros((1, 32, I))), "source must be at most max_len, 31 positions, got 32"),
        (lambda r, a, p, x: p.decode(x, x), "memory must be (batch, length, 18) of floats, got mlx.core.float32"),
        (lambda r, a, p, x: p(x, x[:1]), "source must have the batch size of x, 1, got 2"),
        (lambda r, a, p, x: p.conditioned(x), "conditioned() needs a vocabulary, got vocab_size None"),
    ],
)
def test_calls_that_are_refused(call, message):
    models = [kind(config()) for kind in KINDS]
    with pytest.raises(ValueError, match=re.escape(message)):
        call(*models, array(noise(2, L, I)))


def test_tokens_outside_the_vocabulary():
    """MLX reads beyond the table without a word."""
    model, _ = made(AutoregressiveTransformerModel, vocab_size=V)
    with pytest.raises(ValueError, match="x must be from 0 to 22, got 23"):
        model(mx.array([[1, V]]))
    model, _ = made(EncoderDecoder, vocab_size=V)
    with pytest.raises(ValueError, match="target must be from 0 to 22, got -1"):
        model(array(noise(1, S, I)), mx.array([[1, -1]]))


def test_a_cache_does_not_lead_beyond_the_positions():
    model, _ = made(AutoregressiveTransformerModel, max_len=L)
    caches = model.make_caches()
    model(array(noise(1, L, I)), caches=caches)
    with pytest.raises(ValueError, match="x must be at most max_len, 11 positions, got 12"):
        model(array(noise(1, 1, I)), caches=caches)
    assert [cache.length for cache in caches] == [L, L]
    ragged = model.make_caches(padding=[2, 1])
    model(array(noise(2, L, I)), caches=ragged)  # of which no row has more than L - 1
    model(array(noise(2, 1, I)), caches=ragged)


def test_a_new_source_is_a_new_memory():
    """T1.6: keys and values of the source before were taken for the next one's."""
    model, _ = made(EncoderDecoder)
    cross = [CrossCache() for _ in model.decoder.layers]
    for seed in (1, 2):
        memory = model.encode(array(noise(1, S, I, seed=seed)))
        x = array(noise(1, L, I, seed=seed + 2))
        out = model.decode(x, memory, caches=model.make_caches(), cross_caches=cross)
        assert mx.allclose(out, model.decode(x, memory), rtol=0, atol=1e-5)


def test_decodings_side_by_side_share_a_model():
    """S1-22: nothing of a decoding is in the module."""
    model, _ = made(AutoregressiveTransformerModel)
    xs = [array(noise(1, L, I, seed=seed)) for seed in range(3)]
    caches = [model.make_caches() for _ in xs]
    parts = [[] for _ in xs]
    for t in range(L):
        for own, x, found in zip(caches, xs, parts, strict=True):
            found.append(model(x[:, t : t + 1], caches=own))
    for x, found in zip(xs, parts, strict=True):
        assert mx.allclose(mx.concatenate(found, axis=1), model(x), rtol=0, atol=1e-5)


def test_checkpoints_that_name_num_groups_are_read():
    own = SequenceCheckpoint("regression", config("gqa", num_kv_heads=3))
    written = own.to_dict()
    written["num_groups"] = written.pop("num_kv_heads")
    assert SequenceCheckpoint.from_dict(written) == own and own.to_dict()["num_kv_heads"] == 3
