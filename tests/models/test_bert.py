"""BERT against its twin; padding, segments, refusals; its names in a conversion; vectors of sentences."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.harness import assert_within_budget, check_gradient, check_module, draw, same_tensors
from support.models import BERT_MASK as MASK
from support.models import BERT_VALUES as VALUES
from support.models import BERT_WORDS as WORDS
from support.models import bert_tokenizer as tokenizer
from support.models import sentence_modules as modules
from support.models import write_bert as write_original

from mlx_xformer import load, parity
from mlx_xformer.converters.conversion import convert
from mlx_xformer.converters.families import bert as names
from mlx_xformer.converters.formats.source import read_source
from mlx_xformer.models.bert import Bert, BertConfig, normalize, pool_mean
from mlx_xformer.models.families import load_model
from mlx_xformer.reference.models import bert as twin
from mlx_xformer.storage.checkpoint import read_checkpoint
from mlx_xformer.text.sentences import SentenceEncoder

CONFIG = BertConfig(
    vocab_size=31, embed_dim=21, num_layers=2, num_heads=3, hidden_dim=29, max_positions=17, num_token_types=2
)


RNG = np.random.default_rng(0)


TOKENS, KINDS = RNG.integers(0, 31, (3, 11)), RNG.integers(0, 2, (3, 11))


def changed(**changes) -> BertConfig:
    return BertConfig.from_dict(CONFIG.to_dict() | changes)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_forward_and_gradient(activation):
    model = Bert(changed(activation=activation, norm_eps=0.01))
    model.__class__ = type("Called", (Bert,), {"__call__": _called})

    def of(params, *_):
        hidden = twin.bert(params, model.config, TOKENS, mask=MASK, token_types=KINDS)
        return np.concatenate([(hidden * MASK[..., None]).reshape(3, -1), twin.pool(params, hidden)], axis=1)

    check_module(model, of)


def _called(self):
    """All that a BERT gives, at what is valid, (B, L E + E)."""
    hidden = Bert.__call__(self, mx.array(TOKENS), mask=mx.array(MASK), token_types=mx.array(KINDS))
    kept = hidden * mx.array(MASK)[..., None]
    return mx.concatenate([mx.flatten(kept, 1), self.pool(hidden)], axis=1)


def test_padding_changes_nothing():
    """A text alone, and beside longer ones with anything as padding."""
    model = Bert(CONFIG)
    draw(model, 1)
    other = np.where(MASK, TOKENS, 30 - TOKENS)
    first, second = (np.array(model(mx.array(t), mask=mx.array(MASK))) for t in (TOKENS, other))
    for row, count in enumerate((11, 7, 1)):
        alone = np.array(model(mx.array(TOKENS[row : row + 1, :count])))[0]
        assert np.abs(first[row, :count] - alone).max() < 1e-5
        assert np.abs(first[row, :count] - second[row, :count]).max() == 0


def test_sides_segments_and_places_count():
    """It sees both sides, and which segment and place a token has."""
    model = Bert(CONFIG)
    draw(model, 1)
    base = np.array(model(mx.array(TOKENS)))
    later = TOKENS.copy()
    later[:, -1] = (later[:, -1] + 1) % 31
    assert np.abs(np.array(model(mx.array(later)))[:, 0] - base[:, 0]).max(axis=-1).min() > 1e-3
    kinds = np.array(model(mx.array(TOKENS), token_types=mx.array(np.ones_like(TOKENS))))
    assert np.abs(kinds - base).max() > 1e-2
    assert (np.array(model(mx.array(TOKENS), token_types=mx.zeros((3, 11), mx.int32))) == base).all()
    turned = np.array(model(mx.array(TOKENS[:, ::-1].copy())))[:, ::-1]
    assert np.abs(turned - base).max() > 1e-2


def test_it_compiles_and_trains():
    model = Bert(CONFIG)
    draw(model, 1)
    expected = model(mx.array(TOKENS), mask=mx.array(MASK))
    compiled = mx.compile(lambda tokens, mask: model(tokens, mask=mask))
    assert mx.abs(compiled(mx.array(TOKENS), mx.array(MASK)) - expected).max().item() < 1e-5
    model.train()
    assert mx.abs(model(mx.array(TOKENS), mask=mx.array(MASK)) - expected).max().item() == 0


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"tokens": np.zeros((2, 18), int)}, "tokens must be at most 17 a text, got 18"),
        ({"tokens": np.full((2, 3), 31)}, "tokens must be from 0 to 30, got 31"),
        ({"tokens": np.array([[4, -1]])}, "tokens must be from 0 to 30, got -1"),
        ({"tokens": np.zeros(3, int)}, r"tokens must be \(batch, length\) whole numbers, got shape \(3,\)"),
        (
            {"tokens": np.zeros((2, 3), np.float32)},
            r"tokens must be \(batch, length\) whole numbers, .* mlx.core.float32",
        ),
        ({"token_types": np.full((3, 11), 2)}, "token_types must be from 0 to 1, got 2"),
        ({"token_types": KINDS[:, :5]}, r"token_types must have the shape of tokens, \(3, 11\), got \(3, 5\)"),
        ({"mask": MASK[:2]}, r"mask must be boolean \(True = valid\) of shape \(3, 11\), got mlx.core.bool \(2, 11\)"),
        ({"mask": MASK.astype(np.int32)}, r"mask must be boolean .* got mlx.core.int32"),
    ],
)
def test_inputs_that_are_refused(given, reason):
    given = {name: mx.array(value) for name, value in ({"tokens": TOKENS} | given).items()}
    with pytest.raises(ValueError, match=reason):
        Bert(CONFIG)(given.pop("tokens"), **given)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"colour": 1}, "the BERT has no option named colour"),
        ({"num_heads": 5}, "embed_dim must be a multiple of num_heads, 5, got 21"),
        ({"vocab_size": 0}, "vocab_size must be a whole number from 1 to 100000000, got 0"),
        ({"num_layers": True}, "num_layers must be a whole number"),
        ({"embed_dim": 21.0}, r"embed_dim must be a whole number .* got 21\.0"),
        ({"activation": "cosine"}, "activation must be one of gelu, .* got 'cosine'"),
        ({"norm_eps": 0}, "norm_eps must be a number above 0, got 0"),
        ({"pooler": "yes"}, "pooler must be true or false, got 'yes'"),
    ],
)
def test_configurations_that_are_refused(change, reason):
    with pytest.raises(ValueError, match=reason):
        changed(**change)
    with pytest.raises(ValueError, match="the BERT must be given embed_dim, num_layers, num_heads, hidden_dim"):
        BertConfig.from_dict({"vocab_size": 3})
    with pytest.raises(ValueError, match="a BERT with a pooler, got one without"):
        Bert(changed(pooler=False)).pool(mx.zeros((1, 2, 21)))


def test_pooling():
    """Against the twin, forward and gradient; what is hidden has no part in it, be it NaN."""
    x = RNG.normal(size=(3, 11, 5))
    valid = mx.array(MASK)
    check_gradient(lambda x: normalize(pool_mean(x, valid)), lambda x: twin.normalize(twin.pool_mean(x, MASK)), x)
    single = twin.normalize(twin.pool_mean(x.astype(np.float32), MASK))
    truth = twin.normalize(twin.pool_mean(x.astype(np.float32).astype(np.float64), MASK))
    assert_within_budget(
        pool_mean(mx.array(x.astype(np.float32)), valid),
        twin.pool_mean(x.astype(np.float32).astype(np.float64), MASK),
        twin.pool_mean(x.astype(np.float32), MASK),
    )
    x[~MASK] = np.nan
    assert_within_budget(normalize(pool_mean(mx.array(x.astype(np.float32)), valid)), truth, single)
    assert (np.array(normalize(pool_mean(mx.ones((1, 3, 5)), mx.zeros((1, 3), mx.bool_)))) == 0).all()
    with pytest.raises(ValueError, match=r"mask must be boolean .* shape \(3, 11\), got mlx.core.bool \(11,\)"):
        pool_mean(mx.zeros((3, 11, 5)), mx.zeros((11,), mx.bool_))


HEADS = (
    ("cls.predictions.bias", (31,)),
    ("cls.predictions.transform.LayerNorm.gamma", (21,)),
    ("cls.predictions.decoder.weight", (31, 21)),
    ("cls.seq_relationship.bias", (2,)),
)


@pytest.mark.parametrize("pooler", [True, False])
@pytest.mark.parametrize(("prefix", "old", "extra"), [("", False, ()), ("bert.", False, HEADS), ("bert.", True, HEADS)])
def test_there_and_back(tmp_path, prefix, old, extra, pooler):
    """Under every naming; what comes back has BertModel's own names, and gives the same checkpoint."""
    extra = (*extra, (prefix + "embeddings.position_ids", (1, 17)))
    state = write_original(tmp_path / "hf", prefix=prefix, old=old, pooler=pooler, extra=extra)
    report = convert(tmp_path / "hf", tmp_path / "mlx")
    assert report.family == "bert" and "(model_type bert)" in str(report)
    assert {name for row in report.rows if not row.targets for name in row.sources} == {name for name, _ in extra}
    model = load_model(tmp_path / "mlx")
    assert model.config == changed(pooler=pooler)
    convert(tmp_path / "mlx", tmp_path / "back", to="pytorch")
    back = read_source(tmp_path / "back/model.safetensors").tensors
    kept = {name.removeprefix(prefix): mx.array(x) for name, x in state.items() if name not in dict(extra)}
    words = {"gamma": "weight", "beta": "bias"}
    kept = {".".join(words.get(word, word) for word in name.split(".")): x for name, x in kept.items()}
    same_tensors(back, kept)
    assert json.loads((tmp_path / "back/config.json").read_text()) == VALUES
    convert(tmp_path / "back", tmp_path / "again")
    assert read_checkpoint(tmp_path / "again").config == read_checkpoint(tmp_path / "mlx").config


