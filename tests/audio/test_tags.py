"""Tags: read from files that ffmpeg wrote, written into files that ffmpeg's libraries and others read."""

import base64
import dataclasses
import struct
import wave
import zlib

import av
import numpy as np
import pytest
import soundfile
from support.ffmpeg import ffmpeg

from mlx_xformer.audio.encode import FORMATS, Encoding, open_encoder
from mlx_xformer.audio.sink import Sink
from mlx_xformer.audio.tags import Cover, Tags, read_tags

TEXTS = {"title": "Tïtle; 曲=x", "artist": "Ärtist\u3000Zwei", "album": "Âlbum", "date": "1998-05-18"}
TAGS = Tags(**TEXTS, number="3/12")


def make_png(width, height, seed=0):
    """A picture of noise, of about 3 bytes a pixel."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = np.random.default_rng(seed).integers(0, 256, (height, 1 + 3 * width), np.uint8)
    rows[:, 0] = 0  # no filter
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows.tobytes())) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


PNG = Cover(make_png(211, 127), "png", 211, 127)


@pytest.fixture(scope="module")
def songs(tmp_path_factory):
    """A tagged song in every format, with a cover where ffmpeg adds one, as ffmpeg writes it; the cover's JPEG."""
    folder = tmp_path_factory.mktemp("songs")
    soundfile.write(folder / "song.wav", 0.1 * np.random.default_rng(0).standard_normal((20_000, 2)), 44100)
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=322x206", "-frames:v", 1, folder / "cover.jpg")
    tags = [part for name, text in (TEXTS | {"track": "3/12"}).items() for part in ("-metadata", f"{name}={text}")]
    for suffix in ("mp3", "flac", "m4a", "ogg", "opus", "wav", "mka"):
        cover = ["-i", folder / "cover.jpg", "-map", 0, "-map", 1, "-c:v", "copy", "-disposition:v", "attached_pic"]
        cover = cover if suffix in ("mp3", "flac", "m4a") else []
        ffmpeg("-i", folder / "song.wav", *cover, *tags, folder / f"tagged.{suffix}")
    return folder


def write_tagged(path, tags, format, samples=30_000):
    audio = 0.1 * np.random.default_rng(1).standard_normal((2, samples)).astype(np.float32)
    with path.open("w+b") as file:
        sink = Sink(file, path.parent)
        encoder = open_encoder(sink, 48000, 2, samples, Encoding(format), tags)
        encoder.write(audio)
        encoder.close()
        assert sink.error is None
    return path


@pytest.mark.parametrize("suffix", ["mp3", "flac", "m4a", "ogg", "opus", "wav", "mka"])
def test_tags_of_songs_that_ffmpeg_wrote(songs, suffix):
    jpeg = Cover((songs / "cover.jpg").read_bytes(), "jpeg", 322, 206)
    expected = dataclasses.replace(TAGS, cover=jpeg if suffix in ("mp3", "flac", "m4a") else None)
    assert read_tags(songs / f"tagged.{suffix}") == expected


@pytest.mark.parametrize("format", FORMATS)
def test_tags_that_are_written(songs, tmp_path, format):
    """By FFmpeg's libraries; WAV has no place for a cover. The audio keeps its length beside a large cover."""
    jpeg = Cover((songs / "cover.jpg").read_bytes(), "jpeg", 322, 206)
    large = Cover(make_png(503, 307), "png", 503, 307)
    for cover in (None, jpeg, PNG, large):
        path = write_tagged(tmp_path / "x", dataclasses.replace(TAGS, cover=cover), format)
        with av.open(str(path)) as container:
            texts = {name.lower(): text for name, text in container.metadata.items()}
            texts |= {name.lower(): text for name, text in container.streams.audio[0].metadata.items()}
            assert {name: texts.get(name) for name in [*TEXTS, "track"]} == TEXTS | {"track": "3/12"}
            pictures = [bytes(packet) for packet in container.demux(video=0)] if container.streams.video else []
            assert pictures[:1] == ([cover.data] if cover and format != "wav" else [])
        with av.open(str(path)) as container:
            total = sum(frame.samples for frame in container.decode(audio=0))
            assert total == (30_000 if format != "m4a" else 30_720)  # AAC's frames; the container tells 30,000


