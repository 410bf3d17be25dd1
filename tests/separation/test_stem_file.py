"""STEM files: their boxes by the MP4 standard, their tracks by FFmpeg's libraries, what they refuse."""

import json
import struct

import av
import numpy as np
import pytest
import soundfile
from support.ffmpeg import decode
from support.models import FAST, checkpoint

from mlx_xformer.audio import read
from mlx_xformer.audio.encode import quantize
from mlx_xformer.audio.tags import Cover, Tags
from mlx_xformer.cli import main
from mlx_xformer.separation.stems import Output, StemFiles

NAMES = ("drums", "bass", "other", "vocals")
RATE = 44100


def noise(samples, seed):
    return np.random.default_rng(seed).uniform(-0.9, 0.9, (2, samples)).astype(np.float32)


def boxes(data):
    """The (name, payload) of boxes that follow one another."""
    found = []
    while data:
        size = struct.unpack_from(">I", data)[0]
        assert 8 <= size <= len(data)
        found.append((data[4:8], data[8:size]))
        data = data[size:]
    return found


def child(data, name):
    """The payload of the only box of this name."""
    (payload,) = [payload for found, payload in boxes(data) if found == name]
    return payload


def track_samples(path, number):
    """(C, N) of a track as integers, or as floats."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray() for frame in container.decode(audio=number)]
    return np.concatenate(frames, axis=1)


def write(folder, output, *, samples=70_001, cuts=(1000, 66_000), tags=None, rate=RATE, names=NAMES):
    """The STEM file of four stems of noise beside their own files; the mix, the stems."""
    mix, tracks = noise(samples, 9), {name: noise(samples, seed) for seed, name in enumerate(names)}
    path = folder / "song.stem.mp4"
    paths = {name: folder / f"{name}.{output.format}" for name in names}
    given = (path, lambda: np.split(mix, [7, 40_000], axis=1))
    with StemFiles(paths, rate, 2, samples, output, tags=tags, stem_file=given) as files:
        for parts in zip(*(np.split(track, cuts, axis=1) for track in tracks.values()), strict=True):
            files.write(dict(zip(tracks, parts, strict=True)))
        files.commit()
    return path, mix, tracks


@pytest.mark.parametrize(("format", "bits"), [("wav", 16), ("flac", 24), ("wav", 32)])
@pytest.mark.parametrize("clip", ["rescale", "none"])
def test_lossless_tracks(tmp_path, format, bits, clip):
    """ALAC holds each sample of the mix and of the stems, in 24 bits where their own files hold floats."""
    path, mix, tracks = write(tmp_path, Output(format, bits=bits, clip=clip))
    for number, track in enumerate((mix, *tracks.values())):
        found = track_samples(path, number)
        assert (found == quantize(track, 16 if bits == 16 else 24)).all()


def test_names_and_boxes(tmp_path):
    """Five tracks of which only the first is enabled, their names, and the box of NI, in the user data of the file."""
    path, *_ = write(tmp_path, Output(), tags=Tags("Song", "A"))
    with av.open(str(path)) as container:
        assert [stream.metadata["handler_name"] for stream in container.streams] == ["mix", *NAMES]
        assert all(stream.type == "audio" for stream in container.streams)
        assert container.metadata["title"] == "Song" and container.metadata["artist"] == "A"
    data = path.read_bytes()
    names = [name for name, _ in boxes(data)]
    assert names[0] == b"ftyp" and names[-1] == b"moov"
    moov = child(data, b"moov")
    enabled = [child(payload, b"tkhd")[3] & 1 for name, payload in boxes(moov) if name == b"trak"]
    assert enabled == [1, 0, 0, 0, 0]
    user_data = child(moov, b"udta")
    assert [name for name, _ in boxes(user_data)] == [b"meta", b"stem"]
    about = json.loads(child(user_data, b"stem"))
    assert about["version"] == 1 and [stem["name"] for stem in about["stems"]] == list(NAMES)
    assert len({stem["color"] for stem in about["stems"]}) == 4
    assert all(len(stem["color"]) == 7 and int(stem["color"][1:], 16) for stem in about["stems"])
    compressor, limiter = about["mastering_dsp"]["compressor"], about["mastering_dsp"]["limiter"]
    assert (compressor["enabled"], limiter["enabled"]) == (False, False)
    assert len(compressor) == 9 and len(limiter) == 4


def test_the_box_without_other_user_data(tmp_path):
    path, *_ = write(tmp_path, Output())
    assert [name for name, _ in boxes(child(child(path.read_bytes(), b"moov"), b"udta"))][-1] == b"stem"


@pytest.mark.parametrize("format", ["m4a", "mp3"])
def test_lossy_tracks_and_a_cover(tmp_path, format):
    """AAC by the bit rate of m4a. The cover is no sixth track of sound."""
    pixel = b"\xff\xd8\xff\xe0" + bytes(100)
    cover = Cover(pixel, "jpeg", 1, 1)
    path, mix, tracks = write(tmp_path, Output(format, bitrate=320), tags=Tags("Song", cover=cover))
    with av.open(str(path)) as container:
        assert [stream.codec_context.name for stream in container.streams] == ["aac"] * 5 + ["mjpeg"]
        assert bytes(next(container.demux(video=0))) == pixel
        kbps = [stream.bit_rate / 1000 for stream in container.streams.audio]
    assert kbps == pytest.approx([320 if format == "m4a" else 256] * 5, rel=0.1)
    back, rate = decode(path, stream=0)
    assert rate == RATE and back.shape == mix.shape
    # White noise is coded coarsely, but in place.
    late = [np.sum(np.roll(back, -shift, axis=1) * mix) for shift in (-1, 0, 1)]
    assert late[1] > 3 * max(map(abs, (late[0], late[2])))


def test_equal_songs_make_equal_files(tmp_path):
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        files.append(write(tmp_path / name, Output(), tags=Tags("Song"))[0].read_bytes())
    assert files[0] == files[1]


def test_what_a_stem_file_refuses(tmp_path):
    for names in (("vocals", "rest"), (*NAMES, "piano")):
        with pytest.raises(ValueError, match=f"a STEM file holds four stems, got {len(names)}: {', '.join(names)}"):
            write(tmp_path, Output(), names=names)
    with pytest.raises(ValueError, match=r"m4a holds 1 or 2 channels at .*, got 2 at 192000 Hz"):
        write(tmp_path, Output("ogg"), rate=192_000)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_of_the_stem_file_leaves_nothing(tmp_path, monkeypatch):
    """The mix that cannot be read: nor do the stems stay that were complete."""

    def mix():
        yield noise(1000, 0)
        raise OSError("the song is gone")

    paths = {name: tmp_path / f"{name}.wav" for name in NAMES}
    with (
        pytest.raises(OSError, match="the song is gone"),
        StemFiles(paths, RATE, 2, 1000, Output(), stem_file=(tmp_path / "song.stem.mp4", mix)) as files,
    ):
        files.write({name: noise(1000, 1) for name in NAMES})
        files.commit()
    assert list(tmp_path.iterdir()) == []


def test_separations_with_a_stem_file(tmp_path, capsys):
    """The mix is the song at the stems' rate. The command names the file, and refuses a model of other stems."""
    rate = 8000
    song = tmp_path / "My.song.wav"
    soundfile.write(song, noise(30_011, 1).T, rate, subtype="PCM_16")
    model = checkpoint(tmp_path / "four", segment="5/1", sources=list(NAMES), **FAST)
    arguments = ["separate", str(song), "-n", str(model), "-o", str(tmp_path / "out"), "--shifts", "0", "--stem-file"]
    assert main([*arguments, "--json"]) == 0
    path = tmp_path / "out" / "four" / "My.song" / "My.song.stem.mp4"
    answer = json.loads(capsys.readouterr().out)
    assert answer["stem_file"] == str(path) and path.name not in answer["files"]
    assert np.abs(track_samples(path, 0) / 2**15 - read(song)[0]).max() <= 2**-14
    assert main(arguments) == 0
    assert path.name in capsys.readouterr().out.splitlines()[0]
    assert main([*arguments, "--two-stems", "bass"]) == 1
    assert capsys.readouterr().err.endswith("a STEM file holds four stems, got 2: bass, no_bass\n")
