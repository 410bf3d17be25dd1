"""Folders of songs: where stems go, what is passed over, and that no input is ever overwritten."""

import hashlib
import io
import json
import os
import sys

import numpy as np
import pytest
import soundfile
from support.audio import TINY_RATE as RATE
from support.audio import write_noise
from support.ffmpeg import ffmpeg
from support.models import FAST, STEMS, checkpoint
from support.processes import run_command

from mlx_xformer.cli import main
from mlx_xformer.cli.songs import name_folders
from mlx_xformer.separation.separator import Separator


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("models") / "tiny", segment="1/1", **FAST)


def songs(folder, *names, samples=800, **kind):
    """Short songs, each with other samples; returns their folder."""
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_noise(folder / name, samples, seed=seed, **kind)
    return folder


@pytest.fixture
def separate(model):
    def run(*arguments):
        return run_command("separate", *arguments, "-n", model, "--shifts", 0)

    return run


def files(folder):
    """{name: bytes} of all files below."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tracks(out):
    """The folders with stems below the model's."""
    found = {path.parent.relative_to(out / "tiny").as_posix() for path in out.rglob("*.*")}
    for track in found:
        assert sorted(p.name for p in (out / "tiny" / track).glob("*.wav")) == sorted(f"{s}.wav" for s in STEMS)
    return found


# Names


def test_a_tree_keeps_its_shape(separate, tmp_path):
    music = songs(tmp_path / "music", "cd1/01.wav", "cd2/01.wav", "cd2/extra/a b.wav", "top.wav", ".trash/no.wav")
    assert separate(music, "-o", tmp_path / "out")[::2] == (0, "")
    assert tracks(tmp_path / "out") == {"cd1/01", "cd2/01", "cd2/extra/a b", "top"}
    assert separate(music, "-o", tmp_path / "flat", "--no-recursive")[::2] == (0, "")
    assert tracks(tmp_path / "flat") == {"top"}
    assert separate(music / "cd1" / "..", music / "top.wav", "-o", tmp_path / "dots")[::2] == (0, "")
    assert tracks(tmp_path / "dots") == tracks(tmp_path / "out")


def test_several_folders_keep_their_names(separate, tmp_path):
    songs(tmp_path, "cd1/01.wav", "cd2/01.wav", "cd2/b/02.wav")
    given = [tmp_path / "cd1", tmp_path / "cd2", tmp_path / "cd2" / "b" / "02.wav"]
    assert separate(*given, "-o", tmp_path / "out")[::2] == (0, "")
    assert tracks(tmp_path / "out") == {"cd1/01", "cd2/01", "cd2/b/02"}


def test_names_of_folders(tmp_path, monkeypatch):
    """Their own names, with as many folders above as tell them apart, on every file system."""
    monkeypatch.chdir(tmp_path)

    def named(*folders):
        return [path.as_posix() for path in name_folders([tmp_path / f for f in folders]).values()]

    assert named("a") == ["."] and named("a", "a") == ["."]
    assert named("a", "b") == ["a", "b"] and named("x/a", "y/b") == ["a", "b"]
    assert named("rock/live", "jazz/live") == ["rock/live", "jazz/live"]
    assert named("rock/Live", "jazz/live") == ["rock/Live", "jazz/live"]
    assert named("caf\u00e9", "x/cafe\u0301")[1] == "x/cafe\u0301"
    assert named("a", "a/b/..", "a/c") == ["a", "a", "c"]
    assert [path.as_posix() for path in name_folders([tmp_path / "a", tmp_path]).values()] == ["a", tmp_path.name]


@pytest.mark.parametrize(
    ("names", "given", "remedy"),
    [
        (["x.wav", "x.flac"], [], "add {trackext} to --filename"),
        (["a/x.wav", "b/x.wav"], ["--filename", "{track}/{stem}.{ext}"], "add {folder} to --filename"),
        (["a b/c.wav", "a/b c.wav"], ["--filename", "{folder} {track}/{stem}.{ext}"], "separate it with another --out"),
        (["x.wav", "X.WAV"], [], "separate it with another --out"),
    ],
    ids=str,
)
def test_two_songs_of_one_name(separate, tmp_path, names, given, remedy):
    music = songs(tmp_path / "music", *names)
    if len(list(music.rglob("*.*"))) < 2:
        pytest.skip("this file system takes these names as one")
    code, out, err = separate(music, "-o", tmp_path / "out", *given)
    assert code == 1 and out.count("times real time") == 1
    assert err.count("\n") == 1 and "its stems would overwrite those of" in err and err.strip().endswith(remedy)


