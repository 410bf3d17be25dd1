"""Generation: what it yields, and that chunks, caches, batches, draft models and files of caches leave it as it is."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from support.text import END, Rule, byte_tokenizer, tiny_causal_lm

from mlx_xformer.text.generation import batch_generate, generate
from mlx_xformer.text.samplers import greedy, make_sampler
from mlx_xformer.text.tokenizer import Tokenizer

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


@pytest.fixture
def tokenizer(tmp_path):
    return Tokenizer(byte_tokenizer(tmp_path))


def ids(tokens):
    return [token.id for token in tokens]


def script(text, tokenizer):
    """A model that says a text after any prompt of PROMPT's length, then ends."""
    said = [*tokenizer.encode(text), END]
    return Rule(300, lambda tokens: said[min(max(0, len(tokens) - len(PROMPT)), len(said) - 1)])


# A model that is a rule: exact, so that what is called and yielded can be told.


@pytest.mark.parametrize("prefill", [1, 3, 4, 11, 512])
def test_chunks_and_what_is_computed(prefill):
    model = Rule()
    tokens = list(generate(model, PROMPT, max_tokens=7, prefill=prefill))
    assert ids(tokens) == Rule().follow(PROMPT, 7)
    assert [token.finish for token in tokens] == [None] * 6 + ["length"]
    chunks = [(1, min(prefill, 11 - start), 1) for start in range(0, 11, prefill)]
    assert model.calls == chunks + [(1, 1, 1)] * 6  # logits of one position each, and no step for nothing


def test_the_next_step_is_queued_before_a_token_is_read():
    model = Rule()
    caches = model.make_caches()
    for count, token in enumerate(generate(model, PROMPT, max_tokens=5, caches=caches), 1):
        assert caches[0].length == len(PROMPT) + min(count, 4), token


def test_eos():
    model = Rule()
    said = model.follow(PROMPT, 9)
    assert len(set(said)) == 9
    tokens = list(generate(model, PROMPT, max_tokens=9, eos=[said[4], 999]))
    assert ids(tokens) == said[:5] and [token.finish for token in tokens][-2:] == [None, "eos"]


def test_the_tokenizers_eos_and_text(tokenizer):
    model = script("hello, world €!", tokenizer)
    tokens = list(generate(model, PROMPT, tokenizer=tokenizer))
    assert tokens[-1].id == END and tokens[-1].finish == "eos"
    assert "".join(token.text for token in tokens) == "hello, world €!"
    assert not any("\ufffd" in token.text for token in tokens)
    going_on = list(generate(model, PROMPT, tokenizer=tokenizer, eos=(), max_tokens=30))
    assert len(going_on) == 30 and going_on[-1].finish == "length"


def test_half_a_character_at_the_end_is_marked(tokenizer):
    tokens = list(generate(script("ab€", tokenizer), PROMPT, tokenizer=tokenizer, max_tokens=4))
    assert [token.text for token in tokens] == ["a", "b", "", "\ufffd"]


@pytest.mark.parametrize(
    ("text", "stop", "left"),
    [
        ("hello, world", ["o, w"], "hell"),  # across tokens
        ("hello, world", ["w"], "hello, "),
        ("hello, world", ["zz", "world", "lo"], "hel"),  # the one that comes first
        ("hello, world", ["hello, world!"], "hello, world"),  # begun and never finished
        ("aaaab", ["aab"], "aa"),  # begins anew within its own beginning
        ("a\n\nb", ["\n\n"], "a"),
        ("ab€c", ["€c"], "ab"),
        ("hello", ["hell"], ""),
    ],
)
def test_stop_strings(tokenizer, text, stop, left):
    tokens = list(generate(script(text, tokenizer), PROMPT, tokenizer=tokenizer, stop=stop))
    assert "".join(token.text for token in tokens) == left
    assert tokens[-1].finish == ("eos" if left == text else "stop")
    shown = list(itertools.accumulate(token.text for token in tokens))
    assert all(left.startswith(text) for text in shown)  # nothing is taken back


