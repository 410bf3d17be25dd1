"""Whisper against its twin, through caches, in generation; and what it refuses."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from support.harness import assert_within_budget, check_forward, check_gradient, draw
from support.models import WHISPER_CONFIG as CONFIG
from support.models import WHISPER_SIZES as SIZES
from support.models import whisper, whisper_folder

from mlx_xformer import generate, parity
from mlx_xformer.models.whisper import Whisper, WhisperConfig
from mlx_xformer.nn.cache import CrossCache
from mlx_xformer.nn.linear import Linear
from mlx_xformer.reference.models import whisper as twin

B, T, L, F, E, V = 3, 25, 11, 7, 22, 53
RNG = np.random.default_rng(5)
MEL = RNG.normal(size=(B, T, F))
TOKENS = RNG.integers(0, V, (B, L))


def truths(model, mel=MEL, tokens=TOKENS):
    """Logits of the twin in double and in single precision."""
    params = {name: np.array(x) for name, x in tree_flatten(model.parameters())}
    double = {name: x.astype(np.float64) for name, x in params.items()}
    single = twin.whisper(params, model.config, mel.astype(np.float32), tokens)
    return twin.whisper(double, model.config, mel.astype(np.float32).astype(np.float64), tokens), single


def test_forward_and_gradient():
    """With an odd number of frames, by the spectrogram and by every parameter."""
    model = Whisper(CONFIG)
    params = draw(model, 1)

    def ours(mel, *values):
        model.update(tree_unflatten(list(zip(params, values, strict=True))))
        return model(mel, mx.array(TOKENS))

    def theirs(mel, *values):
        return twin.whisper(dict(zip(params, values, strict=True)), CONFIG, mel, TOKENS)

    check_forward(ours, theirs, MEL, *params.values())
    check_gradient(ours, theirs, MEL, *params.values())


def test_encoder():
    model = Whisper(CONFIG)
    params = {name.removeprefix("encoder."): x for name, x in draw(model, 2).items() if name.startswith("encoder.")}
    for frames in (1, 2, 25, 26):
        mel = MEL[:, :frames] if frames < 26 else RNG.normal(size=(1, 26, F))
        check_forward(
            lambda mel, *_: model.encoder(mel),
            lambda mel, *values: twin.encoder(dict(zip(params, values, strict=True)), CONFIG, mel),
            *(mel, *params.values()),
        )
        assert model.encoder(mx.array(mel)).shape[1] == (frames + 1) // 2


def test_positions_of_the_encoder_are_a_formula():
    """Sines, then cosines; training leaves them alone."""
    model = Whisper(CONFIG)
    table = np.array(model.encoder.embed_positions.weight)
    assert np.abs(table - twin.source_positions(13, E)).max() < 1e-6
    assert (table[0] == [0] * 11 + [1] * 11).all() and table[1, 0] == pytest.approx(np.sin(1))
    assert table[12, 10] == pytest.approx(np.sin(12e-4))
    trained = {name for name, _ in tree_flatten(model.trainable_parameters())}
    every = {name for name, _ in tree_flatten(model.parameters())}
    assert every - trained == {"encoder.embed_positions.weight"}
    assert not [name for name in every if name.endswith("k_proj.bias")]


def test_tokens_do_not_see_what_follows():
    model, mel = whisper(), mx.array(MEL)
    plain = np.array(model(mel, mx.array(TOKENS)))
    for at in range(1, L):
        other = TOKENS.copy()
        other[:, at:] = (other[:, at:] + 1 + RNG.integers(0, V - 1, (B, L - at))) % V
        changed = np.array(model(mel, mx.array(other)))
        assert (changed[:, :at] == plain[:, :at]).all() and (changed[:, at] != plain[:, at]).any()


@pytest.mark.parametrize("chunks", [(1,) * L, (4, 1, 5, 1), (L,), (7, 4)])
def test_cached_is_uncached(chunks):
    """Fed by chunks, with the memory's keys and values made once, in one batch and alone."""
    model = whisper()
    truth, single = truths(model)
    for rows in (slice(0, 1), slice(0, B)):
        memory, caches = model.encoder(mx.array(MEL[rows])), model.make_caches()
        crosses = [CrossCache() for _ in range(3)]
        at, parts = 0, []
        for n in chunks:
            part = model.decode(mx.array(TOKENS[rows, at : at + n]), memory, caches=caches, cross_caches=crosses)
            parts.append(part)
            at += n
        assert_within_budget(mx.concatenate(parts, axis=1), truth[rows], single[rows])
        assert [cross.length for cross in crosses] == [13] * 3 and {cache.length for cache in caches} == {L}


