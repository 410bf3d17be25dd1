"""Prints generated text as it comes: how long it took, and Ctrl-C that waits until caches are consistent."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..backend import device

if TYPE_CHECKING:
    from ..text.generation import Token


@dataclass
class Generated:
    """A generated text and the seconds that it took.

    Args:
        prompt: the prompt's tokens.
        reused: how many of them a prompt cache held.
        text: the text.
        tokens: its tokens.
        finish: why it ended, see `Token`.
        prefill: seconds for reading the prompt, until the first token.
        decode: seconds for all tokens after the first.
    """

    prompt: list[int]
    reused: int = 0
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    prefill: float = 0.0
    decode: float = 0.0

    @property
    def unread(self) -> int:
        """How many tokens of the prompt the model must read."""
        return len(self.prompt) - self.reused

    def report(self) -> dict[str, Any]:
        """Returns the object that --json prints. The first token is part of reading the prompt, not of decoding."""
        decoded = len(self.tokens) - 1
        return {
            "text": self.text,
            "finish": self.finish,
            "prompt_tokens": len(self.prompt),
            "reused_tokens": self.reused,
            "tokens": len(self.tokens),
            "prefill_tokens_per_second": round(self.unread / self.prefill, 2) if self.prefill else None,
            "decode_tokens_per_second": round(decoded / self.decode, 2) if decoded > 0 and self.decode else None,
            "peak_memory": device.mx.get_peak_memory(),
        }

    def summary(self) -> str:
        """Returns the line that is printed to standard error."""
        facts = self.report()
        reused = f" ({self.reused} of them from the prompt cache)" if self.reused else ""
        prefill, decode = facts["prefill_tokens_per_second"], facts["decode_tokens_per_second"]
        rates = [f"prompt {len(self.prompt)} tokens{reused}" + (f", {prefill:.1f} per second" if prefill else "")]
        rates.append(f"generated {len(self.tokens)}" + (f", {decode:.1f} per second" if decode else ""))
        return "; ".join([*rates, f"peak memory {facts['peak_memory'] / 2**20:.0f} MiB"])


class Interrupted(KeyboardInterrupt):
    """Ctrl-C between two steps, when the caches are consistent."""


@contextmanager
def interrupt_between_steps(wait: bool) -> Iterator[Callable[[], None]]:
    """Makes Ctrl-C wait until a step of generation is finished.

    Args:
        wait: whether it waits; if not, nothing is changed. A second Ctrl-C does not wait.

    Yields:
        A function to be called between steps: it raises `Interrupted` if Ctrl-C was pressed. So does the end of the
        block.
    """
    pressed = False

    def handle(*_: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    def check() -> None:
        if pressed:
            raise Interrupted

    before = signal.getsignal(signal.SIGINT)
    default = before is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if not (wait and default):
        yield check
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield check
        check()
    finally:
        signal.signal(signal.SIGINT, before)


def print_text(
    tokens: Generator[Token, None, None],
    result: Generated,
    *,
    quiet: bool,
    before: Callable[[], None],
    after: Callable[[], None],
) -> None:
    """Prints the text of tokens as they come and collects them in `result`.

    Args:
        tokens: from `generate`; closed at the end.
        result: gets the tokens, the text and the times.
        quiet: whether to print nothing.
        before: called before each piece of text is printed.
        after: called after each piece. Whatever it raises, the line that was printed is ended.
    """
    try:
        with closing(tokens):
            for piece in _collect(tokens, result):
                before()
                if not quiet:
                    print(piece, end="", flush=True)
                after()
    finally:
        if not quiet and result.tokens:
            print(flush=True)


def _collect(tokens: Iterator[Token], result: Generated) -> Iterator[str]:
    """Yields the text of each token, and records tokens and times in `result`."""
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
