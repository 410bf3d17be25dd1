"""scratch's encoder-decoder: positions, teacher forcing, loss, caches, generation; checkpoints and their proof."""

import dataclasses

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.harness import as32, assert_within_budget, check_gradient, draw

from mlx_xformer import batch_generate, generate, make_sampler, parity
from mlx_xformer.models.families import load_model
from mlx_xformer.models.guides.ferrotorch import AttentionLayer, AttentionLayerConfig
from mlx_xformer.models.guides.scratch import EncoderDecoder, EncoderDecoderConfig, StackConfig, cross_entropy
from mlx_xformer.nn.cache import CrossCache, KVCache
from mlx_xformer.reference.models.guides import scratch as twin
from mlx_xformer.storage.checkpoint import save_checkpoint
from mlx_xformer.text.samplers import greedy

B, L, S, E, M, V = 3, 13, 7, 21, 11, 19
STILL = {"attention_dropout": 0.0, "ffn_dropout": 0.0, "block_dropout": 0.0}
STACK = StackConfig(E, 5, 17, num_heads=3, enc_out_dim=M, num_stack=2, causal=True, **STILL)
CONFIG = EncoderDecoderConfig(V, STACK, embed_dropout=0.0)


def array(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def tokens(*shape, seed=0, first=1):
    return mx.array(np.random.default_rng(seed).integers(first, V, shape))


def model(**changes):
    made = EncoderDecoder(dataclasses.replace(CONFIG, **changes))
    return made, draw(made, 0)


def error_of(actual, expected):
    return np.abs(np.array(actual) - np.array(expected)).max() / np.abs(np.array(expected)).max()


# Forward, positions, causality


@pytest.mark.parametrize("listens", [True, False])
def test_logits_are_the_twin_s(listens):
    stack = STACK if listens else dataclasses.replace(STACK, enc_out_dim=None)
    made, params = model(stack=stack)
    given, memory = tokens(B, L), np.array(array(B, S, M), np.float64) if listens else None
    single = {name: x.astype(np.float32) for name, x in params.items()}
    truth = twin.encoder_decoder(params, made.config, np.array(given), memory)
    budget = twin.encoder_decoder(single, made.config, np.array(given), as32(memory))
    assert_within_budget(made(given, None if memory is None else mx.array(as32(memory))), truth, budget)


@pytest.mark.parametrize("width", [1, 2, 21, 22])
def test_t2_1_positions_follow_the_sequence(width):
    """With as many samples as positions (where the original hid it): the same token differs along a sample, and not
    between samples. Any width."""
    stack = StackConfig(width, 5, 17, causal=True, **STILL)
    made = EncoderDecoder(dataclasses.replace(CONFIG, stack=stack))
    added = made.embedded(mx.full((L, L), 3, mx.int32)) - made.embed.weight[3]
    assert mx.allclose(added, added[:1], atol=1e-6)
    assert np.abs(np.diff(np.array(added[0]), axis=0)).max(axis=1).min() > 0.05
    for p in range(L):
        for i in range(width):
            angle = p / 10000 ** (2 * (i // 2) / width)
            assert abs(added[0, p, i].item() - (np.cos(angle) if i % 2 else np.sin(angle))) < 1e-5


def test_embeddings_are_dropped_in_training_alone():
    made, _ = model(embed_dropout=0.3)
    out = made.embedded(tokens(B, L), key=mx.random.key(0))
    assert 0.2 < mx.mean(out == 0).item() < 0.4
    with pytest.raises(ValueError, match="needs a random key, got none"):
        made.embedded(tokens(B, L))
    made.eval()
    assert mx.array_equal(made.embedded(tokens(B, L)), model()[0].embedded(tokens(B, L)))


def test_t2_5_logits_are_causal():
    """A change at position t leaves all logits before it bit-equal, and moves those from it on."""
    made, _ = model()
    given, memory = tokens(1, L), array(1, S, M)
    before = made(given, memory)
    for t in range(L):
        changed = mx.array(np.array(given))
        changed[0, t] = 1 + changed[0, t] % (V - 1)
        after = made(changed, memory)
        assert mx.array_equal(before[:, :t], after[:, :t]) and not mx.array_equal(before[:, t], after[:, t])
    with pytest.raises(ValueError, match="stack must be a causal StackConfig"):
        EncoderDecoderConfig(V, dataclasses.replace(STACK, causal=False))


def test_t2_7_memory_changes_every_position():
    made, _ = model()
    before, after = made(tokens(1, L), array(1, S, M)), made(tokens(1, L), array(1, S, M, seed=1))
    assert (mx.abs(before - after).max(axis=-1) > 1e-3).all()


# Teacher forcing and the loss


def test_loss_is_teacher_forced():
    """The logits of a token predict the one after it; padding counts nothing, within rows nor as rows."""
    made, params = model()
    given, memory = tokens(B, L), array(B, S, M)
    given[0, 9:], given[2, 4:] = 0, 0
    double = twin.encoder_decoder(params, made.config, np.array(given[:, :-1]), np.array(memory, np.float64))
    logits = double - double.max(-1, keepdims=True)
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    picked = [-np.log(chances[b, i, given[b, i + 1].item()]) for b in range(B) for i in range(L - 1) if given[b, i + 1]]
    assert len(picked) == 8 + 12 + 3
    assert abs(made.loss(given, memory).item() / np.mean(picked) - 1) < 1e-6
    assert abs(twin.cross_entropy(double, np.array(given[:, 1:]), 0) / np.mean(picked) - 1) < 1e-12
    alone = [made.loss(given[b : b + 1, :n], memory[b : b + 1]).item() * (n - 1) for b, n in enumerate((9, 13, 4))]
    assert abs(sum(alone) / 23 / np.mean(picked) - 1) < 1e-6


def test_loss_of_padding_alone_is_0():
    made, _ = model()
    loss, gradient = nn.value_and_grad(made, made.loss)(mx.zeros((2, 5), mx.int32), array(2, S, M))
    assert loss.item() == 0 and all(mx.isfinite(x).all() for _, x in tree_flatten(gradient))


def test_cross_entropy_gradient():
    labels = np.array([[3, 0, 5, 2, 0]])
    for pad in (0, None):
        check_gradient(
            lambda x, pad=pad: cross_entropy(x, mx.array(labels), pad),
            lambda x, pad=pad: np.asarray(twin.cross_entropy(x, labels, pad)),
            np.random.default_rng(0).normal(size=(1, 5, 7)),
        )


def test_t2_6_padding_is_not_trained():
    """Its embedding is 0 at first, and gets no gradient though it is read; the others do, and so does every other
    parameter."""
    fresh = EncoderDecoder(CONFIG)
    assert (fresh.embed.weight[0] == 0).all() and (fresh.embed.weight[1:] != 0).any(axis=-1).all()
    made, _ = model()
    given = tokens(B, L)
    given[1, 3:6], given[0, 9:] = 0, 0
    _, gradient = nn.value_and_grad(made, made.loss)(given, array(B, S, M))
    flat = dict(tree_flatten(gradient))
    used = set(np.array(given[:, :-1]).ravel().tolist())
    for token in range(V):
        assert (mx.abs(flat["embed.weight"][token]).max() > 0).item() is (token in used and token != 0)
    assert all(mx.abs(x).max() > 0 for x in flat.values())
    open_to_it, _ = model(padding_idx=None)
    _, gradient = nn.value_and_grad(open_to_it, open_to_it.loss)(given, array(B, S, M))
    assert mx.abs(gradient["embed"]["weight"][0]).max() > 0


def test_training_learns_what_the_memory_says():
    """Tokens that only the memory tells, and in which place each stands: the loss falls to a fifth of guessing's."""
    stack = StackConfig(24, 7, 32, num_heads=3, enc_out_dim=13, causal=True, **STILL)
    mx.random.seed(0)
    made = EncoderDecoder(EncoderDecoderConfig(9, stack, embed_dropout=0.0))
    optimizer, rng = optim.AdamW(3e-3), np.random.default_rng(0)
    step, losses = nn.value_and_grad(made, made.loss), []
    for _ in range(200):
        said = rng.integers(2, 9, (32, 5))
        memory = np.concatenate([np.eye(8)[said - 1], np.broadcast_to(np.eye(5), (32, 5, 5))], axis=-1)
        given = mx.array(np.concatenate([np.ones((32, 1), int), said], axis=1))
        loss, gradient = step(given, mx.array(memory.astype(np.float32)))
        optimizer.update(made, gradient)
        mx.eval(made.parameters(), optimizer.state)
        losses.append(loss.item())
    assert losses[0] > 1.8 and np.mean(losses[-10:]) < 0.4, losses[-10:]


# Caches: teacher-forced parity


@pytest.mark.parametrize("chunks", [[1] * L, [5, 1, 4, 3], [9, *[1] * 4], [L]])
@pytest.mark.parametrize("window", [None, 4])
def test_cached_is_the_full_pass(chunks, window):
    """Prefill and single steps or chunks, with growing and with sliding caches, against the pass over all at once."""
    made, _ = model()
    given, memory = tokens(B, L), array(B, S, M)
    caches, cross, at, parts = made.make_caches(window=window), [CrossCache() for _ in made.decoder.blocks], 0, []
    for n in chunks:
        parts.append(made.decode(given[:, at : at + n], memory, caches=caches, cross_caches=cross))
        at += n
    near = None
    if window is not None:
        distance = mx.arange(L)[:, None] - mx.arange(L)
        near = distance < window
    assert error_of(mx.concatenate(parts, axis=1), made(given, memory, mask=near)) < 1e-5
    assert all(cache.length == S for cache in cross)


@pytest.mark.parametrize("chunks", [[1] * L, [6, 1, 2, 4]])
def test_cached_ragged_rows(chunks):
    """Rows of 13, 9 and 4 tokens, padded to the left, are what each is alone, its positions from 0."""
    made, _ = model()
    padding, memory = [0, 4, 9], array(B, S, M)
    given = tokens(B, L)
    caches, cross, at, parts = made.make_caches(padding=padding), [CrossCache() for _ in made.decoder.blocks], 0, []
    for n in chunks:
        parts.append(made.decode(given[:, at : at + n], memory, caches=caches, cross_caches=cross))
        at += n
    together = mx.concatenate(parts, axis=1)
    for row, pad in enumerate(padding):
        alone = made(given[row : row + 1, pad:], memory[row : row + 1])
        assert error_of(together[row : row + 1, pad:], alone) < 1e-5


def test_last_positions_alone():
    made, _ = model()
    given, memory = tokens(B, L), array(B, S, M)
    for last in (0, 1, 4, L, L + 5):
        out = made(given, memory, last=last)
        assert out.shape == (B, min(last, L), V)
        assert last == 0 or error_of(out, made(given, memory)[:, -last:]) < 1e-5


# Generation


def by_hand(made, prompt, memory, count, choose):
    """Tokens from full passes, without any cache."""
    known = list(prompt)
    for _ in range(count):
        logits = made(mx.array([known]), memory)[:, -1]
        known.append(choose(logits, mx.array([known])).item())
    return known[len(prompt) :]


@pytest.mark.parametrize("sampler", [make_sampler(), make_sampler(1.1, top_k=7, seed=5)], ids=["greedy", "drawn"])
def test_generation_reads_its_own_outputs(sampler):
    """S2-10: what generate() yields from the caches is what full passes give; the memory is projected once a block, and
    another memory gives other tokens."""
    made, _ = model()
    made.eval()
    texts = []
    for seed in (0, 1):
        memory = array(1, S, M, seed=seed)
        listener = made.conditioned(memory)
        texts.append([token.id for token in generate(listener, [1, 4], max_tokens=24, sampler=sampler)])
        assert texts[-1] == by_hand(made, [1, 4], memory, 24, sampler)
        caches, held = listener.make_caches(), []
        for _ in range(2):
            listener(mx.array([[3]]), caches=caches)
            held.append([id(x) for cache in caches[0].memory.caches for x in cache.arrays])
        assert held[0] == held[1] and len(held[0]) == 4
    assert texts[0] != texts[1] and len(set(texts[0])) > 2


def test_generation_of_several_rows():
    """Prompts of different lengths, each with its row of the memory, as each alone."""
    made, _ = model()
    made.eval()
    prompts, memory = [[1, 4, 7, 3], [1], [1, 9]], array(B, S, M)
    together = batch_generate(made.conditioned(memory), prompts, max_tokens=9)
    assert together == [by_hand(made, p, memory[i : i + 1], 9, greedy) for i, p in enumerate(prompts)]


def test_generation_without_a_memory():
    made, _ = model(stack=dataclasses.replace(STACK, enc_out_dim=None))
    made.eval()
    assert [t.id for t in generate(made, [1, 4], max_tokens=9)] == by_hand(made, [1, 4], None, 9, greedy)


def test_padding_of_a_memory_is_not_heard():
    made, _ = model()
    made.eval()
    memory = array(1, S, M)
    longer = mx.concatenate([memory, array(1, 4, M, seed=2) * 100], axis=1)
    mask = (mx.arange(S + 4) < S)[None]
    texts = [
        [t.id for t in generate(made.conditioned(*given), [1], max_tokens=9)] for given in [(memory,), (longer, mask)]
    ]
    assert texts[0] == texts[1]


# What is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(mx.array([[1, 19]]), array(1, S, M)), "target must be from 0 to 18, got 19"),
        (
            lambda m: m.loss(mx.array([[1]]), array(1, S, M)),
            r"target must hold at least two tokens .* got shape \(1, 1\)",
        ),
        (lambda m: m(mx.array([[1, -2]]), array(1, S, M)), "target must be from 0 to 18, got -2"),
        (lambda m: m.loss(mx.array([[1, 19, 2]]), array(1, S, M)), "target must be from 0 to 18, got 19"),
        (
            lambda m: m(mx.array([1, 2]), array(1, S, M)),
            r"target must be \(batch, length\) whole numbers, got shape \(2,\)",
        ),
        (lambda m: m(tokens(1, L), array(1, S, M), last=-1), "last must be at least 0, got -1"),
        (lambda m: m(tokens(1, L + 1), array(1, S, M)), "target must be at most max_len, 13 positions, got 14"),
        (lambda m: m(tokens(1, L)), "memory must be given to a block with enc_out_dim, got none"),
        (lambda m: m(tokens(1, L), array(1, S, M + 1)), "source must have 11 channels, got 12"),
        (lambda m: m(tokens(1, L), array(1, S, M), memory_mask=mx.ones((1, S + 1)) > 0), "memory_mask must be boolean"),
        (lambda m: list(generate(m.conditioned(array(1, S, M)), [19])), "prompt must hold tokens from 0 to 18, got 19"),
        (lambda m: list(generate(m.conditioned(array(1, S, M)), [1], max_tokens=20)), "max_len, 13 positions, got 14"),
    ],
)
def test_calls_that_are_refused(call, message):
    made, _ = model(max_len=L)
    with pytest.raises(ValueError, match=message) as error:
        call(made.eval())
    assert "\n" not in str(error.value)


def test_a_token_beyond_the_vocabulary():
    """MLX would read beyond the table without a word."""
    with pytest.raises(ValueError, match="target must be from 0 to 18, got 19"):
        model()[0](mx.array([[1, 19]]), array(1, S, M))


def test_padding_does_not_use_up_positions():
    made, _ = model(max_len=L)
    caches = made.make_caches(padding=[4, 6])
    made.decode(tokens(2, L + 4), array(2, S, M), caches=caches)
    with pytest.raises(ValueError, match="max_len, 13 positions, got 14"):
        made.decode(tokens(2, 1), array(2, S, M), caches=caches)
    assert isinstance(caches[0], KVCache)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be a whole number"),
        ({"max_len": 2.0}, "max_len must be a whole number"),
        ({"padding_idx": 19}, "padding_idx must be a token from 0 to 18, got 19"),
        ({"padding_idx": "0"}, "padding_idx must be a token"),
        ({"embed_dropout": -0.1}, "embed_dropout must be a number from 0 to below 1"),
        ({"stack": 3}, "stack must be a causal StackConfig, got 3"),
        ({"stack": {**STACK.to_dict(), "colour": 1}}, "the stack has no option named colour"),
        ({"colour": 1}, "the encoder-decoder has no option named colour"),
    ],
)
def test_configurations_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        EncoderDecoderConfig.from_dict(CONFIG.to_dict() | changes)