def test_names_of_tags(separate, tmp_path):
    """They tell songs apart whose files have one name; the report goes where the stems go."""
    for number, title in ((1, "One"), (2, "Two")):
        folder = songs(tmp_path / "music" / title, "song.wav")
        given = {"artist": "A/B", "album": "Album", "title": title, "track": f"{number}/9"}
        tags = [word for name, text in given.items() for word in ("-metadata", f"{name}={text}")]
        ffmpeg("-i", folder / "song.wav", *tags, folder / "song.flac")
        (folder / "song.wav").unlink()
    pattern = "{artist}/{album}/{number} {title} ({stem}).{ext}"
    given = [tmp_path / "music", "-o", tmp_path / "out", "--filename", pattern, "--report"]
    assert separate(*given)[::2] == (0, "")
    expected = set()
    for name in ("01 One", "02 Two"):
        expected |= {f"tiny/A_B/Album/{name} ({stem}).wav" for stem in STEMS} | {f"tiny/A_B/Album/{name} (report).html"}
    assert set(files(tmp_path / "out")) >= expected
    assert separate(*given, "--skip-existing")[1].count("skipped") == 2


# What is passed over


def test_own_outputs_are_passed_over(separate, tmp_path, monkeypatch):
    """Wherever the output folder is; a second run makes the same again, and says what it replaces."""
    for out in ("music/stems", "music"):
        music = songs(tmp_path / out.replace("/", "_") / "music", "a.wav", "b/c.wav")
        out = music.parent / out
        assert separate(music, "-o", out)[::2] == (0, "")
        first = files(music)
        code, _, err = separate(music, "-o", out)
        assert code == 0 and files(music) == first and len(first) == 2 + 2 * len(STEMS)
        assert err.count("\n") == 2 and err.count(": will replace ") == 2 and err.count("drums.wav and 2 more\n") == 2
    monkeypatch.chdir(songs(tmp_path / "here", "a.wav", "b/c.wav"))
    assert separate(".")[0] == 0 and separate(".")[0] == 0
    assert len(files(tmp_path / "here" / "separated")) == 2 * len(STEMS)


def test_stems_of_an_earlier_run_are_passed_over(separate, tmp_path):
    """Where the model's own folder is searched: the stems' stems are no songs the second time."""
    songs(tmp_path, "a.wav")
    assert separate(tmp_path / "a.wav", "-o", tmp_path / "out")[0] == 0
    for turn in range(2):
        code, out, err = separate(tmp_path / "out" / "tiny", "-o", tmp_path / "out")
        assert code == 0 and out.count("times real time") == 3
        assert ("passing over 9 files that are stems of an earlier run" in err) == bool(turn)
    assert len(files(tmp_path / "out")) == 3 + 9


def test_folders_that_cannot_be_read_stop_no_other(separate, tmp_path, monkeypatch):
    music, real = songs(tmp_path / "music", "a/1.wav", "b/2.wav"), os.listdir

    def listdir(path):
        if os.fspath(path).endswith("/a"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path)

    monkeypatch.setattr(os, "listdir", listdir)
    code, _, err = separate(music, "-o", tmp_path / "out")
    assert code == 1 and err == f"mlx-xformer: {music / 'a'}: Permission denied\n"
    assert tracks(tmp_path / "out") == {"b/2"}


# Inputs are never overwritten


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def never(*_, **__):
    raise AssertionError("nothing must be separated")


