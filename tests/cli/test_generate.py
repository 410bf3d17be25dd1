"""mlx-xformer generate as users meet it: the text, the options, one line for a mistake, Ctrl-C."""

import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import soundfile
from support.text import language_model, word_tokenizer

from mlx_xformer.cli import main
from mlx_xformer.models.families import load_model
from mlx_xformer.nn.cache import KVCache
from mlx_xformer.text.generation import generate
from mlx_xformer.text.prompt_cache import load_prompt
from mlx_xformer.text.samplers import make_sampler
from mlx_xformer.text.tokenizer import Tokenizer

PROMPT = "hello hell, world"
CHILD = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"  # also in the background
    "from mlx_xformer.cli import main; sys.exit(main(sys.argv[1:]))"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return language_model(tmp_path_factory.mktemp("models") / "tiny", chat=True)


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    return language_model(tmp_path_factory.mktemp("models") / "draft", seed=2, num_layers=2)


def run(*arguments):
    return main(["generate", *map(str, arguments)])


def text_of(folder, prompt=PROMPT, **options):
    """What Python's generate gives."""
    model, tokenizer = load_model(folder), Tokenizer(folder)
    prompt = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    caches = model.make_caches(**{name: options.pop(name) for name in ("window", "keep", "bits") if name in options})
    given = {"max_tokens": 40, "tokenizer": tokenizer, "caches": caches} | options
    return "".join(token.text for token in generate(model, prompt, **given))


def answer(capsys, *arguments):
    """The JSON that comes of a command line."""
    assert run(*arguments, "--max-tokens", 40, "--json") == 0
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out.count("\n") == 1
    return json.loads(captured.out)


def test_text_goes_to_stdout_and_what_it_took_to_stderr(folder, capsys):
    assert run(folder, PROMPT, "--max-tokens", 40) == 0
    captured = capsys.readouterr()
    assert captured.out == text_of(folder) + "\n"
    line = r"prompt 11 tokens, [\d.]+ per second; generated 40, [\d.]+ per second; peak memory \d+ MiB\n"
    assert re.fullmatch(line, captured.err)


def test_a_prompt_from_standard_input(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT + "\n"))
    assert answer(capsys, folder, "-")["text"] == text_of(folder)


def test_json(folder, capsys):
    found = answer(capsys, folder, PROMPT)
    assert found["text"] == text_of(folder) and found["finish"] == "length"
    assert (found["prompt_tokens"], found["reused_tokens"], found["tokens"]) == (11, 0, 40)
    assert found["prefill_tokens_per_second"] > 0 and found["decode_tokens_per_second"] > 0
    assert found["peak_memory"] > 0
    assert run(folder, PROMPT, "--max-tokens", 1, "--json") == 0
    assert json.loads(capsys.readouterr().out)["decode_tokens_per_second"] is None


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (["--temp", 0.9, "--seed", 3], {"sampler": make_sampler(0.9, seed=3)}),
        (["--temp", 2, "--top-k", 5, "--top-p", 0.9], {"sampler": make_sampler(2, top_k=5, top_p=0.9)}),
        (["--temp", 1.5, "--min-p", 0.1], {"sampler": make_sampler(1.5, min_p=0.1)}),
        (["--repetition-penalty", 1.3], {"sampler": make_sampler(repetition_penalty=1.3)}),
        (["--window", 9], {"window": 9}),
        (["--window", 9, "--keep", 4], {"window": 9, "keep": 4}),
        (["--kv-bits", 4], {"bits": 4}),
    ],
)
def test_options_reach_the_generation(folder, capsys, given, options):
    found = answer(capsys, folder, PROMPT, *given)["text"]
    assert found == text_of(folder, **options) and found != text_of(folder)


def test_stop_strings(folder, capsys):
    text = text_of(folder)
    stop = text[10:13]
    found = answer(capsys, folder, PROMPT, "--stop", "never said", "--stop", stop)
    assert found["text"] == text[: text.index(stop)] and found["finish"] == "stop"


@pytest.mark.parametrize("more", [[], ["--window", 16], ["--temp", 0.7, "--seed", 2]], ids=str)
def test_a_draft_model_changes_nothing(folder, draft, capsys, more):
    plain = answer(capsys, folder, PROMPT, *more)["text"]
    assert answer(capsys, folder, PROMPT, *more, "--draft", draft)["text"] == plain
    assert answer(capsys, folder, PROMPT, *more, "--draft", folder)["text"] == plain