def test_another_configuration_leads_to_another_config(tmp_path):
    """The config.json of a checkpoint that was edited is written anew; so is that of a file."""
    write_original(tmp_path / "hf", pad_token_id=0)
    convert(tmp_path / "hf", tmp_path / "mlx")
    path = tmp_path / "mlx/config.json"
    path.write_text(path.read_text().replace('"activation": "gelu"', '"activation": "gelu_tanh"'))
    convert(tmp_path / "mlx", tmp_path / "back", to="pytorch")
    values = json.loads((tmp_path / "back/config.json").read_text())
    assert values["hidden_act"] == "gelu_new" and "pad_token_id" not in values
    assert names.config(values, {"pooler.dense.weight": None}) == changed(activation="gelu_tanh")
    convert(tmp_path / "hf/model.safetensors", tmp_path / "file", settings={"num_heads": 3})
    convert(tmp_path / "file", tmp_path / "of file", to="pytorch")
    values = json.loads((tmp_path / "of file/config.json").read_text())
    assert names.config(values, {"pooler.dense.weight": None}) == CONFIG


def test_each_tensor_has_its_place(tmp_path):
    """By the twin, on the original's own names: PyTorch's BertModel, written out once more."""
    state = {name: x.astype(np.float64) for name, x in write_original(tmp_path / "hf").items()}
    convert(tmp_path / "hf", tmp_path / "mlx")
    own = {name: np.array(x, np.float64) for name, x in read_checkpoint(tmp_path / "mlx").weights.items()}
    layer = "encoder.layer.1."
    pairs = {
        "attention.self.query": "self_attn.q_proj",
        "attention.self.key": "self_attn.k_proj",
        "attention.self.value": "self_attn.v_proj",
        "attention.output.dense": "self_attn.out_proj",
        "attention.output.LayerNorm": "norm1",
        "intermediate.dense": "mlp.linear1",
        "output.dense": "mlp.linear2",
        "output.LayerNorm": "norm3",
    }
    for theirs, ours in pairs.items():
        for leaf in ("weight", "bias"):
            assert (state[f"{layer}{theirs}.{leaf}"] == own[f"encoder.layers.1.{ours}.{leaf}"]).all(), theirs


