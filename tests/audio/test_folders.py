"""Folders of recordings: what is found in them, through all levels and whatever links there are."""

import os

import numpy as np
import pytest
import soundfile
from support.ffmpeg import ffmpeg

from mlx_xformer.audio import folders, list_recordings, read


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def names(found, folder):
    return [path.relative_to(folder).as_posix() for path in found]


def test_all_levels_in_order_without_hidden_ones(tmp_path):
    make(tmp_path, "b.wav", "a.M4A", "c.txt", ".hidden.wav", "d.opus", "cd 2/01.flac", "cd 1/x/y/02.mp3", "cd 1/01.mp3")
    make(tmp_path, ".cache/e.wav", "e.wav/f.aifc", "._b.wav", "raw.raw")
    found = ["a.M4A", "b.wav", "cd 1/01.mp3", "cd 1/x/y/02.mp3", "cd 2/01.flac", "d.opus", "e.wav/f.aifc"]
    assert names(list_recordings(tmp_path), tmp_path) == found
    assert names(list_recordings(tmp_path, recursive=False), tmp_path) == ["a.M4A", "b.wav", "d.opus"]
    with pytest.raises(ValueError, match=r"x holds no recordings"):
        list_recordings(tmp_path / "cd 1" / "x", recursive=False)
    with pytest.raises(FileNotFoundError):
        list_recordings(tmp_path / "gone")


def test_links_are_followed_once(tmp_path):
    """To folders above and beside, to one another, and out of the tree; songs keep their real paths."""
    music, shelf = make(tmp_path / "music", "z/1.wav", "z/deep/2.wav"), make(tmp_path / "shelf", "3.wav")
    (music / "a").symlink_to(music / "z")
    (music / "zz").symlink_to(music / "z")
    (music / "z" / "up").symlink_to(music)
    (music / "z" / "deep" / "self").symlink_to(music / "z" / "deep")
    (music / "shelf").symlink_to(shelf)
    (shelf / "back").symlink_to(music)
    (music / "linked.wav").symlink_to(shelf / "3.wav")
    assert names(list_recordings(music), music) == ["linked.wav", "shelf/3.wav", "z/1.wav", "z/deep/2.wav"]
    assert names(list_recordings(music / "a"), music) == [
        "a/1.wav",
        "a/deep/2.wav",
        "a/up/linked.wav",
        "a/up/shelf/3.wav",
    ]


def test_a_link_that_leads_nowhere_is_not_passed_over(tmp_path):
    """Reading it says so; what is no file at all is passed over."""
    (tmp_path / "gone.wav").symlink_to(tmp_path / "nowhere.wav")
    (tmp_path / "ring.wav").symlink_to(tmp_path / "ring.wav")
    os.mkfifo(tmp_path / "pipe.wav")
    assert names(list_recordings(tmp_path), tmp_path) == ["gone.wav", "ring.wav"]


def test_folders_to_skip(tmp_path):
    """By what they are, not by their names; never the folder that is searched."""
    make(tmp_path, "song.wav", "out/tiny/song/vocals.wav", "other/out/x.wav")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    skip = [tmp_path / "link", tmp_path / "nowhere"]
    assert names(list_recordings(tmp_path, skip=skip), tmp_path) == ["other/out/x.wav", "song.wav"]
    assert names(list_recordings(tmp_path / "out", skip=skip), tmp_path) == ["out/tiny/song/vocals.wav"]


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    make(tmp_path, "a/1.wav", "b/2.wav")
    real = os.listdir

    def listdir(path):
        if os.fspath(path).endswith("a"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path)

    monkeypatch.setattr(folders.os, "listdir", listdir)
    with pytest.raises(PermissionError):
        list_recordings(tmp_path)
    errors = []
    assert names(list_recordings(tmp_path, on_error=errors.append), tmp_path) == ["b/2.wav"]
    assert [error.filename for error in errors] == [str(tmp_path / "a")]
    with pytest.raises(PermissionError):
        list_recordings(tmp_path / "a", on_error=errors.append)


def test_names_that_are_not_utf8(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.wav")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    assert [os.fsencode(path.name) for path in list_recordings(tmp_path)] == [b"caf\xe9.wav"]


PLAIN = "wav w64 caf au aiff flac tta wv mp3 mp2 ogg opus ac3 eac3"
AAC = "m4a aac ts 3gp flv mov mkv"
KINDS = {
    **{f"x.{name}": [] for name in PLAIN.split()},
    **{f"x.{name}": ["-c:a", "aac"] for name in AAC.split()},
    "x.m4v": ["-c:a", "aac", "-f", "mp4"],
    "x.wmv": ["-c:a", "wmav2", "-f", "asf"],
    "x.wma": ["-c:a", "wmav2"],
    "x.mpg": ["-c:a", "mp2", "-f", "mpeg"],
    "x.aifc": ["-c:a", "pcm_s16be", "-f", "aiff"],
    "x.webm": ["-c:a", "libopus"],
}


def test_what_can_be_read_alone_is_found_in_a_folder(tmp_path):
    """Kinds of files as ffmpeg writes them."""
    soundfile.write(tmp_path / "song.wav", np.random.default_rng(0).uniform(-0.5, 0.5, (4410, 2)), 44100)
    made = tmp_path / "made"
    made.mkdir()
    outputs = [word for name, options in KINDS.items() for word in (*options, made / name)]
    ffmpeg("-i", tmp_path / "song.wav", *outputs)
    assert set(names(list_recordings(made), made)) == set(KINDS)
    for path in made.iterdir():
        samples, rate = read(path)
        assert samples.shape[1] / rate > 0.09