def test_text_is_held_back_only_while_it_may_become_a_stop_string(tokenizer):
    tokens = list(generate(script("abcabd.", tokenizer), PROMPT, tokenizer=tokenizer, stop=["abd!"]))
    assert [token.text for token in tokens] == ["", "", "abc", "", "", "", "abd.", ""]


def test_logprobs():
    model = Rule(50, scale=3.0)
    (first, *_) = generate(model, PROMPT, max_tokens=3, logprobs=True)
    expected = np.log(np.exp(3.0) / (np.exp(3.0) + 49))
    assert abs(first.logprob - expected) < 1e-6
    drafted = list(generate(model, PROMPT, max_tokens=3, logprobs=True, draft=Rule(50)))
    assert all(abs(token.logprob - expected) < 1e-6 for token in drafted)
    assert next(generate(model, PROMPT)).logprob is None


def test_caches_that_hold_a_part_of_the_prompt():
    model = Rule()
    caches = model.make_caches()
    first = ids(generate(model, PROMPT[:5], max_tokens=1, caches=caches))
    assert first == model.follow(PROMPT[:5], 1) and caches[0].length == 5
    model.calls.clear()
    assert ids(generate(model, PROMPT, max_tokens=4, caches=caches)) == model.follow(PROMPT, 4)
    assert model.calls[0] == (1, 6, 1)
    with pytest.raises(ValueError, match="longer than what the caches hold, 14 tokens, got 11"):
        generate(model, PROMPT, caches=caches)


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("draft", [None, Rule(), Rule(rule=lambda tokens: 0)], ids=["none", "perfect", "wrong"])
def test_caches_hold_what_was_yielded(draft, stop_after):
    model = Rule()
    caches = model.make_caches()
    steps = generate(model, PROMPT, max_tokens=7, caches=caches, draft=draft)
    taken = ids(itertools.islice(steps, stop_after))
    steps.close()
    text = PROMPT + taken
    assert caches[0].rows[0] == text[: caches[0].length] and caches[0].length >= len(text) - 1


def almost(model, wrong):
    """A rule that differs from a model's now and then."""
    return lambda tokens: 0 if sum(tokens) % wrong == 0 else model.rule(tokens)


@pytest.mark.parametrize("ahead", [1, 2, 4, 9])
@pytest.mark.parametrize("wrong", [1, 2, 3, 5])
def test_a_draft_model_changes_nothing(ahead, wrong):
    model = Rule()
    draft = Rule(rule=almost(model, wrong))
    for count in (1, 2, 5, 40):
        tokens = list(generate(model, PROMPT, max_tokens=count, draft=draft, ahead=ahead, prefill=3))
        assert ids(tokens) == model.follow(PROMPT, count)
        assert [token.finish for token in tokens] == [None] * (count - 1) + ["length"]


def test_a_good_draft_model_saves_steps():
    model, draft = Rule(), Rule()
    assert ids(generate(model, PROMPT, max_tokens=41, draft=draft)) == model.follow(PROMPT, 41)
    assert model.calls == [(1, 11, 1)] + [(1, 5, 5)] * 8
    assert all(call[0] == 1 and call[2] == 1 for call in draft.calls)
    assert draft.calls[:5] == [(1, 12, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 2, 1)]


def test_draws_do_not_depend_on_chunks_caches_and_drafts():
    options = {"sampler": make_sampler(0.9, top_p=0.99, repetition_penalty=1.2, seed=5), "max_tokens": 30}
    plain = ids(generate(Rule(20, scale=2.0), [t % 20 for t in PROMPT], **options))
    prompt = [t % 20 for t in PROMPT]
    model = Rule(20, scale=2.0)
    assert plain == ids(generate(model, prompt, prefill=2, **options))
    assert plain == ids(generate(model, prompt, draft=Rule(20, scale=1.0), **options))
    caches = model.make_caches()
    next(generate(model, prompt[:7], caches=caches, max_tokens=1))
    assert plain == ids(generate(model, prompt, caches=caches, **options))
    other = options | {"sampler": make_sampler(0.9, top_p=0.99, repetition_penalty=1.2, seed=6)}
    assert plain != ids(generate(model, prompt, **other)) and len(set(plain)) > 5