def test_a_file_of_tensors(tmp_path):
    """Its names and shapes tell the kind and the sizes; the heads must be set."""
    write_original(tmp_path / "hf", prefix="bert.")
    file = tmp_path / "hf/model.safetensors"
    with pytest.raises(ValueError, match="the shapes do not tell num_heads: it must be set"):
        convert(file, tmp_path / "mlx")
    with pytest.raises(ValueError, match="settings must be among num_heads, activation, norm_eps, got colour"):
        convert(file, tmp_path / "mlx", settings={"num_heads": 3, "colour": 1})
    report = convert(file, tmp_path / "mlx", settings={"num_heads": 3})
    assert "(it has bert.embeddings.word_embeddings.weight and bert.encoder.layer.0" in str(report)
    assert load_model(tmp_path / "mlx").config == CONFIG
    assert names.detect({"embeddings.word_embeddings.weight": mx.zeros((3, 3))}) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rotary": 1, "alpha": 2}, "config.json has keys that are not handled: alpha, rotary"),
        ({"position_embedding_type": "relative_key"}, 'position_embedding_type must be "absolute", got relative_key'),
        ({"is_decoder": True}, "is_decoder must be false, got True"),
        ({"hidden_act": "mish"}, "hidden_act must be one of gelu, .* got mish"),
        ({"num_attention_heads": 4}, "embed_dim must be a multiple of num_heads, 4, got 21"),
        ({"hidden_size": "wide"}, "embed_dim must be a whole number from 1"),
        ({"num_hidden_layers": 3}, "16 missing"),
        ({"intermediate_size": 30}, "6 misshapen"),
    ],
)
def test_folders_that_are_refused(tmp_path, change, reason):
    write_original(tmp_path / "hf")
    (tmp_path / "hf/config.json").write_text(json.dumps(VALUES | change))
    with pytest.raises(ValueError, match=reason) as error:
        convert(tmp_path / "hf", tmp_path / "mlx")
    assert str(error.value).startswith(str(tmp_path / "hf")) and not (tmp_path / "mlx").exists()