@pytest.mark.parametrize("more", [[], ["--window", 12], ["--temp", 0.7, "--seed", 2], ["--kv-bits", 8]], ids=str)
def test_prompt_caches(folder, capsys, tmp_path, more):
    """A text that goes on takes all of it; one that parts takes what is shared, if a window has not moved on."""
    model = word_tokenizer(shutil.copytree(folder, tmp_path / "words"))
    file, prompt = ["--prompt-cache", tmp_path / "kept"], "w3 w1 w4 w1 w5"
    first = answer(capsys, model, prompt, *more, *file)
    assert first["reused_tokens"] == 0 and first["text"] == answer(capsys, model, prompt, *more)["text"]
    longer = prompt + first["text"] + " w9 w2"
    second = answer(capsys, model, longer, *more, *file)
    assert second["reused_tokens"] == 44 and second["prompt_tokens"] == 47
    other = longer.rsplit(" ", 10)[0] + " w7 w8"
    third = answer(capsys, model, other, *more, *file)
    assert third["reused_tokens"] == (0 if "--window" in more else 37)
    if "--kv-bits" not in more:  # where chunks round differently
        assert second["text"] == answer(capsys, model, longer, *more)["text"]
        assert third["text"] == answer(capsys, model, other, *more)["text"]
    assert run(model, other, *more, *file, "--max-tokens", 2) == 0
    reused = 0 if "--window" in more else 38
    assert f"({reused} of them from the prompt cache)" in capsys.readouterr().err or not reused


def test_chat(folder, capsys):
    tokenizer = Tokenizer(folder)
    for given, messages in (
        ([], [("user", "Hi")]),
        (["--system", "Be brief."], [("system", "Be brief."), ("user", "Hi")]),
    ):
        text = tokenizer.chat([{"role": role, "content": content} for role, content in messages])
        expected = text_of(folder, tokenizer.encode(text, special=False))
        assert answer(capsys, folder, "Hi", "--chat", *given)["text"] == expected


def one_line(capsys, *arguments):
    """The line that a mistake gives."""
    assert run(*arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("mlx-xformer: ")
    return captured.err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--max-tokens", 0], "--max-tokens must be at least 1, got 0"),
        (["--temp", -1], "temperature must be at least 0 and finite, got -1"),
        (["--top-p", 0.9], "top_p must come with a temperature above 0"),
        (["--temp", 1, "--top-p", 7], "top_p must be above 0 and at most 1, got 7"),
        (["--temp", 1, "--top-k", 0], "top_k must be at least 1, got 0"),
        (["--seed", -1], "seed must be at least 0 and below 2**32, got -1"),
        (["--stop", ""], "--stop must not be empty"),
        (["--window", 0], "window must be at least 1, got 0"),
        (["--keep", 4], "--keep must come with --window"),
        (["--system", "x"], "--system must come with --chat"),
        (["--prompt-cache", "no/such/folder/file"], "--prompt-cache must be in a folder that can be written to"),
        (["--prompt-cache", ""], "--prompt-cache must be a file, got an empty name"),
        (["--prompt-cache", "."], "--prompt-cache must be a file, got the folder ."),
        (["--chat", "--system", "a\udcff"], "--system must be UTF-8, got bytes that are not"),
        (["--draft", "no/such/folder"], "no/such/folder: no such file or folder"),
        (["--draft", "htdemucs_mini"], "htdemucs_mini: must be a language model, got one of family htdemucs"),
    ],
    ids=str,
)
def test_options_that_cannot_be(folder, capsys, given, message):
    assert message in one_line(capsys, folder, PROMPT, *given)


def test_empty_prompts(folder, capsys, monkeypatch):
    assert "PROMPT must not be empty" in one_line(capsys, folder, "")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert "PROMPT must not be empty" in one_line(capsys, folder, "-")


