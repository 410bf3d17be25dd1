"""Generation by a real language model, TinyStories-656K, from the folder named by MLX_XFORMER_DATA."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from support.harness import data_folder

from mlx_xformer.cli import main
from mlx_xformer.converters.conversion import convert
from mlx_xformer.models.causal_lm.model import CausalLM
from mlx_xformer.models.families import load_model
from mlx_xformer.text.generation import batch_generate, generate
from mlx_xformer.text.prompt_cache import load_prompt, reuse, save_prompt
from mlx_xformer.text.samplers import make_sampler
from mlx_xformer.text.tokenizer import Tokenizer

pytestmark = pytest.mark.real
PROMPT = "Once upon a time, there was a little girl"
TEXT = (
    ". She was three years old. She loved to explore and explore her house. One day, she saw a small bird flying in the"
    " sky."
)
PROMPTS = [
    PROMPT,
    "Tom",
    "One day, a cat and a dog went to the park. They saw a big",
    "The sun was",
    "Lily liked to play with her toys. Her favourite was a red ball that her grandmother had given to her, and",
    '"Can I have some cake?" asked the old man with a long white beard',
    "In a deep forest there lived an old bear who was always hungry. One morning he woke up and",
    "Ben and Mia are twins. They",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("story") / "story"
    convert(data_folder() / "story", out)
    return out


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def golden():
    return np.load(data_folder() / "golden" / "story.npz")


def ids(tokens):
    return [token.id for token in tokens]


def test_the_text_token_for_token(model, tokenizer, golden):
    prompt, expected = tokenizer.encode(PROMPT), golden["greedy"][0].tolist()
    assert prompt == golden["ids"][0].tolist()
    tokens = list(generate(model, prompt, max_tokens=len(expected) - len(prompt), tokenizer=tokenizer))
    assert prompt + ids(tokens) == expected
    assert "".join(token.text for token in tokens).startswith(TEXT)


def test_the_command(folder, capsys):
    assert main(["generate", str(folder), PROMPT, "--max-tokens", "100", "--stop", " The bird"]) == 0
    captured = capsys.readouterr()
    assert captured.out == TEXT + "\n" and "tokens" in captured.err


def test_stories_end(model, tokenizer):
    tokens = list(generate(model, tokenizer.encode("Tom"), max_tokens=600, tokenizer=tokenizer))
    assert tokens[-1].finish == "eos" and tokens[-1].id == 2 and tokens[-1].text == ""


@pytest.mark.parametrize("options", [{}, {"window": 64}, {"bits": 8}], ids=str)
def test_a_batch_of_eight_equals_each_alone(model, tokenizer, options):
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    assert len({len(prompt) for prompt in prompts}) == 8
    single = [
        ids(generate(model, prompt, max_tokens=200, tokenizer=tokenizer, caches=model.make_caches(**options)))
        for prompt in prompts
    ]
    assert batch_generate(model, prompts, max_tokens=200, tokenizer=tokenizer, **options) == single


@pytest.mark.parametrize("options", [{}, {"window": 64}, {"window": 64, "keep": 4}], ids=str)
@pytest.mark.parametrize("other", [False, True], ids=["itself", "two random layers"])
def test_speculation_equals_plain_decoding(model, tokenizer, options, other):
    """Over 200 tokens, so that a window of 64 has moved on."""
    draft = random_draft(model) if other else model
    prompt = tokenizer.encode(PROMPT)
    expected = ids(generate(model, prompt, max_tokens=200, caches=model.make_caches(**options)))
    slack = options | {"slack": 4}
    caches, draft_caches = model.make_caches(**slack), draft.make_caches(**slack)
    given = {"draft": draft, "caches": caches, "draft_caches": draft_caches}
    assert ids(generate(model, prompt, max_tokens=200, **given)) == expected


def random_draft(model):
    mx.random.seed(0)
    draft = CausalLM(model.config)
    mx.eval(draft.parameters())
    return draft


def test_a_window_is_an_uncached_pass_with_its_mask(model, tokenizer):
    """The command's --window 64, token for token."""
    prompt = tokenizer.encode(PROMPT)
    config = type(model.config).from_dict(model.config.to_dict() | {"window": 64})
    windowed = CausalLM(config)
    windowed.update(model.parameters())
    tokens = list(prompt)
    for _ in range(150):
        tokens.append(int(mx.argmax(windowed(mx.array(tokens, mx.int32)[None])[0, -1]).item()))
    caches = model.make_caches(window=64)
    assert ids(generate(model, prompt, max_tokens=150, caches=caches)) == tokens[len(prompt) :]


def test_the_command_with_a_window_a_draft_and_a_prompt_cache(folder, tmp_path, capsys):
    def text(*more):
        assert main(["generate", str(folder), PROMPT, "--max-tokens", "200", "--json", *map(str, more)]) == 0
        return json.loads(capsys.readouterr().out)

    plain, windowed = text(), text("--window", 64)
    assert plain["text"].startswith(TEXT) and windowed["text"].startswith(TEXT) and plain["text"] != windowed["text"]
    assert text("--draft", folder)["text"] == plain["text"]
    assert text("--draft", folder, "--window", 64)["text"] == windowed["text"]
    kept = ["--prompt-cache", tmp_path / "kept"]
    assert text(*kept)["reused_tokens"] == 0
    again = text(*kept)
    assert again["text"] == plain["text"] and again["reused_tokens"] == 7


def test_a_prompt_cache_equals_fresh_ones(model, tokenizer, tmp_path):
    prompt, sampler = tokenizer.encode(PROMPTS[2]), make_sampler(0.8, top_p=0.9, seed=1)
    caches = model.make_caches()
    text = prompt + ids(generate(model, prompt, max_tokens=50, caches=caches))
    save_prompt(tmp_path / "kept", model, caches, text)
    for following in ([*text, 5, 6], [*text[:30], 5, 6]):
        caches, held = load_prompt(tmp_path / "kept", model)
        assert reuse(caches, held, following) == min(len(following) - 2, len(held))
        found = ids(generate(model, following, max_tokens=50, caches=caches, sampler=sampler))
        assert found == ids(generate(model, following, max_tokens=50, sampler=sampler))