def test_keys_that_make_no_difference(tmp_path):
    more = {"hidden_dropout_prob": 0.1, "gradient_checkpointing": False, "use_cache": True, "pad_token_id": 0}
    assert names.config({**VALUES, **more}, {"pooler.dense.weight": None}) == CONFIG
    defaults = names.config({"model_type": "bert"}, {})
    assert (defaults.embed_dim, defaults.num_layers, defaults.norm_eps, defaults.pooler) == (768, 12, 1e-12, False)


def test_parity_of_a_folder(tmp_path):
    write_original(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "mlx")
    report = parity.run(folder=tmp_path / "mlx", seeds=2)
    assert not report.failed, report.table()
    assert {row.name for row in report.rows} >= {"embeddings", "encoder.layers.1", "pooler", "sentences", "model"}


@pytest.fixture
def sentences(tmp_path):
    write_original(tmp_path / "hf")
    tokenizer(tmp_path / "hf")
    return tmp_path / "hf"


TEXTS = ["A cat sleeps", "", "the dog barks the dog barks a cat", "dog"]


def test_sentences(sentences, tmp_path, monkeypatch):
    """From the folder, converted into the cache; each alone gives what all give; the longest are cut."""
    monkeypatch.setenv("MLX_XFORMER_CACHE", str(tmp_path / "cache"))
    modules(sentences)
    encoder, told = SentenceEncoder(sentences), []
    assert encoder.max_length == 6
    vectors = np.array(encoder.encode(TEXTS, batch=3, progress=lambda *now: told.append(now)))
    assert told == [(3, 4), (4, 4)] and vectors.shape == (4, 21)
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-6
    for n, text in enumerate(TEXTS):
        assert np.abs(np.array(encoder.encode([text]))[0] - vectors[n]).max() < 1e-6
        ids = [1, *[WORDS.index(word) for word in text.lower().split()][:4], 2]
        params = {name: np.array(x, np.float64) for name, x in tree_flatten(encoder.model.parameters())}
        hidden = twin.bert(params, encoder.model.config, np.array([ids]))
        truth = twin.normalize(hidden.mean(axis=1))
        assert np.abs(truth[0] - vectors[n]).max() < 1e-5
    assert encoder.encode([]).shape == (0, 21)
    assert isinstance(load(sentences), Bert)
    assert len(list((tmp_path / "cache/converted").iterdir())) == 1