def test_other_readers_of_tags(tmp_path):
    """libsndfile reads WAV's list and the comments of FLAC and Ogg; the standard library skips the list."""
    for format in ("wav", "flac", "ogg", "mp3"):
        with soundfile.SoundFile(write_tagged(tmp_path / "x", TAGS, format)) as file:
            assert {name: getattr(file, name) for name in TEXTS} == TEXTS, format
            assert file.tracknumber == "3/12" and file.frames == 30_000
    with wave.open(str(write_tagged(tmp_path / "x", TAGS, "wav"))) as file:
        assert file.getnframes() == 30_000 and len(file.readframes(30_000)) == 4 * 30_000


def test_a_title_that_looks_like_a_chunk(tmp_path):
    """The time in the PEAK chunk of float files is found behind the tags."""
    audio = np.full((1, 1001), 0.5, np.float32)
    with (tmp_path / "x.wav").open("w+b") as file:
        encoder = open_encoder(Sink(file, tmp_path), 8000, 1, 1001, Encoding(bits=32), Tags("PEAK" * 5 + "data"))
        encoder.write(audio)
        encoder.close()
    data = (tmp_path / "x.wav").read_bytes()
    at = data.rindex(b"PEAK")
    assert struct.unpack_from("<II", data, at + 4)[0] == 16 and data[at + 12 : at + 16] == bytes(4)
    with soundfile.SoundFile(tmp_path / "x.wav") as file:
        assert file.title == "PEAK" * 5 + "data" and (file.read(dtype="float32") == 0.5).all()


def test_the_cover_among_the_comments_of_ogg(tmp_path):
    """Its fields as the FLAC specification has them."""
    data = write_tagged(tmp_path / "x", Tags(cover=Cover(make_png(7, 5), "png", 7, 5)), "ogg").read_bytes()
    name = b"METADATA_BLOCK_PICTURE="
    at = data.index(name)
    size = struct.unpack_from("<I", data, at - 4)[0]
    block = base64.b64decode(data[at + len(name) : at + size], validate=True)
    assert struct.unpack_from(">II9sIIIIII", block) == (3, 9, b"image/png", 0, 7, 5, 24, 0, len(make_png(7, 5)))
    assert block[41:] == make_png(7, 5)


def test_titles_of_stems():
    assert dataclasses.replace(TAGS, cover=PNG).of_stem("vocals") == dataclasses.replace(
        TAGS, title="Tïtle; 曲=x (vocals)", cover=PNG
    )
    assert Tags(artist="A").of_stem("vocals") == Tags(artist="A")


def test_texts_are_one_line(tmp_path):
    odd = {"title": " a\nb\tc\u2028d ", "artist": "x" * 3000, "album": " \n"}
    tags = [part for name, text in odd.items() for part in ("-metadata", f"{name}={text}")]
    ffmpeg("-f", "lavfi", "-i", "sine=d=0.1", *tags, tmp_path / "x.flac")
    assert read_tags(tmp_path / "x.flac") == Tags(title="a b c d", artist="x" * 1000)


def test_files_without_tags(tmp_path, songs):
    """Nothing is raised, whatever the file is."""
    (tmp_path / "text.mp3").write_text("no audio")
    (tmp_path / "empty.mp3").write_bytes(b"")
    for path in (songs / "song.wav", tmp_path / "text.mp3", tmp_path / "empty.mp3", tmp_path / "missing", tmp_path):
        assert read_tags(path) == Tags()
    name = tmp_path / "caf\udce9.flac"
    name.write_bytes((songs / "tagged.flac").read_bytes())
    assert read_tags(name).title == TEXTS["title"]


def test_broken_tags_do_not_keep_stems_from_being_written(songs, tmp_path, capfd):
    """Files cut and with changed bytes: what is read of them can be written in every format."""
    rng, found = np.random.default_rng(0), 0
    for number in range(60):
        data = bytearray((songs / f"tagged.{('mp3', 'flac', 'm4a', 'ogg', 'opus', 'wav')[number % 6]}").read_bytes())
        for at in rng.integers(0, min(len(data), 12_000), 20):
            data[at] = rng.integers(256)
        (tmp_path / "song").write_bytes(data[: rng.integers(100, len(data))] if number % 3 else data)
        tags = read_tags(tmp_path / "song")
        found += tags != Tags()
        write_tagged(tmp_path / "stem", tags.of_stem("bass"), FORMATS[number % len(FORMATS)], 1003)
    assert found > 20 and capfd.readouterr() == ("", "")