def test_prompts_that_are_not_utf_8(folder, capsys, monkeypatch):
    """As Python has them: surrogates in arguments, and from standard input by its error handler."""
    assert "PROMPT must be UTF-8, got bytes that are not" in one_line(capsys, folder, "a\udcff\udcfe")
    for errors in ("strict", "surrogateescape"):
        given = io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), "utf-8", errors)
        monkeypatch.setattr(sys, "stdin", given)
        assert "PROMPT must be UTF-8, got bytes that are not" in one_line(capsys, folder, "-")


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize("held", [0, 700])
def test_a_bar_shows_how_far_the_prompt_is_read(folder, tmp_path, capsys, monkeypatch, held):
    file, prompt = tmp_path / "kept", "a" * 1300
    if held:
        assert run(folder, prompt[:held], "--max-tokens", 1, "--prompt-cache", file) == 0
        capsys.readouterr()
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    monkeypatch.setattr("tqdm.std.time", itertools.count().__next__)  # a second between updates
    assert run(folder, prompt, "--max-tokens", 3, "--prompt-cache", file) == 0
    shown = re.findall(r"prompt: .*? (\d+)/(\d+) ", screen.getvalue())
    total = 1300 - held
    steps = [0, *range(512, total, 512), total]
    assert shown == [(str(step), str(total)) for step in steps]
    *_, bar, rest = screen.getvalue().split("\r")
    text = text_of(folder, prompt, max_tokens=3)
    assert not bar.strip() and rest.startswith(text + "\nprompt 1300 tokens")  # the bar is wiped before the text


def test_models_that_are_none(folder, tmp_path, capsys):
    assert "no such file or folder" in one_line(capsys, tmp_path / "gone", PROMPT)
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in one_line(capsys, tmp_path / "empty", PROMPT)
    assert "must be a language model, got one of family htdemucs" in one_line(capsys, "htdemucs_mini", PROMPT)
    weights = shutil.copytree(folder, tmp_path / "no_weights") / "model.safetensors"
    weights.unlink()
    assert "it has no model.safetensors" in one_line(capsys, weights.parent, PROMPT)


def test_broken_weights(folder, tmp_path, capsys):
    cut = shutil.copytree(folder, tmp_path / "cut") / "model.safetensors"
    os.truncate(cut, cut.stat().st_size - 100)
    assert "not a whole safetensors file" in one_line(capsys, cut.parent, PROMPT)
    config = shutil.copytree(folder, tmp_path / "more") / "config.json"
    content = json.loads(config.read_text())
    content["config"]["num_layers"] = 4
    config.write_text(json.dumps(content))
    assert "model.layers.3." in one_line(capsys, config.parent, PROMPT)


def test_tokenizers_that_are_none(folder, draft, tmp_path, capsys):
    file = shutil.copytree(folder, tmp_path / "model") / "tokenizer.json"
    file.write_text("{}")
    assert "not a tokenizer" in one_line(capsys, file.parent, PROMPT)
    file.unlink()
    assert f"{file.parent}: no tokenizer.json" in one_line(capsys, file.parent, PROMPT)
    assert "the tokenizer has no chat template" in one_line(capsys, draft, PROMPT, "--chat")


def test_a_tokenizer_of_another_model(tmp_path, capsys):
    model = language_model(tmp_path / "small", vocab_size=101)
    assert "prompt must hold tokens from 0 to 100" in one_line(capsys, model, "\u00ff")