# Checkpoints and their proof


def saved(folder, family, module, config):
    draw(module, 0)
    weights = dict(tree_flatten(module.parameters()))
    save_checkpoint(folder, weights, family=family, config=config.to_dict(), provenance={})
    return load_model(folder)


def test_checkpoint_and_its_proof(tmp_path):
    for norm in ("layer", "unbiased"):
        config = dataclasses.replace(CONFIG, stack=dataclasses.replace(STACK, norm=norm))
        made = EncoderDecoder(config)
        loaded = saved(tmp_path / norm, "scratch_encoder_decoder", made, config)
        assert loaded.config == config and not loaded.training
        assert mx.array_equal(loaded(tokens(B, L), array(B, S, M)), made(tokens(B, L), array(B, S, M)))
        names = {row.name for row in parity.run(folder=tmp_path / norm, seeds=1).rows}
        assert names == {"embed", "decoder.blocks.0", "decoder.blocks.1", "logits", "logits, cached"}
        assert not parity.run(folder=tmp_path / norm, seeds=1).failed


@pytest.mark.parametrize("width", [None, M])
def test_proof_of_a_stack_alone(tmp_path, width):
    from mlx_xformer.models.guides.scratch import TransformerStack

    config = dataclasses.replace(STACK, enc_out_dim=width, causal=False)
    saved(tmp_path / "a", "scratch", TransformerStack(config), config)
    report = parity.run(folder=tmp_path / "a", seeds=1)
    assert not report.failed and {row.name for row in report.rows} == {"blocks.0", "blocks.1", "stack"}


def test_proof_of_an_attention_layer(tmp_path):
    config = AttentionLayerConfig(21, 3, num_kv_heads=1, causal=True)
    saved(tmp_path / "a", "ferrotorch", AttentionLayer(config), config)
    report = parity.run(folder=tmp_path / "a", seeds=1)
    assert not report.failed and {row.name for row in report.rows} == {"attention"}


@pytest.mark.mutants
def test_a_proof_sees_a_bug(tmp_path, monkeypatch):
    saved(tmp_path / "a", "scratch_encoder_decoder", EncoderDecoder(CONFIG), CONFIG)
    from mlx_xformer.models.guides.scratch import blocks

    real = blocks.TransformerBlock._attend

    def wrong(self, layer, x, memory, key, given):
        return real(self, layer, x * (1.01 if memory is not None else 1), memory, key, given)

    monkeypatch.setattr(blocks.TransformerBlock, "_attend", wrong)
    assert parity.run(folder=tmp_path / "a", seeds=1).failed