def test_samplers_see_all_that_came_before():
    seen = []

    def sampler(logits, history):
        seen.append(history.tolist())
        return greedy(logits, history)

    said = ids(generate(Rule(), PROMPT, max_tokens=3, sampler=sampler))
    assert seen == [[PROMPT], [PROMPT + said[:1]], [PROMPT + said[:2]]]


PROMPTS = [PROMPT[:n] for n in (1, 2, 3, 5, 7, 8, 10, 11)]


@pytest.mark.parametrize("prefill", [3, 512])
def test_a_batch_gives_what_each_prompt_alone_gives(prefill):
    model = Rule(24)
    prompts, eos = [[t % 24 for t in prompt] for prompt in PROMPTS], [3, 17]
    single = [ids(generate(model, prompt, max_tokens=20, eos=eos)) for prompt in prompts]
    assert len({len(row) for row in single}) > 3
    model.calls.clear()
    assert batch_generate(model, prompts, max_tokens=20, eos=eos, prefill=prefill) == single
    rows = [call[0] for call in model.calls]
    assert rows == sorted(rows, reverse=True) and rows[0] == 8 and rows[-1] < 8  # rows that have ended are dropped
    assert all(call[2] == 1 for call in model.calls)


def test_batches_stop_at_strings(tokenizer):
    model = script("abc", tokenizer)
    assert batch_generate(model, [PROMPT, PROMPT], tokenizer=tokenizer, stop=["b"]) == [tokenizer.encode("ab")] * 2
    assert batch_generate(model, []) == []


def test_fixed_capacity():
    model = Rule()
    tokens = list(generate(model, PROMPT, caches=model.make_caches(capacity=14)))
    assert ids(tokens) == model.follow(PROMPT, 4) and tokens[-1].finish == "length"  # the last one needs no room
    for draft in (Rule(), Rule(rule=lambda tokens: 0)):
        assert ids(generate(model, PROMPT, caches=model.make_caches(capacity=14), draft=draft)) == ids(tokens)
    caches = model.make_caches(capacity=10)
    with pytest.raises(ValueError, match="at most as long as the caches' capacity, 10, got 11"):
        generate(model, PROMPT, caches=caches)
    assert caches[0].length == 0
    assert [len(row) for row in batch_generate(model, PROMPTS, capacity=13)] == [3] * 8


def test_padding_takes_room_of_a_capacity():
    """A short row of a batch gets fewer tokens than alone."""
    model = Rule()
    alone = ids(generate(model, PROMPT[:3], caches=model.make_caches(capacity=14)))
    assert len(alone) == 12
    rows = batch_generate(model, [PROMPT[:3], PROMPT], capacity=14)
    assert rows == [alone[:4], model.follow(PROMPT, 4)]


def test_progress():
    """Of what the caches lack, after each chunk and before the first token; then of a draft model's reading."""
    model, told = Rule(), []

    def progress(done, total):
        told.append((done, total, caches[0].length))

    caches = model.make_caches()
    steps = generate(model, PROMPT[:10], max_tokens=5, prefill=4, caches=caches, progress=progress)
    assert told == []
    next(steps)
    assert told == [(4, 10, 4), (8, 10, 8), (10, 10, 10)]
    steps.close()
    caches[0].trim(caches[0].length - 7)
    told.clear()
    plain = ids(generate(model, PROMPT, max_tokens=20, caches=caches, progress=progress))
    assert told == [(4, 4, 11)]
    caches, draft = model.make_caches(), Rule(rule=almost(model, 3))
    told.clear()
    given = {"caches": caches, "draft": draft, "progress": progress, "prefill": 8}
    assert ids(generate(model, PROMPT, max_tokens=20, **given)) == plain
    assert told == [(8, 11, 8), (11, 11, 11), (8, 12, 11), (12, 12, 11)]


def test_a_callback_that_raises_leaves_whole_caches():
    model = Rule()
    caches = model.make_caches()

    def progress(done, total):
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(generate(model, PROMPT, prefill=4, caches=caches, progress=progress))
    assert caches[0].rows == [PROMPT[:8]]
    assert ids(generate(model, PROMPT, max_tokens=5, caches=caches)) == model.follow(PROMPT, 5)