def test_the_example(sentences, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_XFORMER_CACHE", str(tmp_path / "cache"))
    script = Path(__file__).parents[2] / "examples/embed.py"
    shown = subprocess.run([sys.executable, script, sentences, *TEXTS], capture_output=True, text=True, check=True)
    lines = shown.stdout.splitlines()
    assert len(lines) == 5 and all("1.00" in line for line in lines[1:]) and lines[1].endswith("  A cat sleeps")


def test_without_files_of_sentence_transformers(sentences, tmp_path):
    convert(sentences, tmp_path / "mlx")
    encoder = SentenceEncoder(tmp_path / "mlx")
    assert encoder.max_length == 17
    assert np.abs(np.linalg.norm(np.array(encoder.encode(TEXTS)), axis=1) - 1).max() < 1e-6


def test_vectors_are_float32_whatever_the_weights_are(sentences, tmp_path):
    convert(sentences, tmp_path / "mlx")
    encoder = SentenceEncoder(tmp_path / "mlx")
    whole = encoder.encode(TEXTS)
    encoder.model.set_dtype(mx.float16)
    vectors = encoder.encode(TEXTS)
    assert vectors.dtype == mx.float32 and mx.abs(vectors - whole).max().item() < 0.01
    assert mx.abs(mx.linalg.norm(vectors, axis=-1) - 1).max().item() < 1e-6


def test_vectors_that_are_not_normed(sentences, tmp_path):
    modules(sentences, names=("Transformer", "Pooling"))
    convert(sentences, tmp_path / "mlx")
    assert (tmp_path / "mlx/1_Pooling/config.json").is_file()
    lengths = np.linalg.norm(np.array(SentenceEncoder(tmp_path / "mlx").encode(TEXTS)), axis=1)
    assert np.abs(lengths - 1).max() > 0.1
    convert(sentences, tmp_path / "mlx")  # a checkpoint is replaced, with its folder
    convert(tmp_path / "mlx", tmp_path / "back", to="pytorch")
    assert (tmp_path / "back/1_Pooling/config.json").read_text() == (sentences / "1_Pooling/config.json").read_text()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"names": ("Transformer", "Pooling", "Dense")}, "the steps must be Transformer, Pooling or .* Dense"),
        ({"pooling": {"pooling_mode_cls_token": True}}, "pooling_mode_mean_tokens, got pooling_mode_cls_token"),
        ({"pooling": [1]}, "must be a JSON object, got list"),
        ({"texts": {"do_lower_case": True}}, "do_lower_case must be false"),
        ({"texts": {"max_seq_length": "long"}}, "max_seq_length must be a whole number from 1, got 'long'"),
    ],
)
def test_other_vectors_are_refused(sentences, tmp_path, given, reason):
    modules(sentences, **given)
    convert(sentences, tmp_path / "mlx")
    with pytest.raises(ValueError, match=reason) as error:
        SentenceEncoder(tmp_path / "mlx")
    assert "\n" not in str(error.value) and str(tmp_path / "mlx") in str(error.value)


def test_what_is_no_sentence(sentences, tmp_path):
    convert(sentences, tmp_path / "mlx")
    encoder = SentenceEncoder(tmp_path / "mlx")
    with pytest.raises(ValueError, match="sentences must be a sequence of texts, got one text, 'a cat'"):
        encoder.encode("a cat")
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        encoder.encode(["a"], batch=0)
    with pytest.raises(ValueError, match="max_length must be more than the 2 special tokens of every text, got 2"):
        encoder.tokenizer.encode_all(["a"], max_length=2)
    (tmp_path / "mlx/tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        SentenceEncoder(tmp_path / "mlx")
    with pytest.raises(ValueError, match="vectors of sentences need a BERT, got a HTDemucs"):
        SentenceEncoder("htdemucs_mini")