def test_prompt_caches_that_do_not_serve(folder, draft, tmp_path, capsys):
    """One line, and the file is as it was."""
    file = tmp_path / "kept"
    assert run(draft, PROMPT, "--max-tokens", 5, "--prompt-cache", file) == 0
    before = file.read_bytes()
    capsys.readouterr()
    assert "kept: this is the prompt cache of another model" in one_line(capsys, folder, PROMPT, "--prompt-cache", file)
    line = one_line(capsys, draft, PROMPT, "--prompt-cache", file, "--window", 9)
    assert "kept: made with window None, got window 9" in line
    assert "bits" in one_line(capsys, draft, PROMPT, "--prompt-cache", file, "--kv-bits", 8)
    weights = tmp_path / "model.safetensors"
    shutil.copy(folder / "model.safetensors", weights)
    assert str(weights) in one_line(capsys, folder, PROMPT, "--prompt-cache", weights)
    assert file.read_bytes() == before and weights.read_bytes() == (folder / "model.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "model.safetensors"]


def test_a_language_model_does_not_separate(folder, tmp_path, capsys):
    soundfile.write(tmp_path / "song.wav", [[0.1, 0.2]] * 3000, 8000)
    assert main(["separate", str(tmp_path / "song.wav"), "-n", str(folder), "-o", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "must be a model that separates, got a CausalLM" in captured.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["model"], ["model", "x", "--kv-bits", "5"], ["model", "x", "--topp", "1"]])
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(*arguments)
    assert exit_.value.code == 2 and "usage: mlx-xformer" in capsys.readouterr().err


def start(*arguments, **given):
    command = [sys.executable, "-c", CHILD, "generate", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, **given)


def test_interrupt_keeps_what_was_printed(folder, tmp_path):
    out, kept = tmp_path / "out.txt", tmp_path / "kept"
    with out.open("wb") as file:
        process = start(folder, PROMPT, "--max-tokens", 10**6, "--prompt-cache", kept, stdout=file)
    limit = time.monotonic() + 60
    while out.stat().st_size < 200 and time.monotonic() < limit:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode().splitlines()[-1] == "mlx-xformer: interrupted" and b"Traceback" not in err
    text = out.read_bytes()
    assert text.endswith(b"\n") and len(text) > 200
    assert text_of(folder, max_tokens=200).encode().startswith(text[:150])
    assert len(kept_text(folder, kept)) >= 40


def kept_text(folder, path):
    """The tokens after PROMPT in a prompt cache, which are as they would be without an end in the middle."""
    model, prompt = load_model(folder), Tokenizer(folder).encode(PROMPT)
    caches, tokens = load_prompt(path, model)
    said = [token.id for token in generate(model, prompt, max_tokens=len(tokens) - len(prompt) + 5)]
    assert tokens == (prompt + said)[: len(tokens)]
    rest = [token.id for token in generate(model, prompt + said[:-4], max_tokens=4, caches=caches)]
    assert rest == said[-4:]  # the keys and values too
    assert [path.name for path in path.parent.iterdir() if path.name.startswith(".")] == []
    return tokens[len(prompt) :]


@pytest.mark.parametrize("more", [[], ["--json"]], ids=str)
@pytest.mark.parametrize("drafted", [False, True])
def test_interrupts_while_a_prompt_is_read(folder, draft, tmp_path, capsys, monkeypatch, more, drafted):
    """Ctrl-C in the middle of a step waits for its end; what has been read by then is read once."""
    file, prompt, append = tmp_path / "kept", "a" * 1300, KVCache.append

    def interrupted(cache, k, v, **options):
        if cache.length == 512 and not calls:
            calls.append(1)
            signal.raise_signal(signal.SIGINT)
        return append(cache, k, v, **options)

    calls = []
    arguments = [folder, prompt, "--max-tokens", 3, "--prompt-cache", file, *(["--draft", draft] if drafted else [])]
    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "append", interrupted)
        assert run(*arguments, *more) == 130
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "mlx-xformer: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    found = answer(capsys, *arguments)
    assert found["reused_tokens"] == 1024 and found["text"] == text_of(folder, prompt)


def test_a_second_interrupt_does_not_wait(folder, tmp_path, capsys, monkeypatch):
    """The file is as it was."""
    file = tmp_path / "kept"
    assert run(folder, PROMPT, "--max-tokens", 3, "--prompt-cache", file) == 0
    before = file.read_bytes()

    def interrupted(cache, k, v, **options):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second waits as well")

    monkeypatch.setattr(KVCache, "append", interrupted)
    assert run(folder, PROMPT + "a", "--prompt-cache", file) == 130
    assert file.read_bytes() == before and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("drafted", [False, True])
def test_closed_output(folder, tmp_path, drafted):
    """`mlx-xformer generate ... | head -c 10`, also where a draft model's right guesses have not been shown."""
    more = ["--draft", folder] if drafted else []
    kept = tmp_path / "kept"
    process = start(folder, PROMPT, "--max-tokens", 10**5, "--prompt-cache", kept, *more, stdout=subprocess.PIPE)
    assert len(process.stdout.read(10)) == 10
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 1 and b"Traceback" not in err
    process.stderr.close()
    assert len(kept_text(folder, kept)) >= 3
