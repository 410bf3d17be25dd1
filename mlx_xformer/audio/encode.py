"""The formats of audio files: what they can hold, how samples are quantized, and their encoders.

libsndfile writes WAV and Ogg Vorbis, FFmpeg's libraries write the rest. Axes: C channels, n samples of a block.
"""

from __future__ import annotations

import io
import struct
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
import soundfile

from .encoders import Codec, ContainerEncoder, name_comments
from .ogg import VorbisSink
from .quantization import Bits, quantize
from .sink import Sink
from .tags import Tags

Format = Literal["wav", "flac", "mp3", "ogg", "opus", "m4a"]
FORMATS: tuple[Format, ...] = get_args(Format)
_CODECS = {"flac": "flac", "mp3": "libmp3lame", "opus": "libopus", "m4a": "aac"}  # FFmpeg's names
_SUBTYPES = {16: "PCM_16", 24: "PCM_24", 32: "FLOAT"}
_WAV_LIMIT = 2**32 - 2**16  # bytes of samples that a WAV header can count; longer files are written as RF64
_MP3_RATES = {  # Hz: the bit rates in kbit/s that MP3 has at this sample rate
    **dict.fromkeys((32000, 44100, 48000), (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)),
    **dict.fromkeys((16000, 22050, 24000), (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)),
    **dict.fromkeys((8000, 11025, 12000), (8, 16, 24, 32, 40, 48, 56, 64)),
}
_AAC_RATES = (7350, 8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)  # Hz
_OPUS_RATE = 48000  # Hz, at which all Opus files are decoded
_QUICK_OPUS = {"compression_level": "0", "application": "lowdelay", "frame_duration": "120"}  # no codec for speech
_FLAC_CHANNELS, _FLAC_RATE = 8, 655350  # the most that FLAC holds; the rate in Hz
_VORBIS = ((32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 250), np.linspace(0, 1, 11))  # kbit/s of a channel; quality
_VORBIS_CHUNK = 2**14  # samples: libsndfile keeps what is written at once on its stack


