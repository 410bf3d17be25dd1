"""Text to tokens and back, by a checkpoint folder's tokenizer.json; text as it grows; chat templates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as _Library

_HELD = 8  # tokens that may wait for the rest of a character: four bytes, and what normalisers put around them


class Tokenizer:
    """The tokenizer of a checkpoint folder.

    bos, eos: the token that begins a text, if any, and those that end one, from generation_config.json, config.json and
    tokenizer_config.json. FileNotFoundError or ValueError, in one line, for a folder without, or with a broken one.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder}: no tokenizer.json")
        try:
            self._library = _Library.from_file(str(path))
        except Exception as error:  # the library raises nothing more precise
            raise ValueError(f"{path}: not a tokenizer ({' '.join(str(error).split())[:160]})") from None
        self._library.no_truncation()
        self._library.no_padding()
        self.folder = folder
        self._config = _read(folder / "tokenizer_config.json")
        self.bos = self._id(self._special("bos_token"))
        self.eos = self._ends()
        self._adds_bos = self._config.get("add_bos_token") is True and self.bos is not None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The tokens of a text.

        Args:
            text: The text.
            special: Whether to add the tokens that the tokenizer puts around every text; not for a text that holds them
                already, such as one from a chat template.

        Raises:
            ValueError: The text holds surrogates, which cannot be encoded.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text must be valid Unicode, got {text[error.start]!a} at {error.start}") from None
        ids = list(self._library.encode(text, add_special_tokens=special).ids)
        if special and self._adds_bos and ids[:1] != [self.bos]:
            assert self.bos is not None
            ids.insert(0, self.bos)
        return ids

    def encode_all(self, texts: Sequence[str], *, longest: int) -> list[list[int]]:
        """The tokens of each text, at most `longest`.

        A longer text is cut, and keeps the tokens that the tokenizer puts around every text.
        """
        around = self._library.num_special_tokens_to_add(is_pair=False)
        if longest <= around:
            raise ValueError(f"longest must be more than the {around} tokens around every text, got {longest}")
        self._library.enable_truncation(longest)
        try:
            return [self.encode(text)[:longest] for text in texts]
        finally:
            self._library.no_truncation()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special ones. What is not whole UTF-8 becomes U+FFFD."""
        return self._library.decode(list(ids), skip_special_tokens=True)

    def chat(self, messages: Sequence[Mapping[str, Any]], *, answer: bool = True) -> str:
        """The text of a conversation by the model's own template, ready for the assistant's answer if `answer`.

        messages: {"role": "system", "user" or "assistant", "content": text}. ValueError where there is no template,
        where Jinja2 is not installed, and where the template refuses.
        """
        try:
            from jinja2 import TemplateError
            from jinja2.ext import loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise ValueError('chat templates need Jinja2: pip install "mlx-xformer[chat]"') from None
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals |= {"raise_exception": _refuse, "strftime_now": datetime.now().strftime}
        special = {name: self._special(name) or "" for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        try:
            template = environment.from_string(self._template())
            return template.render(messages=list(messages), add_generation_prompt=answer, **special)
        except (TemplateError, TypeError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ValueError(f"{self.folder}: the chat template fails: {reason}") from None

    def _template(self) -> str:
        path = self.folder / "chat_template.jinja"
        try:
            found = path.read_text("utf-8") if path.is_file() else self._config.get("chat_template")
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not UTF-8") from None
        if isinstance(found, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
            found = named.get("default")
        if not isinstance(found, str):
            raise ValueError(f"{self.folder}: the tokenizer has no chat template")
        return found

    def _special(self, name: str) -> str | None:
        """The text of a special token."""
        value = self._config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        return value if isinstance(value, str) else None

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self._library.token_to_id(token)

    def _ends(self) -> tuple[int, ...]:
        ends = [self._id(self._special("eos_token"))]
        for name in ("generation_config.json", "config.json"):
            config = _read(self.folder / name)
            for place in (config, config.get("config")):
                found = place.get("eos_token_id") if isinstance(place, dict) else None
                several = found if isinstance(found, list) else [] if found is None else [found]
                for end in several:
                    if type(end) is not int:
                        raise ValueError(f"{self.folder / name}: eos_token_id must be tokens' numbers, got {end!r:.40}")
                ends += several
        return tuple(sorted({end for end in ends if end is not None and end >= 0}))  # some write -1 for none


def _refuse(message: str) -> None:
    """raise_exception of chat templates."""
    from jinja2 import TemplateError

    raise TemplateError(message)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must be a JSON object, got {type(found).__name__}")
    return found


class TextStream:
    """The text of tokens as they are generated after a prompt.

    It never yields half a character, and adds up to what decoding all tokens at once gives after the prompt's text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._ids = list(prompt)  # those of the text last shown, and those that wait
        self._shown = len(self._ids)
        self._text = tokenizer.decode(self._ids).rstrip("\ufffd")  # a character that the prompt began

    def add(self, token: int) -> str:
        """What the text grows by; empty while a character is not whole."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd") and len(self._ids) - self._shown < _HELD:
            return ""
        return self._show(text)

    def end(self) -> str:
        """What still waits: U+FFFD for a character that was never finished."""
        return self._show(self._tokenizer.decode(self._ids))

    def _show(self, text: str) -> str:
        piece = text[len(self._text) :]
        if piece:
            # What was shown last stays in front: how a token decodes may depend on what is before it.
            self._ids = self._ids[self._shown :]
            self._shown = len(self._ids)
            self._text = self._tokenizer.decode(self._ids)
        return piece
