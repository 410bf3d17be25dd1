"""T5 against its twin; answers through caches; refusals; its names in a conversion."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import save_file
from support.harness import assert_within_budget, check_module, draw, same_tensors
from support.models import drawn_as

from mlx_xformer import generate, load, parity
from mlx_xformer.converters.conversion import convert
from mlx_xformer.converters.families import t5 as names
from mlx_xformer.converters.formats.source import read_source
from mlx_xformer.converters.rules import inverse_shapes
from mlx_xformer.models.families import load_model, parameter_shapes
from mlx_xformer.models.t5 import T5, T5Config
from mlx_xformer.reference.models import t5 as twin
from mlx_xformer.storage.checkpoint import read_checkpoint

CONFIG = T5Config(
    vocab_size=31,
    embed_dim=22,
    num_layers=2,
    num_heads=3,
    head_dim=5,
    hidden_dim=29,
    num_decoder_layers=3,
    norm_eps=0.01,
)
NEWER = {"gated": True, "activation": "gelu_tanh", "tie_embeddings": False, "scale_logits": False}
NEAR = {"num_buckets": 6, "max_distance": 7}
RNG = np.random.default_rng(0)
SOURCE, TOKENS = RNG.integers(0, 31, (3, 17)), RNG.integers(0, 31, (3, 11))
MASK = np.arange(17)[None] < np.array([17, 7, 1])[:, None]
VALUES = {
    "model_type": "t5",
    **{
        "vocab_size": 31,
        "d_model": 22,
        "num_layers": 2,
        "num_decoder_layers": 3,
        "num_heads": 3,
        "d_kv": 5,
        "d_ff": 29,
    },
    **{"layer_norm_epsilon": 0.01, "dropout_rate": 0.0, "feed_forward_proj": "relu"},
}


def changed(**changes) -> T5Config:
    return T5Config.from_dict(CONFIG.to_dict() | changes)


def drawn(seed=1, **changes) -> T5:
    """A T5 of drawn weights, that has something to say."""
    model = T5(changed(**changes))
    params = draw(model, seed)
    params["shared.weight"] *= 3
    model.load_weights([(n, mx.array(x.astype(np.float32))) for n, x in params.items()])
    model.eval()
    return model


@pytest.mark.parametrize("changes", [{}, NEWER, NEAR])
def test_forward_and_gradient(changes):
    model = T5(changed(**changes))
    model.__class__ = type("Called", (T5,), {"__call__": _called})
    check_module(model, lambda params: twin.t5(params, model.config, SOURCE, TOKENS, mask=MASK))


def _called(self):
    return T5.__call__(self, mx.array(SOURCE), mx.array(TOKENS), mask=mx.array(MASK))


@pytest.mark.parametrize("changes", [{}, NEWER, NEAR])
@pytest.mark.parametrize("chunks", [(11,), (1,) * 11, (4, 1, 5, 1), (2, 9)])
def test_cached_equals_uncached(changes, chunks):
    """Teacher-forced, over a ragged batch of texts; the memory is projected once."""
    model = drawn(**changes)
    params = {name: np.array(x) for name, x in tree_flatten(model.parameters())}
    wide = {name: x.astype(np.float64) for name, x in params.items()}
    truth, single = (twin.t5(p, model.config, SOURCE, TOKENS, mask=MASK) for p in (wide, params))
    answer, parts, at = model.conditioned(mx.array(SOURCE), mask=mx.array(MASK)), [], 0
    caches = answer.make_caches()
    held = None
    for n in chunks:
        parts.append(answer(mx.array(TOKENS[:, at : at + n]), caches=caches))
        at += n
        arrays = [id(array) for cache in caches[0].memory.caches for array in cache.arrays]
        assert held in (None, arrays) and len(arrays) == 6
        held = arrays
    assert_within_budget(mx.concatenate(parts, axis=1), truth, single)
    assert [cache.length for cache in caches] == [11] * 3


def test_caches_with_a_window():
    """As wide as all there is it changes nothing; a narrow one hides what is far, and keeps the distances."""
    model = drawn(**NEAR)
    answer = model.conditioned(mx.array(SOURCE), mask=mx.array(MASK))
    whole = np.array(answer(mx.array(TOKENS), caches=answer.make_caches()))
    for window in (11, 3):
        caches, parts = answer.make_caches(window=window), []
        for at in range(11):
            parts.append(np.array(answer(mx.array(TOKENS[:, at : at + 1]), caches=caches)))
        stepped = np.concatenate(parts, axis=1)
        assert np.abs(stepped - whole)[:, :window].max() < 1e-4
        assert (np.abs(stepped - whole).max() < 1e-4) == (window == 11)
    wide = answer.make_caches(window=7, keep=2)
    with pytest.raises(ValueError, match="a KVCache needs keep 0 for masks and biases that differ by key, got 2"):
        answer(mx.array(TOKENS), caches=wide)


def test_look_ahead():
    """A later token changes nothing before it, bit for bit; a later one of the text changes all."""
    model = drawn()
    base = np.array(model(mx.array(SOURCE), mx.array(TOKENS)))
    for t in (1, 6, 10):
        other = TOKENS.copy()
        other[:, t:] = (other[:, t:] + 7) % 31
        assert (np.array(model(mx.array(SOURCE), mx.array(other)))[:, :t] == base[:, :t]).all()
    source = SOURCE.copy()
    source[:, -1] = (source[:, -1] + 7) % 31
    assert np.abs(np.array(model(mx.array(source), mx.array(TOKENS))) - base).max(axis=-1).min() > 1e-4


def test_padding_of_the_text_changes_nothing():
    model = drawn()
    other = np.where(MASK, SOURCE, 30 - SOURCE)
    first, second = (np.array(model(mx.array(s), mx.array(TOKENS), mask=mx.array(MASK))) for s in (SOURCE, other))
    assert (first == second).all()
    for row, count in enumerate((17, 7, 1)):
        alone = np.array(model(mx.array(SOURCE[row : row + 1, :count]), mx.array(TOKENS[row : row + 1])))
        assert np.abs(alone[0] - first[row]).max() < 1e-4


@pytest.mark.parametrize("changes", [{}, NEWER])
def test_it_answers(changes):
    """generate() gives what the most likely next token of the whole gives, whatever the chunks."""
    model = drawn(**changes)
    source = mx.array(SOURCE[:1])
    tokens = [0, 5, 3]
    for _ in range(20):
        tokens.append(int(model(source, mx.array([tokens]))[0, -1].argmax().item()))
    for prefill in (1, 512):
        told = generate(model.conditioned(source), [0, 5, 3], max_tokens=20, prefill=prefill)
        assert [token.id for token in told] == tokens[3:]
    assert len(set(tokens)) > 4
    with pytest.raises(ValueError, match="prompt must hold tokens from 0 to 30, got 31"):
        list(generate(model.conditioned(source), [31]))


def test_dropout():
    """In training, by a key; without one it is refused."""
    model = drawn(dropout=0.3)
    base, given = model(mx.array(SOURCE), mx.array(TOKENS)), (mx.array(SOURCE), mx.array(TOKENS))
    model.train()
    one, same, other = (model(*given, key=mx.random.key(seed)) for seed in (1, 1, 2))
    assert mx.abs(one - same).max().item() == 0
    assert mx.abs(one - other).max().item() > 1e-3 and mx.abs(one - base).max().item() > 1e-3
    with pytest.raises(ValueError, match="dropout in training needs a random key, got none"):
        model(*given)
    model.encoder.stack = Same(model.encoder.stack.config)  # before the layers and behind them
    share = (model.encode(given[0], key=mx.random.key(3)) == 0).mean().item()
    assert share == pytest.approx(1 - 0.7 * 0.7, abs=0.06)


class Same(nn.Module):
    """Layers that do nothing."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    def __call__(self, x, *_, **__):
        return x


