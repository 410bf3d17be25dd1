"""Recordings: read in blocks from files of many kinds, by name or by content; faults."""

from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile

from mlx_xformer.audio import recording as audio
from mlx_xformer.audio import resampling
from mlx_xformer.audio.recording import Recording


def noise(channels=2, samples=1000, seed=0, peak=0.9):
    x = np.random.default_rng(seed).uniform(-peak, peak, (channels, samples))
    return x.astype(np.float32)


def encode(path, x, rate, codec, video=False):
    """An independent writer: FFmpeg's libraries, with a picture stream in front if asked."""
    with av.open(str(path), "w") as container:
        picture = container.add_stream("mpeg4", rate=25) if video else None
        stream = container.add_stream(codec, rate=rate)
        stream.layout = "stereo" if len(x) == 2 else "mono"
        if picture:
            picture.width = picture.height = 32
            container.mux(picture.encode(av.VideoFrame(32, 32, "yuv420p")))
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(x), "fltp", stream.layout.name)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        resampler = av.AudioResampler(stream.format, stream.layout, rate, frame_size=stream.frame_size or None)
        for part in (*resampler.resample(frame), *resampler.resample(None), None):
            container.mux(stream.encode(part))
        if picture:
            container.mux(picture.encode(None))


def test_reading_what_is_not_audio(tmp_path):
    cases = {
        "text.wav": (b"this is no audio\n" * 50, "cannot be read as audio"),
        "empty.wav": (b"", "is empty"),
        "no_name": (b"text", "cannot be read as audio"),
        "data.raw": (b"1234" * 10, "cannot be read as audio"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} {message}"):
            audio.read(tmp_path / name)
    soundfile.write(tmp_path / "none.wav", np.zeros((0, 2)), 44100)
    with pytest.raises(ValueError, match="holds no samples"):
        audio.read(tmp_path / "none.wav")
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan]), 44100, subtype="FLOAT")
    with pytest.raises(ValueError, match="holds NaN or infinite samples"):
        audio.read(tmp_path / "nan.wav")
    with pytest.raises(FileNotFoundError, match=r"gone\.wav does not exist"):
        audio.read(tmp_path / "gone.wav")
    with pytest.raises(IsADirectoryError, match="is a directory, not an audio file"):
        audio.read(tmp_path)


def test_length_that_the_header_does_not_tell(tmp_path):
    """As a FLAC file written to a pipe: the 36 bits of the total are 0."""
    x = noise(samples=200_003)
    soundfile.write(tmp_path / "x.flac", x.T, 44100)
    raw = bytearray((tmp_path / "x.flac").read_bytes())
    raw[21] &= 0xF0
    raw[22:26] = bytes(4)
    (tmp_path / "piped.flac").write_bytes(raw)
    assert Recording.open(tmp_path / "piped.flac").samples is None
    assert (audio.read(tmp_path / "piped.flac")[0] == audio.read(tmp_path / "x.flac")[0]).all()


@pytest.mark.parametrize(
    ("name", "codec", "video", "exact"),
    [
        ("x.m4a", "aac", False, False),
        ("x.mp4", "aac", True, False),
        ("x.mka", "flac", False, True),
        ("x.mkv", "pcm_s16le", True, True),
    ],
)
def test_containers(tmp_path, name, codec, video, exact):
    """m4a, and the sound of a video: what was encoded comes back, in place to the sample."""
    t = np.arange(100_003) / 22050
    x = np.stack([0.5 * np.sin(2 * np.pi * 441 * t), 0.3 * np.sin(2 * np.pi * 997 * t)]).astype(np.float32)
    encode(tmp_path / name, x, 22050, codec, video)
    back, rate = audio.read(tmp_path / name)
    assert rate == 22050 and back.dtype == np.float32 and back.shape[0] == 2
    assert back.shape == x.shape
    error = np.abs(back[:, 2048 : x.shape[1] - 2048] - x[:, 2048:-2048]).max()
    assert error < (2**-14 if exact else np.abs(np.diff(x)).max() / 2), (
        error
    )  # a shift by one sample makes it twice that
    recording = Recording.open(tmp_path / name)
    again = np.concatenate(list(recording.blocks()), axis=1)
    assert (again == back).all() and (np.concatenate(list(recording.blocks()), axis=1) == back).all()


def test_containers_without_sound(tmp_path):
    with av.open(str(tmp_path / "mute.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 32
        container.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
        container.mux(stream.encode(None))
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:1,\nfile://{tmp_path}/x.wav\n#EXT-X-ENDLIST\n")
    soundfile.write(tmp_path / "x.wav", noise().T, 44100)
    with pytest.raises(ValueError, match=r"^no audio stream in .*mute\.mp4$"):
        audio.read(tmp_path / "mute.mp4")
    with pytest.raises(ValueError, match=r"list\.m3u8 cannot be read as audio"):  # a playlist opens no other file
        audio.read(tmp_path / "list.m3u8")


@pytest.mark.parametrize(("rate", "channels"), [(48000, 2), (22050, 1), (44100, 3)])
def test_converted_blocks_are_the_whole_conversion(tmp_path, rate, channels):
    x = noise(2, samples=3 * audio.BLOCK + 1001)
    whole = resampling.resample(resampling.convert_channels(x[: min(channels, 2)], 2), rate, 44100)
    recording = Recording.from_array(x[: min(channels, 2)], rate)
    blocks = list(recording.convert_blocks(2, 44100))
    assert {b.shape[1] for b in blocks[:-1]} == {audio.BLOCK} and blocks[0].shape[0] == 2
    assert (np.concatenate(blocks, axis=1) == whole).all()
