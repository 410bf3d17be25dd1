"""Tokenizers: what a folder says of itself, text that grows by whole characters, chat templates in their sandbox."""

import json
import random
import sys

import pytest
from support.text import END, START, byte_tokenizer, fallback_tokenizer

from mlx_xformer.text.tokenizer import TextStream, Tokenizer


def test_there_and_back(tmp_path):
    tokenizer = Tokenizer(byte_tokenizer(tmp_path))
    for text in ("hello hell", "naïve €5 🙂", "", "\n\t <end"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos, tokenizer.eos) == (START, (END,))
    assert tokenizer.encode("he<end>")[-1] == END
    assert tokenizer.decode([*tokenizer.encode("he"), END, START]) == "he"


def test_the_token_that_begins_a_text(tmp_path):
    by_processor = Tokenizer(byte_tokenizer(tmp_path / "a", bos=True))
    assert by_processor.encode("he") == [START, 258] and by_processor.encode("he", special=False) == [258]
    folder = byte_tokenizer(tmp_path / "b")
    assert Tokenizer(folder).encode("he") == [258]
    write(folder, "tokenizer_config.json", bos_token="<start>", add_bos_token=True)
    assert Tokenizer(folder).encode("he") == [START, 258] and Tokenizer(folder).encode("<start>he") == [START, 258]


def write(folder, name, **values):
    (folder / name).write_text(json.dumps(values))


def test_tokens_that_end_a_text(tmp_path):
    folder = byte_tokenizer(tmp_path)
    write(folder, "generation_config.json", eos_token_id=[3, 7])
    write(folder, "config.json", family="causal_lm", config={"eos_token_id": 5})
    assert Tokenizer(folder).eos == (3, 5, 7, END)
    write(folder, "generation_config.json", eos_token_id=None)
    write(folder, "config.json", eos_token_id=2)
    write(folder, "tokenizer_config.json")
    assert Tokenizer(folder).eos == (2,) and Tokenizer(folder).bos is None
    write(folder, "config.json", eos_token_id=-1)
    assert Tokenizer(folder).eos == ()


@pytest.mark.parametrize("value", ["x", "2", 2.5, True, [2, "x"], [None], {"id": 2}], ids=str)
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_ends_that_are_no_tokens(tmp_path, name, value):
    write(byte_tokenizer(tmp_path), name, eos_token_id=value)
    with pytest.raises(ValueError, match=rf"{name}: eos_token_id must be whole numbers, got ") as error:
        Tokenizer(tmp_path)
    assert repr(value[-1] if isinstance(value, list) else value) in str(error.value)


def test_what_is_no_text(tmp_path):
    with pytest.raises(ValueError, match=r"text must be valid Unicode, got '\\udcff' at 2"):
        Tokenizer(byte_tokenizer(tmp_path)).encode("he\udcff")


def test_limits_of_the_file_do_not_cut_a_prompt(tmp_path):
    path = byte_tokenizer(tmp_path) / "tokenizer.json"
    content = json.loads(path.read_text())
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(content | {"truncation": cut}))
    assert len(Tokenizer(tmp_path).encode("a long text")) == 11


@pytest.mark.parametrize("make", [byte_tokenizer, fallback_tokenizer])
def test_streams_show_whole_characters_and_in_all_everything(tmp_path, make):
    tokenizer = Tokenizer(make(tmp_path))
    texts = ["hello, naïve €5 🙂🙂", "▁a girl ab. 日本語の文", " a", "e\u0301 \u200d👩‍👩‍👧"]
    for text in texts:
        ids = tokenizer.encode(text)
        whole = tokenizer.decode(ids)
        for cut in range(len(ids)):
            if tokenizer.decode(ids[:cut]).endswith("\ufffd"):
                continue
            stream = TextStream(tokenizer, ids[:cut])
            pieces = [stream.add(token) for token in ids[cut:]]
            assert not any("\ufffd" in piece for piece in pieces)
            assert tokenizer.decode(ids[:cut]) + "".join(pieces) == whole and stream.end() == ""