def test_it_learns_to_copy():
    """A few steps of training on one batch bring the loss down."""
    model = drawn(dropout=0.1)
    model.train()
    source, targets = mx.array(SOURCE), mx.array(SOURCE[:, :11])
    given = mx.concatenate([mx.zeros((3, 1), mx.int32), targets[:, :-1].astype(mx.int32)], axis=1)

    def loss(key):
        return nn.losses.cross_entropy(model(source, given, key=key), targets, reduction="mean")

    step, adam, losses = nn.value_and_grad(model, loss), optimizers.Adam(0.01), []
    for seed in range(60):
        value, grads = step(mx.random.key(seed))
        adam.update(model, grads)
        mx.eval(model.parameters(), adam.state)
        losses.append(value.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda m: m(mx.array(SOURCE + 14), mx.array(TOKENS)), "source must be from 0 to 30, got 4[0-9]"),
        (lambda m: m(mx.array(SOURCE), mx.array(TOKENS - 31)), "tokens must be from 0 to 30, got -[0-9]+"),
        (lambda m: m(mx.array(SOURCE[0]), mx.array(TOKENS)), r"source must be \(batch, length\) .* got shape \(17,\)"),
        (lambda m: m(mx.array(SOURCE), mx.array(TOKENS[:2])), r"memory must be \(2, S, 22\), .* got \(3, 17, 22\)"),
        (lambda m: m(mx.array(SOURCE), mx.array(TOKENS), mask=mx.array(MASK[:, :3])), "mask must be boolean .* 17"),
        (lambda m: m.decode(mx.array(TOKENS), mx.zeros((3, 5, 21))), r"memory must be \(3, S, 22\), .*\(3, 5, 21\)"),
        (lambda m: m.decode(mx.array(TOKENS[0]), mx.zeros((3, 5, 22))), r"tokens must be \(batch, length\)"),
        (lambda m: m.decode(mx.zeros((3, 4)), mx.zeros((3, 5, 22))), r"tokens must be .* whole numbers, got .*float32"),
        (lambda m: m.decode(mx.array(TOKENS), mx.zeros((3, 5, 22)), last=-1), "last must be at least 0, got -1"),
        (
            lambda m: m.decode(mx.array(TOKENS), mx.zeros((3, 5, 22)), memory_mask=mx.array(MASK)),
            r"memory_mask must be boolean \(True = valid\) of shape \(3, 5\), got mlx.core.bool \(3, 17\)",
        ),
        (
            lambda m: m.decode(mx.array(TOKENS), mx.zeros((3, 5, 22)), caches=m.make_caches()[:2]),
            "caches must be one a layer, 3, got 2",
        ),
    ],
)
def test_inputs_that_are_refused(call, reason):
    with pytest.raises(ValueError, match=reason):
        call(T5(CONFIG))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"colour": 1}, "the T5 has no option named colour"),
        ({"num_heads": 0}, "num_heads must be a whole number from 1 to 100000, got 0"),
        ({"num_decoder_layers": 0}, "num_decoder_layers must be a whole number from 1 to 1000, got 0"),
        ({"hidden_dim": 2.5}, r"hidden_dim must be a whole number .* got 2\.5"),
        ({"gated": 1}, "gated must be true or false, got 1"),
        ({"gated": True}, "activation must be one of silu, gelu_tanh, got 'relu'"),
        ({"activation": "cosine"}, "activation must be one of gelu, .* got 'cosine'"),
        ({"num_buckets": 5}, "num_buckets must be at least 4, and even if bidirectional, got 5"),
        ({"max_distance": 8}, "max_distance must be above 8, got 8"),
        ({"dropout": 1.0}, r"dropout must be a number from 0 to below 1, got 1\.0"),
        ({"norm_eps": None}, "norm_eps must be a number above 0, got None"),
        ({"norm_eps": 0.0}, "norm_eps must be a number above 0, got 0.0"),
        ({"start_token": 31}, "start_token must be from 0 to 30, got 31"),
    ],
)
def test_configurations_that_are_refused(change, reason):
    with pytest.raises(ValueError, match=reason):
        changed(**change)
    with pytest.raises(ValueError, match="the T5 must be given num_heads, head_dim, hidden_dim"):
        T5Config.from_dict({"vocab_size": 3, "embed_dim": 2, "num_layers": 1})
    assert changed(num_decoder_layers=None).num_decoder_layers == 2


