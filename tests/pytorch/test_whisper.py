"""Whisper against transformers: the folder that it saves, converted; values, gradients, tokens; and spectrograms."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from support.audio import assert_log_mel_like_twin as assert_like_the_twin
from support.audio import speech_noise as noise
from support.harness import assert_within_budget, same_tensors
from support.oracle import Oracle

from mlx_xformer import generate
from mlx_xformer.converters.conversion import convert
from mlx_xformer.converters.families import whisper as names
from mlx_xformer.converters.formats.source import read_source
from mlx_xformer.converters.rules import apply_rules
from mlx_xformer.models.families import load_model, parameter_shapes
from mlx_xformer.nn.mel import SAMPLES, log_mel, mel_filters

pytestmark = pytest.mark.torch

VALUES = {
    **{"vocab_size": 53, "d_model": 22, "num_mel_bins": 7, "encoder_layers": 2, "decoder_layers": 3},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 29, "decoder_ffn_dim": 29},
    **{
        "max_source_positions": 13,
        "max_target_positions": 41,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "decoder_start_token_id": 1,
}
B, L, COUNT = 2, 11, 29
RNG = np.random.default_rng(3)
MEL = RNG.normal(size=(B, 7, 26))
TOKENS = RNG.integers(0, 53, (B, L))
COTANGENT = RNG.normal(size=(B, L, 53))


@pytest.fixture(scope="module")
def oracle():
    with Oracle() as oracle:
        yield oracle


@pytest.fixture(scope="module")
def folder(oracle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper")
    oracle.call("whisper_make", values=VALUES, folder=str(folder / "hf"), seed=1)
    convert(folder / "hf", folder / "mlx")
    return folder


@pytest.fixture(scope="module")
def theirs(oracle, folder):
    arrays = {"mel": MEL, "tokens": TOKENS, "cotangent": COTANGENT}
    answer = oracle.call(
        "whisper_answers", arrays, folder=str(folder / "hf"), dtypes=["float32", "float64"], count=COUNT
    )
    return {f"{group}/{name}".lstrip("/"): x for group, some in answer.groups.items() for name, x in some.items()}


def test_values(folder, theirs):
    model = load_model(folder / "mlx")
    memory = model.encoder(mx.array(MEL.transpose(0, 2, 1)))
    assert_within_budget(memory, theirs["float64/memory"], theirs["float32/memory"], "memory")
    logits = model.decode(mx.array(TOKENS), memory)
    assert_within_budget(logits, theirs["float64/logits"], theirs["float32/logits"], "logits")


def test_gradients(folder, theirs):
    """By the spectrogram and by every parameter, under its own name."""
    model = load_model(folder / "mlx")
    flat = dict(tree_flatten(model.parameters()))

    def logits(mel, *params):
        model.update(tree_unflatten(list(zip(flat, params, strict=True))))
        return model(mel, mx.array(TOKENS))

    primals = [mx.array(MEL.transpose(0, 2, 1)), *flat.values()]
    _, (by_mel, *rest) = mx.vjp(logits, primals, [mx.array(COTANGENT)])
    ours = dict(zip(flat, rest, strict=True))
    assert_within_budget(by_mel.swapaxes(1, 2), theirs["float64/mel"], theirs["float32/mel"], "mel")
    shapes = parameter_shapes("whisper", model.config.to_dict())
    sides = []
    for dtype in ("float64", "float32"):
        start, kind = f"{dtype}/model.", getattr(mx, dtype)
        with mx.stream(mx.cpu):
            found = {n.partition("/")[2]: mx.array(x, kind) for n, x in theirs.items() if n.startswith(start)}
            made = apply_rules(names.rules(model.config, found), found, shapes)
            sides.append({name: np.array(x) for name, x in made.items()})
    for name in flat:
        assert_within_budget(ours[name], sides[0][name], sides[1][name], name)


def test_tokens(folder, theirs):
    """With caches the same as transformers without."""
    model = load_model(folder / "mlx")
    for row, expected in zip(MEL.transpose(0, 2, 1), theirs["greedy"].tolist(), strict=True):
        said = [token.id for token in generate(model.listen(mx.array(row)), expected[:1], max_tokens=COUNT)]
        assert said == expected[1:] and len(set(said)) > 3


def test_the_way_back(oracle, folder, theirs, tmp_path):
    """Bit for bit under their names, and read by transformers."""
    convert(folder / "mlx", tmp_path / "back", to="pytorch")
    same_tensors(*(read_source(side / "model.safetensors").tensors for side in (tmp_path / "back", folder / "hf")))
    arrays = {"mel": MEL, "tokens": TOKENS, "cotangent": COTANGENT}
    again = oracle.call("whisper_answers", arrays, folder=str(tmp_path / "back"), dtypes=["float64"], count=1)
    assert (again.groups["float64"]["logits"] == theirs["float64/logits"]).all()


@pytest.mark.parametrize("bins", [80, 128])
def test_spectrograms(oracle, bins):
    """A window of noise in a falling spectrum, and a shorter one, which zeros fill. The filters are the same."""
    audio = noise(2, SAMPLES, seed=bins)
    audio[1, 50021:] = 0
    theirs = oracle.call("whisper_features", {"audio": audio}, bins=bins)
    assert np.abs(mel_filters(bins) - theirs["filters"]).max() < 1e-12 * theirs["filters"].max()
    assert_like_the_twin(theirs["mel"].transpose(0, 2, 1), audio, bins=bins)
    for row, length in ((0, SAMPLES), (1, 50021)):
        assert_like_the_twin(log_mel(mx.array(audio[row, :length]), bins=bins), audio[row], bins=bins)