def held(count, **options):
    """Caches of a Rule that hold so many tokens."""
    caches = Rule().make_caches(**options)
    caches[0].rows = [list(range(count))]
    return caches


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "prompt must hold at least one token, got none"),
        ({"prompt": [1, 258]}, "prompt must hold tokens from 0 to 257, got 258"),
        ({"prompt": [1, -1]}, "prompt must hold tokens from 0 to 257, got -1"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"prefill": 0}, "prefill must be at least 1, got 0"),
        ({"ahead": 0, "draft": Rule()}, "ahead must be at least 1, got 0"),
        ({"stop": ["a"]}, "stop must come with a tokenizer"),
        ({"stop": "a"}, "stop must be a sequence of strings that are not empty, got 'a'"),
        ({"stop": [""]}, "stop must be a sequence of strings that are not empty"),
        ({"draft": Rule(259)}, "draft must have the vocabulary of the model, 258 tokens, got 259"),
        ({"draft": Rule(), "caches": Rule().make_caches(window=4, slack=3)}, "must have a slack of 4, .* got 3"),
        ({"caches": []}, "^caches must have one cache for each of 1 layers, got 0"),
        ({"draft": Rule(), "draft_caches": []}, "draft_caches must have one cache for each of 1 layers, got 0"),
        ({"draft": Rule(), "draft_caches": held(12)}, "draft_caches must hold no more than the prompt, 11 .* got 12"),
        ({"draft": Rule(), "draft_caches": held(0, capacity=17)}, "draft_caches must .* at least 18, got 17"),
        ({"caches": Rule().make_caches(padding=[0, 3])}, r"^caches must have .* without padding, got padding \[0, 3\]"),
        ({"caches": Rule().make_caches(padding=[0, 0])}, "^caches must have one row, got 2"),
        ({"draft": Rule(), "draft_caches": held(0, padding=[2])}, "draft_caches must have one row without padding"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_computed(options, message):
    model = Rule()
    with pytest.raises(ValueError, match=message):
        generate(model, **{"prompt": PROMPT, "max_tokens": 9} | options)
    assert model.calls == []


# A small CausalLM with real caches, against passes over the whole text without one.


@pytest.fixture(scope="module")
def decoder():
    return tiny_causal_lm()


def draw_prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 263, length).tolist() for length in lengths]