# Conversions

COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def write_original(folder, *, table="shared.weight", copies=(), unused=False, seed=1, **values):
    """A folder of Hugging Face with drawn weights; returns its tensors."""
    folder.mkdir(parents=True)
    head = values.get("tie_word_embeddings") is False
    config = names.config({**VALUES, **values}, {})
    config = T5Config.from_dict(config.to_dict() | {"tie_embeddings": not head})
    shapes = inverse_shapes(names.rules(config, {table: None}), parameter_shapes("t5", config.to_dict()))
    state = drawn_as(shapes, seed)
    state |= {name: state[table].copy() for name in copies}
    state |= {UNUSED: np.ones((32, 3), np.float32)} if unused else {}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**VALUES, **values}))
    return state


@pytest.mark.parametrize(
    ("values", "given", "changes"),
    [
        ({}, {}, {}),
        ({}, {"copies": COPIES, "unused": True}, {}),
        ({}, {"table": COPIES[1]}, {}),
        ({"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, {"copies": COPIES[:2]}, NEWER),
        ({"feed_forward_proj": "gated-silu"}, {"copies": COPIES[:1]}, {"gated": True, "activation": "silu"}),
        ({"feed_forward_proj": "gelu_new", "scale_decoder_outputs": False}, {},
         {"activation": "gelu_tanh", "scale_logits": False}),
        ({"decoder_start_token_id": 3, "relative_attention_num_buckets": 6, "relative_attention_max_distance": 7}, {},
         {"start_token": 3, **NEAR}),
    ],
)  # fmt: skip
def test_there_and_back(tmp_path, values, given, changes):
    state = write_original(tmp_path / "hf", **given, **values)
    report = convert(tmp_path / "hf", tmp_path / "mlx")
    assert report.family == "t5" and "(model_type t5)" in str(report)
    dropped = {*given.get("copies", ()), *([UNUSED] if given.get("unused") else [])}
    assert {name for row in report.rows if not row.targets for name in row.sources} == dropped
    assert load_model(tmp_path / "mlx").config == changed(**changes)
    convert(tmp_path / "mlx", tmp_path / "back", to="pytorch")
    table = given.get("table", "shared.weight")
    kept = {"shared.weight" if n == table else n: mx.array(x) for n, x in state.items() if n not in dropped}
    same_tensors(read_source(tmp_path / "back/model.safetensors").tensors, kept)
    assert json.loads((tmp_path / "back/config.json").read_text()) == {**VALUES, **values}
    written = names.original(changed(**changes))
    assert names.config(written, read_source(tmp_path / "back/model.safetensors").tensors) == changed(**changes)
    convert(tmp_path / "back", tmp_path / "again")
    assert read_checkpoint(tmp_path / "again").config == read_checkpoint(tmp_path / "mlx").config


def test_each_tensor_has_its_place(tmp_path):
    state = write_original(tmp_path / "hf", feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    convert(tmp_path / "hf", tmp_path / "mlx")
    own = {name: np.array(x) for name, x in read_checkpoint(tmp_path / "mlx").weights.items()}
    theirs, ours = "decoder.block.2.layer.", "decoder.stack.layers.2."
    pairs = {
        **{f"{theirs}0.SelfAttention.{a}.weight": f"{ours}self_attn.{b}_proj.weight" for a, b in LETTERS},
        **{f"{theirs}1.EncDecAttention.{a}.weight": f"{ours}cross_attn.{b}_proj.weight" for a, b in LETTERS},
        **{f"{theirs}{n}.layer_norm.weight": f"{ours}norm{n + 1}.weight" for n in range(3)},
        f"{theirs}2.DenseReluDense.wi_0.weight": f"{ours}mlp.gate_proj.weight",
        f"{theirs}2.DenseReluDense.wi_1.weight": f"{ours}mlp.up_proj.weight",
        f"{theirs}2.DenseReluDense.wo.weight": f"{ours}mlp.down_proj.weight",
        "encoder.block.1.layer.1.layer_norm.weight": "encoder.stack.layers.1.norm3.weight",
        "encoder.final_layer_norm.weight": "encoder.stack.norm.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "encoder.relative.weight",
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "decoder.relative.weight",
        "shared.weight": "shared.weight",
        "lm_head.weight": "lm_head.weight",
    }
    for a, b in pairs.items():
        assert (state[a] == own[b]).all(), a


LETTERS = (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out"))


def test_a_file_of_tensors(tmp_path):
    """Its names and shapes tell the kind and the sizes; the activation must be set."""
    write_original(tmp_path / "hf", feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    file = tmp_path / "hf/model.safetensors"
    with pytest.raises(ValueError, match="the shapes do not tell activation: it must be set"):
        convert(file, tmp_path / "mlx")
    report = convert(file, tmp_path / "mlx", settings={"activation": "gelu_tanh", "norm_eps": 0.01})
    assert "(it has encoder.block.0.layer.0.SelfAttention.q.weight and decoder.block.0" in str(report)
    assert load_model(tmp_path / "mlx").config == changed(**NEWER)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rotary": 1, "alpha": 2}, "config.json has keys that are not handled: alpha, rotary"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder must be true, got False"),
        ({"feed_forward_proj": "gated-mish"}, "feed_forward_proj must be one of gelu, .* got mish"),
        ({"feed_forward_proj": "gated-relu"}, "activation must be one of silu, gelu_tanh, got 'relu'"),
        (
            {"feed_forward_proj": "open-relu"},
            "feed_forward_proj must be an activation, or gated- and one, got open-relu",
        ),
        ({"dense_act_fn": "silu"}, "dense_act_fn must be relu with feed_forward_proj relu, got silu"),
        ({"is_gated_act": True}, "is_gated_act must be False with feed_forward_proj relu, got True"),
        ({"relative_attention_max_distance": 8}, "max_distance must be above 8, got 8"),
        ({"num_layers": 3}, "8 missing"),
        ({"d_ff": 30}, "10 misshapen"),
        ({"d_kv": "wide"}, "head_dim must be a whole number"),
    ],
)
def test_folders_that_are_refused(tmp_path, change, reason):
    write_original(tmp_path / "hf")
    (tmp_path / "hf/config.json").write_text(json.dumps(VALUES | change))
    with pytest.raises(ValueError, match=reason) as error:
        convert(tmp_path / "hf", tmp_path / "mlx")
    assert str(error.value).startswith(str(tmp_path / "hf")) and not (tmp_path / "mlx").exists()


def test_tables_that_differ(tmp_path):
    """A head of its own is kept; another table of the encoder has no place."""
    state = write_original(tmp_path / "hf", copies=COPIES)
    save_file(state | {COPIES[2]: state[COPIES[2]] + 1}, tmp_path / "hf/model.safetensors")
    convert(tmp_path / "hf", tmp_path / "mlx")
    assert load_model(tmp_path / "mlx").config == changed(tie_embeddings=False)
    save_file(state | {COPIES[1]: state[COPIES[1]] + 1}, tmp_path / "hf/model.safetensors")
    with pytest.raises(ValueError, match=r"decoder.embed_tokens.weight must be shared.weight, got other numbers"):
        convert(tmp_path / "hf", tmp_path / "other")


@pytest.mark.parametrize("values", [{}, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}])
def test_parity_of_a_folder(tmp_path, monkeypatch, values):
    monkeypatch.setenv("MLX_XFORMER_CACHE", str(tmp_path / "cache"))
    write_original(tmp_path / "hf", **values)
    assert isinstance(load(tmp_path / "hf"), T5)
    (folder,) = (tmp_path / "cache/converted").iterdir()
    report = parity.run(folder=folder, seeds=2)
    assert not report.failed, report.table()
    expected = {"encoder.relative", "decoder.relative", "decoder.stack.layers.2", "logits", "decoder, cached"}
    assert {row.name for row in report.rows} >= expected
