"""The formats of audio files: WAV, FLAC and MP3, what they can hold and how samples are quantized."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import soundfile

Bits = Literal[16, 24, 32]
Format = Literal["wav", "flac", "mp3"]
_SUBTYPES = {16: "PCM_16", 24: "PCM_24", 32: "FLOAT"}
_WAV_LIMIT = 2**32 - 2**16  # bytes of samples that a WAV header can count; longer files are written as RF64
_MP3_RATES = {  # Hz: the bit rates in kbit/s that MP3 has at this sample rate
    **dict.fromkeys((32000, 44100, 48000), (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)),
    **dict.fromkeys((16000, 22050, 24000), (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)),
    **dict.fromkeys((8000, 11025, 12000), (8, 16, 24, 32, 40, 48, 56, 64)),
}
_FLAC_CHANNELS, _FLAC_RATE = 8, 655350  # the most that FLAC holds; the rate in Hz


@dataclass(frozen=True)
class Encoding:
    """How samples are stored in a file.

    Args:
        format: "wav", "flac" or "mp3".
        bits: per sample: 16, 24 or, for floats in wav only, 32. mp3 ignores it.
        mp3_bitrate: in kbit/s; by default the highest at the sample rate.

    Raises:
        ValueError: if a field is out of range.
    """

    format: Format = "wav"
    bits: Bits = 16
    mp3_bitrate: int | None = None

    def __post_init__(self) -> None:
        if self.format not in ("wav", "flac", "mp3"):
            raise ValueError(f"format must be one of wav, flac, mp3, got {self.format!r}")
        if self.bits not in _SUBTYPES or (self.format == "flac" and self.bits == 32):
            allowed = "16 or 24 for flac" if self.format == "flac" else "16, 24 or 32"
            raise ValueError(f"bits must be {allowed}, got {self.bits}")
        bitrates = sorted({kbps for rates in _MP3_RATES.values() for kbps in rates})
        if self.mp3_bitrate is not None and self.mp3_bitrate not in bitrates:
            raise ValueError(f"mp3_bitrate must be one of {_join(bitrates)} kbit/s, got {self.mp3_bitrate}")

    def check(self, sample_rate: int, channels: int) -> None:
        """Checks that the format can hold audio of this sample rate and number of channels.

        Raises:
            ValueError: if it cannot.
        """
        if self.format == "mp3":
            if sample_rate not in _MP3_RATES or channels > 2:
                rates = _join(sorted(_MP3_RATES))
                raise ValueError(f"mp3 holds 1 or 2 channels at {rates} Hz, got {channels} at {sample_rate} Hz")
            bitrates = _MP3_RATES[sample_rate]
            if self.mp3_bitrate is not None and self.mp3_bitrate not in bitrates:
                allowed = f"{_join(bitrates)} kbit/s at {sample_rate} Hz"
                raise ValueError(f"mp3_bitrate must be one of {allowed}, got {self.mp3_bitrate}")
        if self.format == "flac" and (channels > _FLAC_CHANNELS or sample_rate > _FLAC_RATE):
            allowed = f"at most {_FLAC_CHANNELS} channels and {_FLAC_RATE} Hz"
            raise ValueError(f"flac holds {allowed}, got {channels} at {sample_rate} Hz")


def _join(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def quantize(audio: np.ndarray, bits: Bits) -> np.ndarray:
    """Converts float samples to integers as demucs does: clamped to full scale and truncated, without dither.

    Args:
        audio: float samples of any shape, full scale at -1 and 1.
        bits: 16, 24 or 32.

    Returns:
        The same shape: int16 for 16 bits, int32 with the sample in the upper three bytes for 24 bits, and for 32 bits
        the samples as float32, unclamped.
    """
    if bits == 32:
        return audio.astype(np.float32)
    clamped = np.clip(audio.astype(np.float32), -1, 1)
    if bits == 16:
        return (clamped * np.float32(2**15 - 1)).astype(np.int16)
    if bits == 24:
        return (clamped * np.float32(2**23 - 1)).astype(np.int32) << 8
    raise ValueError(f"bits must be 16, 24 or 32, got {bits}")


def encode_mp3(audio: np.ndarray, sample_rate: int, bitrate: int) -> bytes:
    """Encodes audio as MP3 in memory, at a constant bit rate.

    Args:
        audio: (C, N) floats, C being 1 or 2.
        sample_rate: in Hz.
        bitrate: in kbit/s.

    Returns:
        The bytes of an MP3 file.
    """
    out = io.BytesIO()
    options = soundfile_options(sample_rate, 0, Encoding("mp3", mp3_bitrate=bitrate))
    soundfile.write(out, audio.T, sample_rate, **options)
    return out.getvalue()


def soundfile_options(sample_rate: int, size: int, encoding: Encoding) -> dict[str, Any]:
    """The arguments of soundfile.SoundFile for an encoding; `size` is in bytes of samples."""
    if encoding.format == "mp3":
        low, high = _MP3_RATES[sample_rate][0], _MP3_RATES[sample_rate][-1]
        level = (high - (encoding.mp3_bitrate or high)) / (high - low)
        return {"format": "MP3", "bitrate_mode": "CONSTANT", "compression_level": min(level, 0.9999)}  # 1 is refused
    container = "FLAC" if encoding.format == "flac" else "RF64" if size > _WAV_LIMIT else "WAV"
    return {"format": container, "subtype": _SUBTYPES[encoding.bits]}