def plainly(model, prompt, count):
    """Greedy tokens, each from a pass over everything, without a cache."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(mx.argmax(model(mx.array(tokens, mx.int32)[None])[0, -1]).item()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("window", [None, 19])
@pytest.mark.parametrize("prefill", [7, 512])
def test_generation_is_the_argmax_of_whole_passes(decoder, prefill, window):
    """The uncached pass has the window in its configuration."""
    (prompt,) = draw_prompts(31)
    expected = plainly(tiny_causal_lm(window=window), prompt, 60)
    assert len(set(expected)) > 20
    caches = decoder.make_caches(window=window)
    assert ids(generate(decoder, prompt, max_tokens=60, caches=caches, prefill=prefill)) == expected


@pytest.mark.parametrize("options", [{}, {"window": 13}, {"window": 13, "keep": 3}, {"bits": 8}], ids=str)
def test_batches_of_a_decoder(decoder, options):
    prompts = draw_prompts(1, 2, 5, 11, 17, 23, 29, 41)
    eos = [5, 143]
    single = [
        ids(generate(decoder, prompt, max_tokens=50, eos=eos, caches=decoder.make_caches(**options)))
        for prompt in prompts
    ]
    assert len({len(row) for row in single}) > 3
    assert batch_generate(decoder, prompts, max_tokens=50, eos=eos, prefill=16, **options) == single


@pytest.mark.parametrize("options", [{}, {"window": 64}, {"window": 64, "keep": 4}, {"bits": 4}], ids=str)
@pytest.mark.parametrize("other", [False, True], ids=["itself", "two random layers"])
def test_speculation_equals_plain_decoding(decoder, options, other):
    """Over 200 tokens, so that a window of 64 has moved on."""
    draft = tiny_causal_lm(seed=2, num_layers=2) if other else decoder
    (prompt,) = draw_prompts(37, seed=3)
    caches = decoder.make_caches(**options)
    expected = ids(generate(decoder, prompt, max_tokens=200, caches=caches))
    slack = options | {"slack": 4}
    caches, draft_caches = decoder.make_caches(**slack), draft.make_caches(**slack)
    found = generate(decoder, prompt, max_tokens=200, caches=caches, draft=draft, draft_caches=draft_caches)
    assert ids(found) == expected and len(set(expected)) > 40
    assert caches[0].length == len(prompt) + 199


def test_batches_with_a_penalty(decoder):
    """Each row goes by its own history, also after others have ended."""
    prompts, sampler = draw_prompts(29, 3, 17, 11, 41, 7), make_sampler(repetition_penalty=1.4)
    given = {"max_tokens": 40, "eos": [5, 143, 20, 77], "sampler": sampler}
    single = [ids(generate(decoder, prompt, **given)) for prompt in prompts]
    assert len({len(row) for row in single}) > 3 and len(single[0]) < max(map(len, single))
    assert single != [ids(generate(decoder, prompt, **given | {"sampler": greedy})) for prompt in prompts]
    assert batch_generate(decoder, prompts, **given) == single


@pytest.mark.parametrize("count", [3, 4, 9, 30])
def test_draft_caches_that_just_suffice(decoder, count):
    (prompt,) = draw_prompts(31)
    plain = ids(generate(decoder, prompt, max_tokens=count))
    for draft in (decoder, tiny_causal_lm(seed=2, num_layers=2)):
        given = {"draft": draft, "max_tokens": count}
        draft_caches = draft.make_caches(capacity=31 + count - 2)
        assert ids(generate(decoder, prompt, draft_caches=draft_caches, **given)) == plain
        with pytest.raises(ValueError, match=f"capacity of at least {29 + count}, got {28 + count}"):
            generate(decoder, prompt, draft_caches=draft.make_caches(capacity=28 + count), **given)


def test_caches_of_something_else(decoder):
    (prompt,) = draw_prompts(5)
    batch = decoder.make_caches()
    decoder(mx.array([prompt[:3]] * 2), caches=batch)
    with pytest.raises(ValueError, match=r"^caches must have one row, got 2"):
        generate(decoder, prompt, caches=batch)
    uneven = decoder.make_caches()
    decoder(mx.array([prompt[:3]]), caches=uneven)
    uneven[1].trim(1)
    with pytest.raises(ValueError, match=r"^caches must all hold the same number of tokens, got 2 to 3"):
        generate(decoder, prompt, caches=uneven)
    with pytest.raises(ValueError, match=r"^caches must have one cache for each of 3 layers, got 2"):
        generate(decoder, prompt, caches=decoder.make_caches()[:2])


def test_draws_do_not_depend_on_batches_that_went_before(decoder):
    """The state of MLX's own generator plays no part."""
    prompts, sampler = draw_prompts(3, 7), make_sampler(0.8, seed=11)
    mx.random.seed(1)
    first = batch_generate(decoder, prompts, max_tokens=20, sampler=sampler)
    mx.random.seed(2)
    assert batch_generate(decoder, prompts, max_tokens=20, sampler=sampler) == first
    other = make_sampler(0.8, seed=12)
    assert batch_generate(decoder, prompts, max_tokens=20, sampler=other) != first


def test_a_fixed_cache_that_is_too_short(decoder):
    (prompt,) = draw_prompts(31)
    caches = decoder.make_caches(capacity=29)
    with pytest.raises(ValueError, match="prompt must be at most as long as the caches' capacity, 29, got 31"):
        generate(decoder, prompt, caches=caches)
    tokens = list(generate(decoder, prompt, caches=decoder.make_caches(capacity=35)))
    assert ids(tokens) == plainly(decoder, prompt, 5) and tokens[-1].finish == "length"
