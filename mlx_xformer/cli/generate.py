"""The command generate."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backend import device
from .streaming import Generated, Interrupted, interrupt_between_steps, print_text

if TYPE_CHECKING:
    from ..models.causal_lm.model import CausalLM
    from ..nn.cache import KVCache
    from ..text.tokenizer import Tokenizer

AHEAD = 4  # tokens that the draft model proposes at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add = parser.add_argument
    add(
        "model", metavar="MODEL", help="a language model's checkpoint folder, or its original, which is converted first"
    )
    add(
        "prompt",
        metavar="PROMPT",
        help="the text to continue; - reads it from standard input, without its last line break",
    )
    add("--max-tokens", type=int, default=256, metavar="N", help="generate at most this many tokens")
    add("--temp", type=float, default=0.0, metavar="T", help="temperature; 0 takes the most likely token")
    add("--top-k", type=int, metavar="K", help="draw from the K most likely tokens")
    add("--top-p", type=float, metavar="P", help="draw from the most likely tokens whose probabilities add up to P")
    add("--min-p", type=float, metavar="P", help="draw from tokens at least P times as likely as the most likely one")
    add(
        "--repetition-penalty",
        type=float,
        metavar="R",
        help="make tokens that the text has already less likely; above 1",
    )
    add("--seed", type=int, default=0, metavar="N", help="seed of the random draws")
    add("--stop", action="append", default=[], metavar="TEXT", help="stop before this text; may be repeated")
    add("--kv-bits", type=int, choices=[4, 8], help="bits of the quantized cache of keys and values")
    add("--window", type=int, metavar="N", help="attend to the last N positions only")
    add("--keep", type=int, default=0, metavar="N", help="with --window, attend to the first N positions too")
    add(
        "--prompt-cache",
        metavar="FILE",
        help="reuse the part of the prompt that this file holds, and save the new caches to it",
    )
    add("--draft", metavar="MODEL", help="a smaller model with the same vocabulary, for speculative decoding")
    add("--chat", action="store_true", help="make the prompt a user message of the model's chat template")
    add("--system", metavar="TEXT", help="the system message, with --chat")
    add("--device", choices=["cpu", "gpu"], help="the device to compute on; by default the GPU if there is one")
    add("--json", action="store_true", help="print one JSON object at the end instead of the text")


def run(options: argparse.Namespace) -> int:
    """Prints the text as it comes, and a line on speed and memory to standard error."""
    from ..text.prompt_cache import reuse
    from ..text.samplers import make_sampler
    from ..text.tokenizer import Tokenizer

    _check(options)
    names = ("top_k", "top_p", "min_p", "repetition_penalty", "seed")
    sampler = make_sampler(options.temp, **{name: getattr(options, name) for name in names})
    text = _read_text(options)
    if options.device:
        device.use_device(options.device)
    folder = _find_language_model(options.model)
    draft = _find_language_model(options.draft) if options.draft else None
    tokenizer = Tokenizer(folder)
    prompt = _encode_prompt(text, tokenizer, options)
    model = _load(folder)
    caches, held = _make_caches(model, options)
    result = Generated(prompt, reuse(caches, held, prompt))
    given: dict[str, Any] = {"sampler": sampler, "tokenizer": tokenizer, "stop": options.stop}
    if draft is not None:
        given["draft"] = small = _load(draft)
        given |= {"draft_caches": small.make_caches(**_cache_options(options)), "ahead": AHEAD}
    _generate(model, caches, given, result, options)
    if options.json:
        print(json.dumps(result.report(), ensure_ascii=False))
    else:
        print(result.summary(), file=sys.stderr)
    return 0


def _generate(
    model: CausalLM, caches: list[KVCache], given: dict[str, Any], result: Generated, options: argparse.Namespace
) -> None:
    """Prints the text and saves the prompt cache, also if Ctrl-C or a closed pipe ends it early."""
    from tqdm import tqdm

    from ..text.generation import generate
    from ..text.prompt_cache import save_prompt

    def save() -> None:
        if options.prompt_cache:
            save_prompt(options.prompt_cache, model, caches, result.prompt + result.tokens)

    with (
        interrupt_between_steps(bool(options.prompt_cache)) as check_interrupt,
        tqdm(desc="prompt", total=result.unread, unit="token", leave=False, disable=None) as bar,
    ):

        def progress(done: int, _: int) -> None:
            bar.update(done - bar.n)
            check_interrupt()

        tokens = generate(
            model, result.prompt, max_tokens=options.max_tokens, caches=caches, progress=progress, **given
        )
        try:
            print_text(tokens, result, quiet=options.json, before=bar.close, after=check_interrupt)
        except (Interrupted, BrokenPipeError):
            save()
            raise
        save()


def _check(options: argparse.Namespace) -> None:
    """Checks what does not need the model."""
    if options.max_tokens < 1:
        raise ValueError(f"--max-tokens must be at least 1, got {options.max_tokens}")
    if options.system is not None and not options.chat:
        raise ValueError("--system must come with --chat")
    if options.keep and options.window is None:
        raise ValueError("--keep must come with --window")
    if not all(options.stop):
        raise ValueError("--stop must not be empty")
    if options.prompt_cache is not None:
        _check_file(options.prompt_cache)
    if options.system is not None:
        _check_unicode("--system", options.system)


def _check_file(name: str) -> None:
    """Checks that a prompt cache can be written."""
    path = Path(name)
    if not name or path.is_dir():
        raise ValueError(f"--prompt-cache must be a file, got {f'the folder {name}' if name else 'an empty name'}")
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise ValueError(f"--prompt-cache must be in a folder that can be written to, got {name}")


def _check_unicode(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # Python decodes invalid bytes as surrogates
        raise ValueError(f"{name} must be UTF-8, got bytes that are not") from None


def _read_text(options: argparse.Namespace) -> str:
    """The prompt's text."""
    try:
        text: str = sys.stdin.read().removesuffix("\n") if options.prompt == "-" else options.prompt
    except UnicodeDecodeError:
        raise ValueError("PROMPT must be UTF-8, got bytes that are not from standard input") from None
    _check_unicode("PROMPT", text)
    return text