def test_ragged_rows():
    """Rows of other lengths, whose positions begin where their padding ends."""
    model, padding = whisper(), [0, 4, 10]
    memory, caches = model.encoder(mx.array(MEL)), model.make_caches(padding=padding)
    parts = [model.decode(mx.array(TOKENS[:, a : a + 6]), memory, caches=caches) for a in (0, 6)]
    logits = mx.concatenate(parts, axis=1)
    for row, pad in enumerate(padding):
        truth, single = truths(model, MEL[row : row + 1], TOKENS[row : row + 1, pad:])
        assert_within_budget(logits[row : row + 1, pad:], truth, single)


def test_last():
    model, mel = whisper(), mx.array(MEL)
    memory, logits = model.encoder(mel), np.array(model(mel, mx.array(TOKENS)))
    for last in (0, 1, 4, L, 99):
        some = np.array(model.decode(mx.array(TOKENS), memory, last=last))
        assert some.shape[1] == min(last, L) and np.abs(some - logits[:, L - some.shape[1] :]).max(initial=0) < 1e-5


class Spy:
    """A model that notes how many tokens it is given."""

    def __init__(self, listener):
        self.config, self.make_caches, self._listener, self.fed = listener.config, listener.make_caches, listener, []

    def __call__(self, tokens, **options):
        self.fed.append(tokens.shape[1])
        return self._listener(tokens, **options)


def test_generation(monkeypatch):
    """The tokens of full passes over all so far; only new ones are fed, and the memory is projected once a layer."""
    model, prompt = whisper(), [5, 17, 2]
    said = list(prompt)
    for _ in range(30):
        said.append(int(model(mx.array(MEL[:1]), mx.array([said]))[0, -1].argmax().item()))
    projected = []
    projections = [layer.cross_attn.k_proj for layer in model.decoder.stack.layers]

    def counted(self, x):
        if any(self is one for one in projections):
            projected.append(x.shape)
        return plain(self, x)

    plain = Linear.__call__
    monkeypatch.setattr(Linear, "__call__", counted)
    spy = Spy(model.listen(mx.array(MEL[0])))
    assert [token.id for token in generate(spy, prompt, max_tokens=30)] == said[3:]
    assert spy.fed == [3, *[1] * 29] and projected == [(1, 13, E)] * 3
    assert len(set(said[3:])) > 5


def test_generation_ends_with_the_positions():
    model = whisper()
    said = list(generate(model.listen(mx.array(MEL[:1])), [1, 2], max_tokens=99))
    assert len(said) == 41 - 2 + 1 and said[-1].finish == "length"  # the last token needs no position
    first = said[4].id
    ended = list(generate(model.listen(mx.array(MEL[:1])), [1, 2], eos=[first]))
    assert ended[-1].finish == "eos" and ended[-1].id == first and len(ended) <= 5


def test_a_draft_makes_no_difference():
    """A Whisper with one layer fewer guesses; its caches are rewound where it was wrong."""
    model = whisper()
    small = whisper(2, WhisperConfig(**{**SIZES, "decoder_layers": 1}))
    plain = [token.id for token in generate(model.listen(mx.array(MEL[0])), [3], max_tokens=25)]
    draft = small.listen(mx.array(MEL[0]))
    assert plain == [t.id for t in generate(model.listen(mx.array(MEL[0])), [3], max_tokens=25, draft=draft)]


def test_configuration():
    assert WhisperConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG
    tiny = WhisperConfig(51864, 384, 6, 1536, 4, 4)
    assert (tiny.mel_bins, tiny.source_positions, tiny.target_positions) == (80, 1500, 448)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "embed_dim must be a multiple of num_heads, 3, got 22"),
        ({"embed_dim": 23, "num_heads": 1}, "embed_dim must be even and at least 4, got 23"),
        ({"embed_dim": 2}, "embed_dim must be even and at least 4, got 2"),
        ({"hidden_dim": True}, "hidden_dim must be a whole number from 1 to 10000000, got True"),
        ({"decoder_layers": 1001}, "decoder_layers must be a whole number from 1 to 1000, got 1001"),
        ({"vocab_size": "53"}, "vocab_size must be a whole number from 1 to 100000000, got '53'"),
        ({"colour": 1}, "Whisper has no option named colour"),
    ],
)
def test_configurations_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        WhisperConfig.from_dict({**SIZES, **changes})


