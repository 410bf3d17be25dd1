"""The tokenizer in the metadata of a GGUF file, as the files that Hugging Face keeps it in.

Source: llama.cpp, llama-vocab.cpp (what the values of tokenizer.ggml.pre stand for).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...storage.messages import shorten

_PREFIX = "tokenizer.ggml."
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLIT = {"llama-bpe": _WORDS + r"\p{N}{1,3}" + _REST, "qwen2": _WORDS + r"\p{N}" + _REST}
_KNOWN = ("default", "gpt-2", "smollm", *_SPLIT)
_CONTROL, _USER = 3, 4  # of tokenizer.ggml.token_type


def make_tokenizer_files(metadata: Mapping[str, Any]) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """tokenizer.json, tokenizer_config.json and generation_config.json; a warning where the first cannot be made."""
    given = {key.removeprefix(_PREFIX): value for key, value in metadata.items() if key.startswith(_PREFIX)}
    ids = {name: given[f"{name}_token_id"] for name in ("bos", "eos", "pad", "unk") if f"{name}_token_id" in given}
    ids |= {"pad": given["padding_token_id"]} if "padding_token_id" in given else {}
    ids |= {"unk": given["unknown_token_id"]} if "unknown_token_id" in given else {}
    tokens = given.get("tokens") or []
    special: dict[str, Any] = {f"{name}_token": tokens[at] for name, at in ids.items() if at < len(tokens)}
    special["add_bos_token"] = bool(given.get("add_bos_token", given.get("pre") == "llama-bpe"))
    if "tokenizer.chat_template" in metadata:
        special["chat_template"] = metadata["tokenizer.chat_template"]
    generation = {f"{name}_token_id": at for name, at in ids.items() if name in ("bos", "eos", "pad")}
    files = {"tokenizer_config.json": _json(special), "generation_config.json": _json(generation)}
    kind, split = given.get("model"), given.get("pre", "default")
    if kind != "gpt2" or split not in _KNOWN or not given.get("merges"):
        return files, (f"no tokenizer.json: the kind {shorten(f'{kind}, {split}')} is not known",)
    text = _tokenizer(given, split, special["bos_token"] if special["add_bos_token"] else None).to_str()
    return {"tokenizer.json": text.encode(), **files}, ()


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def _tokenizer(given: Mapping[str, Any], split: str, bos: str | None) -> Any:
    """Byte-level BPE; `bos` stands before every text."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokens, types = given["tokens"], [int(kind) for kind in given["token_type"].tolist()]
    merges = [tuple(merge.split(" ", 1)) for merge in given["merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=split == "llama-bpe"))
    if split in _SPLIT:
        first: list[Any] = [pre_tokenizers.Split(Regex(_SPLIT[split]), "isolated")]
    else:
        first = [pre_tokenizers.Digits(individual_digits=True)] if split == "smollm" else []
    levels = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split not in _SPLIT)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, levels])
    tokenizer.decoder = decoders.ByteLevel()
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    added = [(AddedToken(t, special=k == _CONTROL, normalized=False)) for t, k in zip(tokens, types, strict=True)
             if k in (_CONTROL, _USER)]  # fmt: skip
    tokenizer.add_tokens(added)
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [(bos, vocabulary[bos])])
    return tokenizer
