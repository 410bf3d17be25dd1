"""Tokenizers of checkpoint folders (tokenizer.json), chat templates, and text from tokens that come one by one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as _Library

_MAX_HELD = 8  # tokens of an incomplete character: four bytes, and what normalisers add to them


class Tokenizer:
    """The tokenizer of a checkpoint folder.

    Args:
        folder: a folder with tokenizer.json.

    Attributes:
        bos: the token that begins a text, or None.
        eos: the tokens that end a text, from generation_config.json, config.json and tokenizer_config.json.

    Raises:
        FileNotFoundError: if there is no tokenizer.json.
        ValueError: if a file cannot be read.
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
        self.eos = self._find_eos()
        self._adds_bos = self._config.get("add_bos_token") is True and self.bos is not None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Converts a text to tokens.

        Args:
            text: the text.
            special: whether to add the special tokens that begin and end a text. A chat template's text has them.

        Returns:
            The tokens.

        Raises:
            ValueError: if the text is not valid Unicode.
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

    def encode_all(self, texts: Sequence[str], *, max_length: int) -> list[list[int]]:
        """Converts several texts to tokens.

        Args:
            texts: the texts.
            max_length: the most tokens of a text, special ones included. Longer texts are truncated at the end.

        Returns:
            The tokens of each text.

        Raises:
            ValueError: if a text is not valid Unicode, or if the special tokens alone exceed `max_length`.
        """
        special = self._library.num_special_tokens_to_add(is_pair=False)
        if max_length <= special:
            raise ValueError(
                f"max_length must be more than the {special} special tokens of every text, got {max_length}"
            )
        self._library.enable_truncation(max_length)
        try:
            return [self.encode(text)[:max_length] for text in texts]
        finally:
            self._library.no_truncation()

    def decode(self, ids: Sequence[int]) -> str:
        """Converts tokens to text, without special tokens. Incomplete UTF-8 becomes U+FFFD."""
        return self._library.decode(list(ids), skip_special_tokens=True)

    def chat(self, messages: Sequence[Mapping[str, Any]], *, answer: bool = True) -> str:
        """Applies the model's chat template to a conversation.

        Args:
            messages: mappings of "role" ("system", "user" or "assistant") and "content" (a text).
            answer: whether the text ends with the beginning of the assistant's answer.

        Returns:
            The text of the conversation.

        Raises:
            ValueError: if there is no template, if it fails, or if Jinja2 is not installed.
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

    def _find_eos(self) -> tuple[int, ...]:
        ends = [self._id(self._special("eos_token"))]
        for name in ("generation_config.json", "config.json"):
            config = _read(self.folder / name)
            for place in (config, config.get("config")):
                found = place.get("eos_token_id") if isinstance(place, dict) else None
                several = found if isinstance(found, list) else [] if found is None else [found]
                for end in several:
                    if type(end) is not int:
                        raise ValueError(f"{self.folder / name}: eos_token_id must be whole numbers, got {end!r:.40}")
                ends += several
        return tuple(sorted({end for end in ends if end is not None and end >= 0}))  # some files have -1 for none


def _refuse(message: str) -> None:
    """The function raise_exception of chat templates."""
    from jinja2 import TemplateError

    raise TemplateError(message)


def _read(path: Path) -> dict[str, Any]:
    """Reads a JSON object; {} if there is no file."""
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
    """Converts tokens to text one by one.

    Characters are never split. All pieces together equal the text that decoding prompt and tokens at once gives after
    the prompt's own text.

    Args:
        tokenizer: the tokenizer.
        prompt: the tokens before the first one.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._ids = list(prompt)  # the tokens of the last piece, and those of an incomplete character
        self._shown = len(self._ids)
        # Without a character that the prompt leaves incomplete.
        self._text = tokenizer.decode(self._ids).rstrip("\ufffd")

    def add(self, token: int) -> str:
        """Returns the text that a token adds; empty while a character is incomplete."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd") and len(self._ids) - self._shown < _MAX_HELD:
            return ""
        return self._show(text)

    def end(self) -> str:
        """Returns the text that was held back: U+FFFD for an incomplete character."""
        return self._show(self._tokenizer.decode(self._ids))

    def _show(self, text: str) -> str:
        piece = text[len(self._text) :]
        if piece:
            # The last piece is kept, because the text of a token may depend on the tokens before it.
            self._ids = self._ids[self._shown :]
            self._shown = len(self._ids)
            self._text = self._tokenizer.decode(self._ids)
        return piece
