"""T5 against transformers: the memory, logits, gradients, what is answered; the folder that it saves, and the one that
leads back, read by it."""

import json

import mlx.core as mx
import numpy as np
import pytest
from support.harness import assert_within_budget, same_tensors
from support.models import same_gradients
from support.oracle import Oracle

from mlx_xformer import generate
from mlx_xformer.converters.conversion import convert
from mlx_xformer.converters.families import t5 as names
from mlx_xformer.converters.formats.source import read_source
from mlx_xformer.models.families import load_model
from mlx_xformer.models.t5 import T5

pytestmark = pytest.mark.torch

SIZES = {
    "vocab_size": 31,
    "d_model": 22,
    "d_kv": 5,
    "d_ff": 29,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 3,
}
MODELS = {
    "1.0": {"feed_forward_proj": "relu"},
    "1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "near": {
        "feed_forward_proj": "gated-silu",
        "relative_attention_num_buckets": 6,
        "relative_attention_max_distance": 7,
    },
}
RNG = np.random.default_rng(0)
SOURCE, TOKENS = RNG.integers(2, 31, (3, 41)), RNG.integers(2, 31, (3, 13))
TOKENS[:, 0] = 0
MASK = np.arange(41)[None] < np.array([41, 17, 1])[:, None]
MEMORY, LOGITS = RNG.normal(size=(3, 41, 22)) * MASK[..., None], RNG.normal(size=(3, 13, 31))
GIVEN = {"input_ids": SOURCE, "attention_mask": MASK.astype(int)}


@pytest.fixture(scope="module")
def oracle():
    with Oracle() as oracle:
        yield oracle


@pytest.fixture(scope="module", params=MODELS)
def converted(request, oracle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    values = {"model_type": "t5", **SIZES, **MODELS[request.param]}
    made = {"model": "T5ForConditionalGeneration", "values": values, "folder": str(folder / "hf"), "seed": 1}
    oracle.call("network_make", **made, untie=request.param == "1.1")
    convert(folder / "hf", folder / "mlx")
    model = load_model(folder / "mlx")
    assert isinstance(model, T5) and model.config.tie_embeddings == (request.param != "1.1")
    assert model.config.scale_logits == (request.param != "1.1") and model.config.gated == (request.param != "1.0")
    return folder, model


def run(oracle, folder):
    arrays = {**GIVEN, "decoder_input_ids": TOKENS, "encoder_last_hidden_state": MEMORY, "logits": LOGITS}
    keep = ["encoder_last_hidden_state", "logits"]
    told = {"model": "T5ForConditionalGeneration", "folder": str(folder), "outputs": keep}
    return oracle.call("network_run", arrays, **told).groups


def test_forward_gradient_and_back(oracle, converted):
    folder, model = converted
    theirs = run(oracle, folder / "hf")
    memory = model.encode(mx.array(SOURCE), mask=mx.array(MASK))
    truth, single = (theirs["encoder_last_hidden_state"][word] for word in ("float64", "float32"))
    assert_within_budget(np.array(memory)[MASK], truth[MASK], single[MASK], "memory")
    truth, single = (theirs["logits"][word] for word in ("float64", "float32"))
    logits = model(mx.array(SOURCE), mx.array(TOKENS), mask=mx.array(MASK))
    assert_within_budget(logits, truth, single, "logits")
    answer, parts = model.conditioned(mx.array(SOURCE), mask=mx.array(MASK)), []
    caches = answer.make_caches()
    for a, b in ((0, 5), (5, 6), (6, 7), (7, 13)):
        parts.append(answer(mx.array(TOKENS[:, a:b]), caches=caches))
    assert_within_budget(mx.concatenate(parts, axis=1), truth, single, "cached")

    def loss():
        u, v = (mx.array(x.astype(np.float32)) for x in (MEMORY, LOGITS))
        memory = model.encode(mx.array(SOURCE), mask=mx.array(MASK))
        logits = model.decode(mx.array(TOKENS), memory, memory_mask=mx.array(MASK))
        return (memory * u).sum() + (logits * v).sum()

    same_gradients(names, model, loss, theirs["grad"])

    convert(folder / "mlx", folder / "back", to="pytorch")
    same_tensors(*(read_source(folder / side / "model.safetensors").tensors for side in ("back", "hf")))
    again = run(oracle, folder / "back")
    assert (again["logits"]["float64"] == theirs["logits"]["float64"]).all()


def test_what_it_answers(oracle, converted):
    """Token by token, with caches, as transformers does without."""
    folder, model = converted
    theirs = oracle.call("network_answer", GIVEN, folder=str(folder / "hf"), count=30)["tokens"]
    assert theirs.shape == (3, 31) and (theirs[:, 0] == 0).all() and len(set(theirs[0].tolist())) > 3
    for row, (source, mask) in enumerate(zip(SOURCE, MASK, strict=True)):
        answer = model.conditioned(mx.array(source[None]), mask=mx.array(mask[None]))
        # transformers may not end here, and so forbids the token that ends a text
        told = generate(answer, [0], max_tokens=30, sampler=lambda logits, _: _but_the_end(logits).argmax(axis=-1))
        assert [token.id for token in told] == theirs[row, 1:].tolist()


def _but_the_end(logits):
    return mx.where(mx.arange(logits.shape[-1]) == 1, -mx.inf, logits)


@pytest.mark.parametrize("values", [{}, {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}])
def test_absent_keys(oracle, tmp_path, values):
    """A config.json with nothing but a type means what transformers writes of it in full."""
    values = {"model_type": "t5", "vocab_size": 31, "num_layers": 1, **values}
    made = {"model": "T5ForConditionalGeneration", "values": values, "folder": str(tmp_path / "hf"), "seed": 2}
    oracle.call("network_make", **made, untie=False)
    full = json.loads((tmp_path / "hf/config.json").read_text())
    assert full.keys() >= {"d_kv", "scale_decoder_outputs", "relative_attention_max_distance", "dense_act_fn"}
    assert names.config(values, {}) == names.config(full, {})