@pytest.mark.parametrize("kind", ["itself", "symlink", "hard link", "folder link", "in its folder"])
def test_an_input_is_never_overwritten(separate, tmp_path, monkeypatch, kind):
    """A stem that is separated again has the place of its own stem, by whatever name it is reached."""
    songs(tmp_path, "voice.wav")
    assert separate(tmp_path / "voice.wav", "-o", tmp_path / "out")[0] == 0
    stem = tmp_path / "out" / "tiny" / "voice" / "voice.wav"
    other = tmp_path / "other" / "voice.wav"
    other.parent.mkdir()
    given = other
    if kind == "itself":
        given = stem
    elif kind == "symlink":
        other.symlink_to(stem)
    elif kind == "hard link":
        os.link(stem, other)
    elif kind == "folder link":
        (other.parent / "link").symlink_to(stem.parent)
        given = other.parent / "link" / "voice.wav"
    else:
        given = tmp_path / "one"
        given.mkdir()
        os.link(stem, given / "voice.wav")
    before = files(tmp_path)
    monkeypatch.setattr(Separator, "separate_file", never)
    code, out, err = separate(given, "-o", tmp_path / "out")
    assert (code, out) == (1, "") and err.count("\n") == 1 and "would overwrite this recording itself" in err
    assert files(tmp_path) == before


def test_no_stem_overwrites_another_input(separate, tmp_path):
    songs(tmp_path, "a.wav")
    assert separate(tmp_path / "a.wav", "-o", tmp_path / "out")[0] == 0
    stem = tmp_path / "out" / "tiny" / "a" / "drums.wav"
    before = digest(stem)
    folder = tmp_path / "out" / "tiny" / "a"  # in which it is found as well
    code, out, err = separate(tmp_path / "a.wav", folder, stem, "-o", tmp_path / "out")
    assert code == 1 and out.count("times real time") == 3 and err.count("\n") == 1
    assert f"a.wav: its stems would overwrite the recording {stem}: choose another --out or --filename" in err
    assert digest(stem) == before and (tmp_path / "out" / "tiny" / "drums").is_dir()


def test_a_found_song_that_no_run_made_is_not_overwritten(separate, tmp_path):
    """One file with a stem's name is no earlier run: the song whose stem it would be is refused."""
    music = songs(tmp_path / "music", "a.wav", "x/tiny/a/drums.wav")
    before = digest(music / "x/tiny/a/drums.wav")
    code, _, err = separate(music, music / "x" / "tiny", "-o", music / "x", "--filename", "{track}/{stem}.{ext}")
    assert code == 1 and "a.wav: its stems would overwrite the recording" in err
    assert digest(music / "x/tiny/a/drums.wav") == before


def test_the_library_refuses_it_too(model, tmp_path):
    separator = Separator(model, shifts=0)
    songs(tmp_path, "voice.wav")
    made = separator.separate_file(tmp_path / "voice.wav", tmp_path / "out")
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"voice\.wav would overwrite this recording itself"):
        separator.separate_file(made.files["voice"], tmp_path / "out")
    assert files(tmp_path) == before


# --skip-existing


def cut(path):
    path.write_bytes(path.read_bytes()[:-400])


def remove(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


def spoil(path):
    path.write_bytes(b"no audio" * 1000)


def shorten(path):
    samples, rate = soundfile.read(path)
    soundfile.write(path, samples[:-10], rate)


def speed_up(path):
    samples, _ = soundfile.read(path)
    soundfile.write(path, samples, 2 * RATE)


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "ogg", "opus", "m4a"])
def test_skip_existing(separate, tmp_path, kind):
    """Songs whose stems are whole are passed over, others are made again; the files are those of one run."""
    music = songs(tmp_path / "music", "a.wav", "b/c.flac", samples=3001)
    given = [music, "-o", tmp_path / "out", "--format", kind, "--skip-existing"]
    code, out, err = separate(*given)
    assert (code, err) == (0, "") and out.count("times real time") == 2
    whole = files(tmp_path / "out")
    code, out, err = separate(*given)
    assert (code, err) == (0, "")
    place = tmp_path / "out" / "tiny"
    assert out.splitlines() == [
        f"{place / 'a'}{os.sep}: skipped {music / 'a.wav'}, all stems are there",
        f"{place / 'b' / 'c'}{os.sep}: skipped {music / 'b' / 'c.flac'}, all stems are there",
    ]
    for harm in (cut, remove, empty, spoil, *([shorten, speed_up] if kind in ("wav", "flac") else [])):
        harm(place / "b" / "c" / f"voice.{kind}")
        code, out, err = separate(*given)
        more = 1 if harm is remove else 2
        assert code == 0 and out.count("skipped") == 1 and err.endswith(f"drums.{kind} and {more} more\n"), harm
        assert files(tmp_path / "out") == whole, harm