def test_a_space_between_prompt_and_text_stays(tmp_path):
    tokenizer = Tokenizer(fallback_tokenizer(tmp_path))
    assert tokenizer.decode([4]) == "girl"  # its space is lost at the start of a text
    assert TextStream(tokenizer, [2]).add(4) == " girl"
    assert TextStream(tokenizer).add(4) == "girl"


@pytest.mark.parametrize("make", [byte_tokenizer, fallback_tokenizer])
def test_broken_characters_are_marked_and_nothing_waits_for_ever(tmp_path, make):
    tokenizer = Tokenizer(make(tmp_path))
    euro = tokenizer.encode("€")
    stream = TextStream(tokenizer)
    assert [stream.add(token) for token in euro[:2]] == ["", ""] and set(stream.end()) == {"\ufffd"}
    stream = TextStream(tokenizer)
    shown = "".join(stream.add(euro[0]) for _ in range(20))
    assert len(shown) >= 8 and set(shown) == {"\ufffd"}
    rng = random.Random(3)
    for _ in range(50):
        ids = [rng.randrange(6 if make is fallback_tokenizer else 0, 256) for _ in range(30)]
        stream = TextStream(tokenizer)
        assert sum(len(stream.add(token)) for token in ids) + len(stream.end()) > 0


def test_a_character_that_the_prompt_began(tmp_path):
    tokenizer = Tokenizer(byte_tokenizer(tmp_path))
    ids = tokenizer.encode("a€b")
    stream = TextStream(tokenizer, ids[:2])
    assert "".join(stream.add(token) for token in ids[2:]) == "€b"


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b>"}]


def test_chat_templates(tmp_path):
    tokenizer = Tokenizer(byte_tokenizer(tmp_path, chat=True))
    assert tokenizer.chat(MESSAGES) == "[system] Be brief.<end>[user] Hi <b><end>[assistant] "
    assert tokenizer.chat(MESSAGES, answer=False).endswith("Hi <b><end>")
    (tmp_path / "chat_template.jinja").write_text("{% if strftime_now('%Y') %}{{ messages | tojson }}{% endif %}")
    assert json.loads(tokenizer.chat(MESSAGES)) == MESSAGES and "<b>" in tokenizer.chat(MESSAGES)  # a file goes first
    (tmp_path / "chat_template.jinja").unlink()
    named = [{"name": "tool", "template": "no"}, {"name": "default", "template": "{{ bos_token }}yes"}]
    write(tmp_path, "tokenizer_config.json", chat_template=named, bos_token="<start>")
    assert Tokenizer(tmp_path).chat(MESSAGES) == "<start>yes"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no\nsystem message') }}", "the chat template fails: no system message"),
        ("{% for x in %}", "the chat template fails"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ nothing.at.all }}", "undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].content + 1 }}", "the chat template fails"),
    ],
)
def test_templates_that_fail_give_one_line(tmp_path, template, reason):
    write(byte_tokenizer(tmp_path), "tokenizer_config.json", chat_template=template)
    with pytest.raises(ValueError, match=reason) as error:
        Tokenizer(tmp_path).chat(MESSAGES)
    assert "\n" not in str(error.value)


def test_no_template_and_no_jinja(tmp_path, monkeypatch):
    tokenizer = Tokenizer(byte_tokenizer(tmp_path))
    with pytest.raises(ValueError, match="has no chat template"):
        tokenizer.chat(MESSAGES)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ValueError, match=r"pip install .mlx-xformer\[chat\]"):
        tokenizer.chat(MESSAGES)


def test_folders_without_a_tokenizer_give_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(ValueError, match="not a tokenizer") as error:
        Tokenizer(tmp_path)
    assert "\n" not in str(error.value)
    byte_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="must be a JSON object, got list"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        Tokenizer(tmp_path)
