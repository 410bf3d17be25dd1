"""Prompt caches on disk: what they hold, whom they serve, and that what is generated with them is as without."""

import mlx.core as mx
import numpy as np
import pytest
from support.text import tiny_causal_lm

from mlx_xformer.nn.cache import save_caches
from mlx_xformer.text.generation import generate
from mlx_xformer.text.prompt_cache import fingerprint, load_prompt, reuse, save_prompt

PROMPT = np.random.default_rng(5).integers(0, 263, 43).tolist()
KINDS = [{}, {"window": 16, "slack": 4}, {"window": 16, "keep": 3, "slack": 4}, {"bits": 8}, {"window": 16, "bits": 4}]


@pytest.fixture(scope="module")
def decoder():
    return tiny_causal_lm()


def tokens_of(model, prompt, caches, count=30):
    return [token.id for token in generate(model, prompt, max_tokens=count, caches=caches)]


@pytest.fixture(params=KINDS, ids=str)
def saved(request, decoder, tmp_path):
    """(the options of the caches, a file of them, the text that they saw)"""
    caches = decoder.make_caches(**request.param)
    text = PROMPT + tokens_of(decoder, PROMPT, caches)
    save_prompt(tmp_path / "prompt", decoder, caches, text)
    return request.param, tmp_path / "prompt", text


def test_what_a_file_holds(saved, decoder):
    options, path, text = saved
    caches, tokens = load_prompt(path, decoder)
    assert tokens == text[:-1] and [cache.length for cache in caches] == [len(tokens)] * 3
    assert all(getattr(cache, name) == value for cache in caches for name, value in options.items())


def test_a_prompt_that_goes_on(saved, decoder):
    """All that is held serves."""
    options, path, text = saved
    caches, tokens = load_prompt(path, decoder)
    prompt = [*text, 3, 1, 4]
    assert reuse(caches, tokens, prompt) == len(text) - 1
    fresh = decoder.make_caches(**options)
    if "bits" in options:
        tokens_of(decoder, PROMPT, fresh)  # by the same steps, so that it rounds as the file's did
    assert tokens_of(decoder, prompt, caches) == tokens_of(decoder, prompt, fresh)


@pytest.mark.parametrize("shared", [0, 1, 20, 43, 68, 69, 71])
def test_a_prompt_that_parts(saved, decoder, shared):
    """What is shared is kept, or everything computed anew where a window has moved on."""
    options, path, text = saved
    prompt = [*text[:shared], (text[shared] + 1) % 263, 7]
    caches, tokens = load_prompt(path, decoder)
    reused = reuse(caches, tokens, prompt)
    reach = len(text) - 1 if "window" not in options else options.get("slack", 0)
    assert reused == (shared if len(text) - 1 - shared <= reach else 0)
    if options.get("bits") is None:
        assert tokens_of(decoder, prompt, caches) == tokens_of(decoder, prompt, decoder.make_caches(**options))


@pytest.mark.parametrize("end", [1, 30, 43, 72])
def test_a_prompt_that_is_held_as_a_whole(decoder, end):
    """Its last token is read again, for its logits."""
    caches = decoder.make_caches()
    text = PROMPT + tokens_of(decoder, PROMPT, caches)
    assert reuse(caches, text[:-1], text[:end]) == end - 1
    assert tokens_of(decoder, text[:end], caches) == tokens_of(decoder, text[:end], decoder.make_caches())


def test_rewinding_is_all_or_nothing(decoder):
    """Layers with windows of their own: one that cannot go back empties all."""
    model = tiny_causal_lm(window=11, layer_types=["local", "global", "local"])
    caches = model.make_caches()
    text = PROMPT + tokens_of(model, PROMPT, caches)
    prompt = [*text[:20], 1, 2]
    assert reuse(caches, text[:-1], prompt) == 0 and {cache.length for cache in caches} == {0}
    assert tokens_of(model, prompt, caches) == tokens_of(model, prompt, model.make_caches())


def test_fingerprints(decoder):
    assert fingerprint(decoder) == fingerprint(tiny_causal_lm())
    others = [tiny_causal_lm(seed=2), tiny_causal_lm(norm_eps=1e-5), tiny_causal_lm(rope_theta=5000.0)]
    changed = tiny_causal_lm()
    changed.model.norm.weight = changed.model.norm.weight + 0.01
    half = tiny_causal_lm()
    half.set_dtype(mx.bfloat16)
    assert len({fingerprint(model) for model in [decoder, changed, half, *others]}) == 6


def test_files_that_are_refused(decoder, tmp_path):
    caches = decoder.make_caches()
    text = PROMPT + tokens_of(decoder, PROMPT, caches)
    save_prompt(tmp_path / "prompt", decoder, caches, text)
    with pytest.raises(ValueError, match="prompt: this is the prompt cache of another model"):
        load_prompt(tmp_path / "prompt", tiny_causal_lm(seed=2))
    save_caches(tmp_path / "plain", caches, {})
    with pytest.raises(ValueError, match="plain: not a prompt cache: it names no model and tokens"):
        load_prompt(tmp_path / "plain", decoder)
    for tokens in ("x", "[1, [2]]", "3"):
        save_caches(tmp_path / "broken", caches, {"model": fingerprint(decoder), "tokens": tokens})
        with pytest.raises(ValueError, match="broken: not a prompt cache: its tokens cannot be read"):
            load_prompt(tmp_path / "broken", decoder)
    save_caches(tmp_path / "short", caches, {"model": fingerprint(decoder), "tokens": "[1, 2]"})
    with pytest.raises(ValueError, match="short: the caches must hold its 2 tokens, got 72"):
        load_prompt(tmp_path / "short", decoder)
    (tmp_path / "text").write_text("nothing of the kind")
    with pytest.raises(ValueError, match="text"):
        load_prompt(tmp_path / "text", decoder)
    with pytest.raises(ValueError, match="tokens must be all that the caches hold, 72, got 43"):
        save_prompt(tmp_path / "new", decoder, caches, PROMPT)
    assert not (tmp_path / "new").exists()
