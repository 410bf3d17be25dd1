"""mlx-xformer generate."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backend import device
from .common import Interrupted, between_steps

if TYPE_CHECKING:
    from ..models.causal_lm.model import CausalLM
    from ..nn.cache import KVCache
    from ..text.generation import Token
    from ..text.tokenizer import Tokenizer

AHEAD = 4  # tokens that a draft model guesses at a time


def add(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a language model's checkpoint folder, or an original to convert")
    add(
        "prompt", metavar="PROMPT", help="how the text begins; - reads it from standard input, less its last line break"
    )
    add("--max-tokens", type=int, default=256, metavar="N", help="generate at most this many tokens")
    add("--temp", type=float, default=0.0, metavar="T", help="temperature; 0 takes the most likely token")
    add("--top-k", type=int, metavar="K", help="draw from the K most likely tokens")
    add("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that make up this probability")
    add("--min-p", type=float, metavar="P", help="draw from tokens at least P times as likely as the first")
    add("--repetition-penalty", type=float, metavar="R", help="divide what speaks for tokens already there by R")
    add("--seed", type=int, default=0, metavar="N", help="seed of the draws")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    add("--kv-bits", type=int, choices=[4, 8], help="quantize the cache")
    add("--window", type=int, metavar="N", help="let a token see the last N positions only")
    add("--keep", type=int, default=0, metavar="N", help="and the first N, with --window")
    add("--prompt-cache", metavar="FILE", help="reuse what this file holds of the prompt, then renew it")
    add("--draft", metavar="MODEL", help="a smaller model of the same vocabulary, whose guesses speed up the model")
    add("--chat", action="store_true", help="take the prompt for a message, by the model's chat template")
    add("--system", metavar="TEXT", help="the system message, with --chat")
    add("--device", choices=["cpu", "gpu"], help="what computes; by default the GPU where there is one")
    add("--json", action="store_true", help="print one JSON object at the end instead of the text")


@dataclass
class _Run:
    """What came of a generation. Times in seconds."""

    prompt: list[int]
    reused: int = 0
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    prefill: float = 0.0
    decode: float = 0.0

    @property
    def unread(self) -> int:
        """How many tokens of the prompt are not in the caches beforehand."""
        return len(self.prompt) - self.reused

    def report(self) -> dict[str, Any]:
        """For --json. The first token comes with the prompt, so that it counts as no token of the decoding."""
        read, made = self.unread, len(self.tokens) - 1
        return {
            "text": self.text,
            "finish": self.finish,
            "prompt_tokens": len(self.prompt),
            "reused_tokens": self.reused,
            "tokens": len(self.tokens),
            "prefill_tokens_per_second": round(read / self.prefill, 2) if self.prefill else None,
            "decode_tokens_per_second": round(made / self.decode, 2) if made > 0 and self.decode else None,
            "peak_memory": device.mx.get_peak_memory(),
        }

    def summary(self) -> str:
        """For standard error."""
        facts = self.report()
        reused = f" ({self.reused} of them from the prompt cache)" if self.reused else ""
        prefill, decode = facts["prefill_tokens_per_second"], facts["decode_tokens_per_second"]
        rates = [f"prompt {len(self.prompt)} tokens{reused}" + (f", {prefill:.1f} per second" if prefill else "")]
        rates.append(f"generated {len(self.tokens)}" + (f", {decode:.1f} per second" if decode else ""))
        return "; ".join([*rates, f"peak memory {facts['peak_memory'] / 2**20:.0f} MiB"])


def run(options: argparse.Namespace) -> int:
    """Prints the text as it comes; what it took goes to standard error."""
    from ..text.prompt_cache import reuse
    from ..text.samplers import make_sampler
    from ..text.tokenizer import Tokenizer

    _check(options)
    names = ("top_k", "top_p", "min_p", "repetition_penalty", "seed")
    sampler = make_sampler(options.temp, **{name: getattr(options, name) for name in names})
    text = _text(options)
    if options.device:
        device.use_device(options.device)
    folder = _language_model(options.model)
    draft = _language_model(options.draft) if options.draft else None
    tokenizer = Tokenizer(folder)
    prompt = _prompt(text, tokenizer, options)
    model = _load(folder)
    caches, held = _caches(model, options)
    result = _Run(prompt, reuse(caches, held, prompt))
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
    model: CausalLM, caches: list[KVCache], given: dict[str, Any], result: _Run, options: argparse.Namespace
) -> None:
    """Shows the text and renews the prompt cache, also where Ctrl-C or a reader who is gone ends it."""
    from tqdm import tqdm

    from ..text.generation import generate
    from ..text.prompt_cache import save_prompt

    def save() -> None:
        if options.prompt_cache:
            save_prompt(options.prompt_cache, model, caches, result.prompt + result.tokens)

    with (
        between_steps(bool(options.prompt_cache)) as look,
        tqdm(desc="prompt", total=result.unread, unit="token", leave=False, disable=None) as bar,
    ):

        def progress(done: int, _: int) -> None:
            bar.update(done - bar.n)
            look()

        tokens = generate(
            model, result.prompt, max_tokens=options.max_tokens, caches=caches, progress=progress, **given
        )
        try:
            _show(tokens, result, options.json, bar.close, look)
        except (Interrupted, BrokenPipeError):
            save()
            raise
        save()


def _show(
    tokens: Generator[Token, None, None],
    result: _Run,
    quiet: bool,
    before: Callable[[], None],
    after: Callable[[], None],
) -> None:
    """Prints the text, unless `quiet`; calls `before` and `after` around each piece.

    What was printed stays a line of its own, whatever ends it.
    """
    try:
        with closing(tokens):
            for piece in _timed(tokens, result):
                before()
                if not quiet:
                    print(piece, end="", flush=True)
                after()
    finally:
        if not quiet and result.tokens:
            print(flush=True)


def _timed(tokens: Iterator[Token], result: _Run) -> Iterator[str]:
    """The pieces of text; notes in `result` what has come and how long it took."""
    start = time.perf_counter()
    for token in tokens:
        now = time.perf_counter()
        if not result.tokens:
            result.prefill, first = now - start, now
        result.decode = now - first
        result.tokens.append(token.id)
        result.text += token.text
        result.finish = token.finish
        yield token.text


def _check(options: argparse.Namespace) -> None:
    """What can be known before a model is loaded."""
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
    path = Path(name)
    if not name or path.is_dir():
        raise ValueError(f"--prompt-cache must be a file, got {f'the folder {name}' if name else 'an empty name'}")
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise ValueError(f"--prompt-cache must be in a folder that can be written to, got {name}")


def _check_unicode(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # Python makes surrogates of bytes that it cannot decode
        raise ValueError(f"{name} must be UTF-8, got bytes that are not") from None


def _text(options: argparse.Namespace) -> str:
    """The prompt's text."""
    try:
        text: str = sys.stdin.read().removesuffix("\n") if options.prompt == "-" else options.prompt
    except UnicodeDecodeError:
        raise ValueError("PROMPT must be UTF-8, got bytes that are not from standard input") from None
    _check_unicode("PROMPT", text)
    return text