def test_skip_existing_sees_other_rates_and_lengths(separate, tmp_path):
    """All stems alike are not enough: they must be those of this song at the wanted rate."""
    song = songs(tmp_path, "a.wav", rate=2 * RATE) / "a.wav"
    given = [song, "-o", tmp_path / "out", "--skip-existing"]
    assert separate(*given)[0] == 0
    assert "skipped" in separate(*given)[1]
    assert "skipped" not in separate(*given, "--rate", "keep")[1]
    assert "skipped" in separate(*given, "--rate", "keep")[1]
    write_noise(song, 900, 2 * RATE)
    assert "skipped" not in separate(*given, "--rate", "keep")[1]
    assert "skipped" not in separate(*given, "--report", "--rate", "keep")[1]  # there is no page yet
    assert "skipped" in separate(*given, "--report", "--rate", "keep")[1]


def test_skip_existing_sees_the_stem_file(tmp_path):
    model = checkpoint(tmp_path / "four", segment="1/1", sources=["drums", "bass", "other", "vocals"], **FAST)
    song = songs(tmp_path, "a.wav", samples=3001) / "a.wav"
    given = [song, "-n", model, "-o", tmp_path / "out", "--shifts", 0, "--skip-existing", "--format", "opus"]
    made = tmp_path / "out" / "four" / "a" / "a.stem.mp4"
    assert "skipped" not in run_command("separate", *given)[1] and not made.exists()
    code, out, err = run_command("separate", *given, "--stem-file", "--rate", "keep")
    assert code == 0 and "skipped" not in out and made.exists() and "and 3 more" in err
    assert json.loads(run_command("separate", *given, "--stem-file", "--json")[1])["stem_file"] == str(made)
    cut(made)
    assert "and 4 more" in run_command("separate", *given, "--stem-file")[2]


def test_skip_existing_in_json(separate, tmp_path):
    song = songs(tmp_path, "a.wav") / "a.wav"
    given = [song, "-o", tmp_path / "out", "--skip-existing", "--json"]
    first, second = (json.loads(separate(*given)[1]) for _ in range(2))
    assert second["skipped"] is True and second["file"] == str(song) and second["files"] == first["files"]
    assert "skipped" not in first


# Names that terminals or codecs cannot show


def test_a_name_that_is_not_utf8(model, tmp_path):
    song = songs(tmp_path, "a.wav") / "a.wav"
    odd = tmp_path / os.fsdecode(b"caf\xe9.wav")
    try:
        song.rename(odd)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    for given in ([odd], [tmp_path, "--json"]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            arguments = ["separate", *map(str, given), "-n", str(model), "-o", str(tmp_path / "out"), "--shifts", "0"]
            assert main(arguments) == 0
    assert sorted(os.listdir(tmp_path / "out" / "tiny" / os.fsdecode(b"caf\xe9"))) == sorted(f"{s}.wav" for s in STEMS)
    out.flush()
    last = json.loads(out.buffer.getvalue().splitlines()[-1])
    assert os.fsencode(last["file"]) == os.fsencode(odd)


def test_a_terminal_that_cannot_show_a_title(model, tmp_path):
    """The stems are written, so the song did not fail."""
    song = songs(tmp_path, "曲.wav") / "曲.wav"
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="latin-1") for _ in range(2))
    arguments = ["separate", str(song), "-n", str(model), "-o", str(tmp_path / "out"), "--shifts", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        assert main(arguments) == 0
        assert main([*arguments, "--overlap", "0"]) == 0  # says what it replaces
        assert main(["separate", str(tmp_path / "無.wav"), "-n", str(model)]) == 1
    for stream in (out, err):
        stream.flush()
    assert b"\\u66f2" in out.buffer.getvalue() and b"\\u66f2.wav: will replace " in err.buffer.getvalue()
    assert b"\\u7121.wav does not exist" in err.buffer.getvalue()
    assert len(np.unique([path.name for path in (tmp_path / "out" / "tiny" / "曲").iterdir()])) == len(STEMS)