def test_what_must_be_given():
    with pytest.raises(ValueError, match=r"^Whisper must be given decoder_layers$"):
        WhisperConfig.from_dict({name: size for name, size in SIZES.items() if name != "decoder_layers"})


MODEL = whisper()
MEMORY, ONE = mx.zeros((1, 5, E)), mx.zeros((1, 4), mx.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MODEL.encoder(mx.zeros((1, 27, 7))), "mel must be (B, 1 to 26 frames, 7 bins), got shape (1, 27, 7)"),
        (lambda: MODEL.encoder(mx.zeros((1, 0, 7))), "mel must be (B, 1 to 26 frames, 7 bins), got shape (1, 0, 7)"),
        (lambda: MODEL.encoder(mx.zeros((1, 7, 26))), "mel must be (B, 1 to 26 frames, 7 bins), got shape (1, 7, 26)"),
        (lambda: MODEL.listen(mx.zeros((26,))), "mel must be (T, F) or (B, T, F), got shape (26,)"),
        (
            lambda: list(generate(MODEL.listen(mx.zeros((2, 9, 7))), [1])),
            "tokens must be 2 rows, as many as the memory has, got 1",
        ),
        (lambda: MODEL(mx.zeros((1, 9, 7)), ONE + 53), "tokens must be from 0 to 52, got 53"),
        (
            lambda: MODEL.decode(mx.zeros((1, 42), mx.int32), MEMORY),
            "tokens must be at most 41, one a position, got 42",
        ),
        (
            lambda: MODEL.decode(mx.zeros((4,), mx.int32), MEMORY),
            "tokens must be (batch, length) whole numbers, got shape (4,) mlx.core.int32",
        ),
        (
            lambda: MODEL.decode(mx.zeros((1, 4)), MEMORY),
            "tokens must be (batch, length) whole numbers, got shape (1, 4) mlx.core.float32",
        ),
        (lambda: MODEL.decode(ONE, MEMORY, last=-1), "last must be at least 0, got -1"),
        (lambda: MODEL.decode(ONE, mx.zeros((1, 5, 23))), "memory must be (1, length, 22), got shape (1, 5, 23)"),
        (lambda: MODEL.decode(ONE, mx.zeros((2, 5, 22))), "memory must be (1, length, 22), got shape (2, 5, 22)"),
        (lambda: MODEL.decode(ONE, MEMORY, caches=MODEL.make_caches()[:2]), "caches must be one a layer, 3, got 2"),
        (lambda: MODEL.decode(ONE, MEMORY, cross_caches=[CrossCache()]), "cross_caches must be one a layer, 3, got 1"),
        (lambda: generate(MODEL.listen(mx.zeros((9, 7))), [53]), "prompt must hold tokens from 0 to 52, got 53"),
        (
            lambda: generate(MODEL.listen(mx.zeros((9, 7))), [1] * 42),
            "prompt must be at most as long as the caches' capacity, 41, got 42",
        ),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == message


def test_refused_tokens_leave_caches_as_they_were():
    caches = MODEL.make_caches(capacity=50)
    MODEL.decode(mx.array(TOKENS[:1]), MEMORY, caches=caches)
    with pytest.raises(ValueError, match="tokens must be at most 41, one a position, got 42"):
        MODEL.decode(mx.zeros((1, 31), mx.int32), MEMORY, caches=caches)
    assert {cache.length for cache in caches} == {L}


def test_the_proof_of_a_folder(tmp_path):
    report = parity.run(folder=whisper_folder(tmp_path / "whisper"), seeds=1)
    assert not report.failed, report.table()
    names = {row.name for row in report.rows}
    assert {"encoder.embed", "encoder.stack.layers.1", "decoder.stack.layers.2", "encoder", "decoder"} <= names
    assert {"decoder, cached", "decoder.embed", "logits"} <= names
