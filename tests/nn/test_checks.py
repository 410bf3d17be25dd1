"""Every door that takes tokens refuses those outside the vocabulary; steps of generation do not wait to read them."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_xformer.models.bert import Bert, BertConfig
from mlx_xformer.models.causal_lm.model import CausalLM, CausalLMConfig
from mlx_xformer.models.guides import llm_prep, scratch
from mlx_xformer.models.t5 import T5, T5Config
from mlx_xformer.models.transformer import Transformer, TransformerConfig
from mlx_xformer.models.whisper import Whisper, WhisperConfig
from mlx_xformer.nn import checks
from mlx_xformer.text.generation import batch_generate, generate

V, E, H = 29, 8, 2
MEMORY = mx.zeros((1, 3, E))
LM = CausalLM(CausalLMConfig(V, E, 2, H, 12))
T5_ = T5(T5Config(V, E, 2, H, 4, 12))
WHISPER = Whisper(WhisperConfig(V, E, H, 12, 1, 1, mel_bins=5, source_positions=8, target_positions=200)).eval()
TRANSFORMER = Transformer(TransformerConfig(V, None, E, H, 1, 1, 12)).eval()
TREE = llm_prep.AutoregressiveTransformerModel(llm_prep.SequenceConfig(3, 4, E, 1, H, vocab_size=V, max_len=200))
PAIR = llm_prep.EncoderDecoder(llm_prep.SequenceConfig(3, 4, E, 1, H, vocab_size=V))
LISTENER = scratch.EncoderDecoder(
    scratch.EncoderDecoderConfig(V, scratch.StackConfig(E, 4, 12, H, E, causal=True))
).eval()
BERT = Bert(BertConfig(V, E, 1, H, 12, max_positions=200))

DOORS = {
    "causal language model": LM,
    "with caches": lambda x: LM(x, caches=LM.make_caches()),
    "T5's encoder": T5_.encode,
    "T5": lambda x: T5_(mx.array([[1, 2]]), x),
    "T5's decoder": lambda x: T5_.decode(x, MEMORY),
    "T5 with caches": lambda x: T5_.decode(x, MEMORY, caches=T5_.make_caches()),
    "T5 given a source": lambda x: T5_.conditioned(mx.array([[1, 2]]))(x),
    "T5 given": lambda x: T5_.conditioned(x),
    "Whisper": lambda x: WHISPER(mx.zeros((1, 6, 5)), x),
    "Whisper's decoder": lambda x: WHISPER.decode(x, MEMORY),
    "Whisper with caches": lambda x: WHISPER.decode(x, MEMORY, caches=WHISPER.make_caches()),
    "Whisper listening": lambda x: WHISPER.listen(mx.zeros((6, 5)))(x),
    "Transformer's source": lambda x: TRANSFORMER(x, mx.array([[1]])),
    "Transformer's target": lambda x: TRANSFORMER(mx.array([[1]]), x),
    "Transformer's encoder": TRANSFORMER.encode,
    "Transformer's decoder": lambda x: TRANSFORMER.decode(x, MEMORY, caches=TRANSFORMER.make_caches()),
    "llm_prep": TREE,
    "llm_prep with caches": lambda x: TREE(x, caches=TREE.make_caches()),
    "llm_prep's next token": lambda x: TREE.generate_next_token(x),
    "llm_prep's pair": lambda x: PAIR(mx.zeros((1, 2, 3)), x),
    "llm_prep's decoder": lambda x: PAIR.decode(x, MEMORY, caches=PAIR.make_caches()),
    "scratch": lambda x: LISTENER(x, MEMORY),
    "scratch with caches": lambda x: LISTENER.decode(x, MEMORY, caches=LISTENER.make_caches()),
    "scratch's loss": lambda x: LISTENER.loss(x, MEMORY),
    "scratch's loss alone": lambda x: scratch.cross_entropy(mx.zeros((*x.shape, V)), x),
    "BERT": BERT,
    "a prompt": lambda x: next(generate(LM, x[0].tolist())),
    "prompts": lambda x: batch_generate(LM, [[1], x[0].tolist()]),
}


@pytest.mark.parametrize("token", [V, -1, 10**7])
@pytest.mark.parametrize("length", [2, 100])
@pytest.mark.parametrize("door", DOORS)
def test_tokens_outside_the_vocabulary_are_refused(door, length, token):
    tokens = np.ones((1, length), np.int32)
    tokens[0, -1] = token
    with pytest.raises(ValueError, match=f"(from|tokens from) 0 to 28, got {token}$"):
        DOORS[door](mx.array(tokens))


@pytest.mark.parametrize("door", ["causal language model", "Whisper", "scratch's loss", "BERT", "scratch's loss alone"])
def test_the_first_and_the_last_token_are_taken(door):
    tokens = mx.array([[0, V - 1, 3]])
    assert mx.isfinite(DOORS[door](tokens)).all()


def test_what_a_compilation_traces_is_not_read():
    loss = mx.compile(lambda logits, labels: scratch.cross_entropy(logits, labels))
    assert loss(mx.zeros((1, 3, V)), mx.array([[0, V - 1, 3]])).item() == pytest.approx(np.log(V))
    traced = mx.vmap(lambda tokens: LM(tokens), in_axes=0)(mx.array([[[1, 2]], [[V - 1, 3]]]))
    assert traced.shape == (2, 1, 2, V)


@pytest.mark.parametrize("padding", [-100, V, 5])
def test_padding_of_a_loss_may_be_outside(padding):
    logits = mx.random.normal((1, 4, V), key=mx.random.key(0))
    loss = lambda logits: scratch.cross_entropy(logits, mx.array([[3, padding, 7, padding]]), padding)  # noqa: E731
    expected = scratch.cross_entropy(logits[:, ::2], mx.array([[3, 7]]))
    value, gradient = mx.value_and_grad(loss)(logits)
    assert abs(value - expected).item() < 1e-6 and (gradient[:, 1::2] == 0).all() and mx.isfinite(gradient).all()
    with pytest.raises(ValueError, match="labels must be from 0 to 28, got -1"):
        scratch.cross_entropy(logits, mx.array([[3, padding, -1, padding]]), padding)


def test_generation_reads_no_tokens_for_it(monkeypatch):
    """A check would wait for a token before the next step is queued."""
    models = [LM, T5_.conditioned(mx.array([[1, 2]])), WHISPER.listen(mx.zeros((6, 5))), LISTENER.conditioned(MEMORY)]
    monkeypatch.setattr(checks, "check_range", lambda *_: pytest.fail("tokens were read"))
    for model in [*models, TREE]:
        assert len(list(generate(model, [1, 2, 3], max_tokens=4))) == 4
        assert len(batch_generate(model, [[1, 2]], max_tokens=4)[0]) == 4
    assert len(list(generate(LM, [1, 2, 3], max_tokens=6, draft=LM, ahead=2))) == 6
    with pytest.raises(pytest.fail.Exception, match="tokens were read"):
        LM(mx.array([[1]]))
