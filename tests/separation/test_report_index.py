"""The index page of a folder: what it lists, how it grows, and what it never does. A browser opens it in
test_report_browser.py."""

import base64
import fcntl
import hashlib
import json
import math
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest
from support.audio import Page

from mlx_xformer.separation.report.index import Levels, Song, add_song


def song(out, name, *, seconds=65.0, stems=("drums", "vocals"), rms=-20.0):
    """A song whose page and stems lie in a folder of its own."""
    folder = out / "model" / name
    folder.mkdir(parents=True, exist_ok=True)
    files = {stem: folder / f"{stem}.wav" for stem in stems}
    for file in (folder / "report.html", *files.values()):
        file.write_bytes(b"")
    levels = [Levels("mix", None, -1.0, -12.34), *(Levels(stem, file, -3.0, rms) for stem, file in files.items())]
    return Song(folder / "report.html", f"{name}.mp3", seconds, 44100, 2, -40.0, tuple(levels))


def links(page):
    return [attributes["href"] for tag, attributes in page.tags if tag == "a"]


def listed(path):
    """The titles on an index page, in order."""
    return re.findall(r"<h2><a[^>]*>(.*?)</a></h2>", path.read_text("utf-8"))


def test_songs_are_listed_with_links_lengths_and_levels(tmp_path):
    index = add_song(tmp_path, song(tmp_path, "b b"), "model")
    assert index == tmp_path / "index.html"
    add_song(tmp_path, song(tmp_path, "A", seconds=3600.4, rms=-math.inf), "model")
    page = Page(index)
    assert listed(index) == ["A.mp3", "b b.mp3"]
    songs = ["A", "b%20b"]
    assert links(page) == [f"model/{s}/{f}" for s in songs for f in ("report.html", "drums.wav", "vocals.wav")]
    assert page.values[:7] == [-40, -12.34, -1, -math.inf, -3, -math.inf, -3]
    text = page.texts["text"]
    assert "2 songs · 1:01:05 · model" in text and "1:00:00 · 44.1 kHz · stereo" in text and "1:05 ·" in text
    assert "−∞" in text and "−40.0 dB" in text


def test_an_index_needs_nothing_else(tmp_path):
    page = Page(add_song(tmp_path, song(tmp_path, "a"), "model"))
    assert page.source.startswith("<!doctype html>") and "://" not in page.source and "url(" not in page.source
    for tag, attributes in page.tags:
        assert "src" not in attributes and "style" not in attributes, tag
        assert not [name for name in attributes if name.startswith("on")], tag
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.texts["style", None].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:"


@pytest.mark.parametrize("name", ["</script><script>alert(1)", "a #?%20'\"&amp;", "ä\udcff", "{{data}}"])
def test_names_are_text_and_links_lead_to_files(tmp_path, name):
    name = name.replace("/", "∕")
    page = Page(add_song(tmp_path, song(tmp_path, name), name))
    assert [a.get("type") for t, a in page.tags if t == "script"] == ["application/json"]
    readable = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    assert page.texts["text"].count(readable) == 2  # the song and the model
    for href in links(page):
        assert (tmp_path / Path(os.fsdecode(unquote_to_bytes(href)))).exists(), href
    add_song(tmp_path, song(tmp_path, "other"), "model")
    assert len(listed(tmp_path / "index.html")) == 2  # the odd name was read back


def test_a_song_that_is_separated_again_is_renewed(tmp_path):
    add_song(tmp_path, song(tmp_path, "a", seconds=10), "model")
    before = (tmp_path / "index.html").read_bytes()
    assert Page(add_song(tmp_path, song(tmp_path, "a", seconds=20), "model")).texts["text"].count("0:20") == 2
    add_song(tmp_path, song(tmp_path, "a", seconds=10), "model")
    assert (tmp_path / "index.html").read_bytes() == before  # the same songs give the same bytes


def test_songs_whose_page_is_gone_leave_the_list(tmp_path):
    gone = song(tmp_path, "gone")
    add_song(tmp_path, gone, "model")
    gone.page.unlink()
    assert listed(add_song(tmp_path, song(tmp_path, "here"), "model")) == ["here.mp3"]


def test_several_models_are_named_with_each_song(tmp_path):
    add_song(tmp_path, song(tmp_path, "a"), "first")
    text = Page(add_song(tmp_path, song(tmp_path, "b"), "second")).texts["text"]
    assert "first, second" in text and "stereo · first" in text and "stereo · second" in text


def test_a_page_of_the_user_is_kept(tmp_path):
    index = tmp_path / "index.html"
    for text in ("<h1>My band</h1>", '<script type="application/json" id="mlx-xformer-songs">{}</script>', "\udcff"):
        index.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(FileExistsError, match=re.escape(f"{index} is not an index of separated songs")):
            add_song(tmp_path, song(tmp_path, "a"), "model")
        assert index.read_bytes() == text.encode("utf-8", "surrogateescape")
    assert sorted(os.listdir(tmp_path)) == ["index.html", "model"]


def test_writers_wait_for_one_another(tmp_path):
    songs = [song(tmp_path, f"song {number:02}") for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda one: add_song(tmp_path, one, "model"), songs))
    assert listed(tmp_path / "index.html") == [one.title for one in songs]
    assert sorted(os.listdir(tmp_path)) == ["index.html", "model"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    left = tmp_path / ".unfinished-abc.part"
    left.write_bytes(b"half")
    add_song(tmp_path, song(tmp_path, "a"), "model")
    assert left.exists()  # for a minute it may be another process's
    os.utime(left, (time.time() - 100,) * 2)
    with left.open("rb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        add_song(tmp_path, song(tmp_path, "a"), "model")
        assert left.exists()
    index = add_song(tmp_path, song(tmp_path, "a"), "model")
    assert sorted(os.listdir(tmp_path)) == ["index.html", "model"]
    found = Page(index).texts["script", "mlx-xformer-songs"]
    assert json.loads(found)["version"] == 1 and index.stat().st_mode & 0o444 == 0o444