def _language_model(name: str) -> Path:
    """The folder of a language model."""
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


def _prompt(text: str, tokenizer: Tokenizer, options: argparse.Namespace) -> list[int]:
    if not text:
        raise ValueError("PROMPT must not be empty")
    if not options.chat:
        return tokenizer.encode(text)
    messages = [] if options.system is None else [{"role": "system", "content": options.system}]
    return tokenizer.encode(tokenizer.chat([*messages, {"role": "user", "content": text}]), special=False)


def _cache_options(options: argparse.Namespace) -> dict[str, Any]:
    return {"window": options.window, "keep": options.keep, "bits": options.kv_bits, "slack": AHEAD}


def _caches(model: CausalLM, options: argparse.Namespace) -> tuple[list[KVCache], Sequence[int]]:
    """The caches, and the tokens that they hold already."""
    from ..text.prompt_cache import load_prompt

    path, wanted = options.prompt_cache, model.make_caches(**_cache_options(options))
    if path is None or not Path(path).exists():
        return wanted, ()
    caches, tokens = load_prompt(path, model)
    for found, cache in zip(caches, wanted, strict=True):
        for name in ("window", "keep", "bits"):
            have, want = getattr(found, name), getattr(cache, name)
            if have != want:
                raise ValueError(f"{path}: made with {name} {have}, got {name} {want}: use the same, or another file")
    return caches, tokens