@dataclass(frozen=True)
class Encoding:
    """How samples are stored in a file.

    Args:
        format: "wav", "flac", "mp3", "ogg" (Vorbis), "opus" or "m4a" (AAC).
        bits: per sample: 16, 24 or, for floats in wav only, 32. The lossy formats ignore it.
        mp3_bitrate: `bitrate` if the format is mp3.
        bitrate: of the lossy formats, in kbit/s. mp3 has some rates, by default the highest; ogg has about this rate,
            by default 128 for each channel; opus by default 96 for each channel; m4a by default 128 for each channel.

    Raises:
        ValueError: if a field is out of range.
    """

    format: Format = "wav"
    bits: Bits = 16
    mp3_bitrate: int | None = None
    bitrate: int | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {self.format!r}")
        if self.bits not in _SUBTYPES or (self.format == "flac" and self.bits == 32):
            allowed = "16 or 24 for flac" if self.format == "flac" else "16, 24 or 32"
            raise ValueError(f"bits must be {allowed}, got {self.bits}")
        if self.bitrate is not None and self.lossless:
            raise ValueError(f"bitrate is of lossy formats, got {self.bitrate} for {self.format}")
        bitrates = sorted({kbps for rates in _MP3_RATES.values() for kbps in rates})
        mp3 = {"mp3_bitrate": self.mp3_bitrate, "bitrate": self.bitrate if self.format == "mp3" else None}
        given = {name: kbps for name, kbps in mp3.items() if kbps is not None}
        for name, kbps in given.items():
            if kbps not in bitrates:
                raise ValueError(f"{name} must be one of {_join(bitrates)} kbit/s, got {kbps}")
        if len(set(given.values())) > 1:
            raise ValueError(f"bitrate and mp3_bitrate must agree, got {self.bitrate} and {self.mp3_bitrate}")

    @property
    def lossless(self) -> bool:
        """Whether a file holds the samples as quantize() gives them."""
        return self.format in ("wav", "flac")

    def choose_rate(self, sample_rate: int) -> int:
        """Returns the sample rate in Hz of a file for audio of `sample_rate`: Opus has one only."""
        return _OPUS_RATE if self.format == "opus" else sample_rate

    def choose_bitrate(self, sample_rate: int, channels: int) -> int:
        """Returns the bit rate in kbit/s of a lossy file.

        Raises:
            ValueError: if the format does not have it.
        """
        given = self.bitrate if self.bitrate is not None or self.format != "mp3" else self.mp3_bitrate
        if self.format == "mp3":
            allowed: Sequence[int] = _MP3_RATES[sample_rate]
            default, words = allowed[-1], f"one of {_join(allowed)}"
        else:
            low, default, high = {
                "ogg": (_VORBIS[0][0], 128, _VORBIS[0][-1]),
                "opus": (6, 96, 256),
                "m4a": (8, 128, 6 * sample_rate // 1000),  # AAC's frames of 1024 samples have at most 6144 bits
            }[self.format]
            allowed = range(low * channels, high * channels + 1)
            default, words = min(default, high) * channels, f"from {allowed[0]} to {allowed[-1]}"
        if given is not None and given not in allowed:
            name = "mp3_bitrate" if self.bitrate is None else "bitrate"
            raise ValueError(f"{name} must be {words} kbit/s at {sample_rate} Hz, got {given}")
        return default if given is None else given

    def check(self, sample_rate: int, channels: int) -> None:
        """Checks that the format can hold audio of this sample rate and number of channels.

        Raises:
            ValueError: if it cannot.
        """
        got = f"got {channels} at {sample_rate} Hz"
        rates = {"mp3": sorted(_MP3_RATES), "m4a": _AAC_RATES, "opus": (_OPUS_RATE,)}.get(self.format, (sample_rate,))
        if not self.lossless:
            if sample_rate not in rates or channels > 2:
                where = "" if self.format == "ogg" else f" at {_join(rates)} Hz"
                raise ValueError(f"{self.format} holds 1 or 2 channels{where}, {got}")
            self.choose_bitrate(sample_rate, channels)
        if self.format == "flac":
            if channels > _FLAC_CHANNELS or sample_rate > _FLAC_RATE:
                raise ValueError(f"flac holds at most {_FLAC_CHANNELS} channels and {_FLAC_RATE} Hz, {got}")
            if sample_rate >= 2**16 and sample_rate % 10:  # a frame counts such rates in tens
                raise ValueError(f"flac holds rates above 65535 Hz in steps of 10 Hz, {got}")


def _join(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


class Encoder(Protocol):
    """What turns blocks of audio into a file. It raises what get_library_errors() names where it fails."""

    def write(self, *tracks: np.ndarray) -> None:
        """Appends (C, n) float samples to each track; most files have one."""

    def close(self) -> None:
        """Finishes the file. The file object stays open."""


def open_encoder(
    sink: Sink, sample_rate: int, channels: int, samples: int, encoding: Encoding, tags: Tags | None = None
) -> Encoder:
    """Begins a file that holds one track.

    Args:
        sink: where it goes.
        sample_rate: in Hz.
        channels: of the audio.
        samples: how many samples per channel will be written: it decides between WAV and RF64.
        encoding: the file's format.
        tags: of the file.

    Raises:
        ValueError: if the format cannot hold such audio, or if FFmpeg's libraries lack its codec.
    """
    encoding.check(sample_rate, channels)
    tags = tags or Tags()
    if encoding.format == "wav":
        large = samples * channels * encoding.bits // 8 > _WAV_LIMIT
        return _Wav(sink, sample_rate, channels, "RF64" if large else "WAV", encoding.bits, tags)
    bitrate = None if encoding.lossless else encoding.choose_bitrate(sample_rate, channels)
    if encoding.format == "ogg":
        return _Vorbis(sink, sample_rate, channels, bitrate or 0, tags)
    codec = choose_codec(_CODECS[encoding.format], encoding.bits, bitrate)
    return ContainerEncoder(sink, encoding.format, codec, sample_rate, channels, tags=tags)


def get_library_errors() -> tuple[type[Exception], ...]:
    """Returns what the libraries raise where they cannot write."""
    ffmpeg = sys.modules.get("av.error")  # imported only where it is needed
    loaded = (ffmpeg.FFmpegError,) if ffmpeg else ()
    return (soundfile.LibsndfileError, AssertionError, OSError, *loaded)  # soundfile asserts that all was written


def encode_webm(audio: np.ndarray, bitrate: int) -> bytes:
    """Encodes audio in memory as Opus in a WebM container, in the encoder's fastest mode.

    Args:
        audio: (C, N) floats at 48 kHz, C being 1 or 2.
        bitrate: in kbit/s, on average; quiet passages take less.

    Returns:
        The bytes of a WebM file. It tells a decoder how many samples to leave out at both ends, so that N remain.
    """
    import av

    layout = {1: "mono", 2: "stereo"}[audio.shape[0]]
    interleaved = np.ascontiguousarray(audio.T, np.float32).reshape(1, -1)
    out = io.BytesIO()
    with av.open(out, "w", format="webm", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libopus", rate=_OPUS_RATE, layout=layout, options=_QUICK_OPUS)
        stream.bit_rate = 1000 * bitrate
        # The frame has no time: with one, packets begin at -2.5 ms, which WebM rounds to -3, and browsers follow that.
        frame = av.AudioFrame.from_ndarray(interleaved, format="flt", layout=layout)
        frame.sample_rate = _OPUS_RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


def choose_codec(name: str, bits: Bits, bitrate: int | None) -> Codec:
    """Returns a codec of FFmpeg's libraries.

    Args:
        name: FFmpeg's name for it.
        bits: per sample of flac and alac: 16 or 24.
        bitrate: of the lossy codecs, in kbit/s.
    """
    if name in ("flac", "alac"):
        planar = "p" if name == "alac" else ""
        return Codec(name, f"s{16 if bits == 16 else 32}{planar}", bits)
    return Codec(name, "flt" if name == "libopus" else "fltp", bitrate=bitrate)


class _Wav:
    """An Encoder of WAV."""

    def __init__(self, sink: Sink, sample_rate: int, channels: int, container: str, bits: Bits, tags: Tags) -> None:
        self._sink, self._bits = sink, bits
        self._file = soundfile.SoundFile(sink, "w", sample_rate, channels, format=container, subtype=_SUBTYPES[bits])
        texts = {"title": tags.title, "artist": tags.artist, "album": tags.album, "date": tags.date}
        for name, text in (texts | {"tracknumber": tags.number}).items():
            if text:
                setattr(self._file, name, text)

    def write(self, *tracks: np.ndarray) -> None:
        (audio,) = tracks
        self._file.write(quantize(audio, self._bits).T)

    def close(self) -> None:
        self._file.close()
        at, name, size = 12, b"", 0  # after RIFF's own head
        while name not in (b"PEAK", b"data") and not self._sink.error:
            self._sink.seek(at)
            name, size = struct.unpack("<4sI", self._sink.read(8).ljust(8, b"\0"))
            at += 8 + size + size % 2
        if name == b"PEAK":  # zero the time that float files tell there: equal samples make equal files
            self._sink.seek(at - size + 4)  # after the version
            self._sink.write(bytes(4))


class _Vorbis:
    """An Encoder of Ogg Vorbis."""

    def __init__(self, sink: Sink, sample_rate: int, channels: int, bitrate: int, tags: Tags) -> None:
        kind = {"format": "OGG", "subtype": "VORBIS"}
        level = 1 - float(np.interp(bitrate / channels, *_VORBIS))
        target = VorbisSink(sink, name_comments(tags))
        self._file = soundfile.SoundFile(target, "w", sample_rate, channels, compression_level=level, **kind)

    def write(self, *tracks: np.ndarray) -> None:
        (audio,) = tracks
        for start in range(0, audio.shape[1], _VORBIS_CHUNK):
            self._file.write(np.clip(audio[:, start : start + _VORBIS_CHUNK], -1, 1).T)

    def close(self) -> None:
        self._file.close()
