"""BERT against transformers: hidden states, the pooler, gradients; the folder that it saves, and the one that leads
back, read by it."""

import json

import mlx.core as mx
import numpy as np
import pytest
from support.harness import assert_within_budget, same_tensors
from support.models import BERT_MASK as MASK
from support.models import BERT_VALUES as VALUES
from support.models import same_gradients
from support.oracle import Oracle

from mlx_xformer.converters.conversion import convert
from mlx_xformer.converters.families import bert as names
from mlx_xformer.converters.formats.source import read_source
from mlx_xformer.models.bert import Bert
from mlx_xformer.models.families import load_model

pytestmark = pytest.mark.torch

RNG = np.random.default_rng(0)
TOKENS, KINDS = RNG.integers(1, 31, (3, 11)), RNG.integers(0, 2, (3, 11))  # torch trains no vector of token 0
HIDDEN, POOLED = RNG.normal(size=(3, 11, 21)) * MASK[..., None], RNG.normal(size=(3, 21))
GIVEN = {"input_ids": TOKENS, "attention_mask": MASK.astype(int), "token_type_ids": KINDS}


@pytest.fixture(scope="module")
def oracle():
    with Oracle() as oracle:
        yield oracle


def run(oracle, folder):
    arrays = {**GIVEN, "last_hidden_state": HIDDEN, "pooler_output": POOLED}
    keep = ["last_hidden_state", "pooler_output"]
    return oracle.call("network_run", arrays, model="BertModel", folder=str(folder), outputs=keep).groups


@pytest.mark.parametrize("values", [{}, {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "type_vocab_size": 3}])
def test_bert(oracle, tmp_path, values):
    folder = str(tmp_path / "hf")
    made = {"model": "BertModel", "values": {**VALUES, **values}, "folder": folder, "seed": 1, "untie": False}
    oracle.call("network_make", **made)
    theirs = run(oracle, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "mlx")
    model = load_model(tmp_path / "mlx")
    assert isinstance(model, Bert)
    hidden = model(mx.array(TOKENS), mask=mx.array(MASK), token_types=mx.array(KINDS))
    outputs = {"last_hidden_state": np.array(hidden) * MASK[..., None], "pooler_output": model.pool(hidden)}
    for name, ours in outputs.items():
        valid = MASK[..., None] if name == "last_hidden_state" else 1
        assert_within_budget(ours, theirs[name]["float64"] * valid, theirs[name]["float32"] * np.float32(valid), name)

    def loss():
        hidden = model(mx.array(TOKENS), mask=mx.array(MASK), token_types=mx.array(KINDS))
        u, v = (mx.array(x.astype(np.float32)) for x in (HIDDEN, POOLED))
        return (hidden * u).sum() + (model.pool(hidden) * v).sum()

    same_gradients(names, model, loss, theirs["grad"])

    convert(tmp_path / "mlx", tmp_path / "back", to="pytorch")
    same_tensors(*(read_source(tmp_path / side / "model.safetensors").tensors for side in ("back", "hf")))
    again = run(oracle, tmp_path / "back")
    assert (again["last_hidden_state"]["float64"] == theirs["last_hidden_state"]["float64"]).all()


def test_absent_keys(oracle, tmp_path):
    """A config.json with nothing but a type means what transformers writes of it in full."""
    values = {"model_type": "bert", "vocab_size": 31, "num_hidden_layers": 1}
    made = {"model": "BertModel", "values": values, "folder": str(tmp_path / "hf"), "seed": 2, "untie": False}
    oracle.call("network_make", **made)
    full = json.loads((tmp_path / "hf/config.json").read_text())
    assert full.keys() >= {"hidden_size", "layer_norm_eps", "type_vocab_size"}
    assert names.config(values, {}) == names.config(full, {})


def test_a_model_around_it(oracle, tmp_path):
    """BertForMaskedLM: its encoder alone, the head dropped on purpose."""
    folder = str(tmp_path / "hf")
    made = {"model": "BertForMaskedLM", "values": VALUES, "folder": folder, "seed": 3, "untie": False}
    oracle.call("network_make", **made)
    report = convert(tmp_path / "hf", tmp_path / "mlx")
    dropped = {name for row in report.rows if not row.targets for name in row.sources}
    assert dropped and all(name.startswith("cls.predictions.") for name in dropped)
    assert load_model(tmp_path / "mlx").config.pooler is False