def _find_language_model(name: str) -> Path:
    """The checkpoint folder of a language model."""
    from ..pretrained.loading import resolve
    from ..storage.checkpoint import read_checkpoint

    folder = resolve(name)
    family = read_checkpoint(folder).family
    if family != "causal_lm":
        hint = " (mlx-xformer separate?)" if family.startswith("htdemucs") else ""
        raise ValueError(f"{name}: must be a language model, got one of family {family}{hint}")
    return folder


def _load(folder: Path) -> CausalLM:
    from ..models.causal_lm.model import CausalLM
    from ..models.families import load_model

    model = load_model(folder)
    assert isinstance(model, CausalLM)
    return model


def _encode_prompt(text: str, tokenizer: Tokenizer, options: argparse.Namespace) -> list[int]:
    if not text:
        raise ValueError("PROMPT must not be empty")
    if not options.chat:
        return tokenizer.encode(text)
    messages = [] if options.system is None else [{"role": "system", "content": options.system}]
    return tokenizer.encode(tokenizer.chat([*messages, {"role": "user", "content": text}]), special=False)


def _cache_options(options: argparse.Namespace) -> dict[str, Any]:
    return {"window": options.window, "keep": options.keep, "bits": options.kv_bits, "slack": AHEAD}


def _make_caches(model: CausalLM, options: argparse.Namespace) -> tuple[list[KVCache], Sequence[int]]:
    """The caches, and the tokens that a prompt cache holds."""
    from ..text.prompt_cache import load_prompt

    path, wanted = options.prompt_cache, model.make_caches(**_cache_options(options))
    if path is None or not Path(path).exists():
        return wanted, ()
    caches, tokens = load_prompt(path, model)
    for found, cache in zip(caches, wanted, strict=True):
        for name in ("window", "keep", "bits"):
            have, want = getattr(found, name), getattr(cache, name)
            if have != want:
                raise ValueError(
                    f"{path}: made with {name} {have}, got {name} {want}: use the same {name}, or another file"
                )
    return caches, tokens
