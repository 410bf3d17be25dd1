"""The ffmpeg program, an independent reader and writer of audio files."""

import functools
import subprocess

import imageio_ffmpeg
import numpy as np


@functools.cache
def program():
    """The path of the program."""
    return imageio_ffmpeg.get_ffmpeg_exe()


def ffmpeg(*arguments, check=True):
    """Runs ffmpeg, quietly, and replaces files; returns what it wrote to its standard output."""
    command = [program(), "-y", "-hide_banner", "-loglevel", "error", *map(str, arguments)]
    return subprocess.run(command, check=check, capture_output=True).stdout


def decode(path, channels=None, rate=None, stream=0):
    """Decodes a sound stream as ffmpeg does: float32 (channels, samples), and the sample rate in Hz."""
    change = [*(["-ac", channels] if channels else []), *(["-ar", rate] if rate else [])]
    out = ffmpeg("-i", path, "-map", f"0:a:{stream}", *change, "-c:a", "pcm_f32be", "-f", "au", "-", check=False)
    if len(out) < 24:
        raise ValueError(f"ffmpeg cannot read {path}")
    start, _, encoding, sample_rate, count = np.frombuffer(out[4:24], ">u4")
    assert encoding == 6
    return np.frombuffer(out[start:], ">f4").reshape(-1, count).T.astype(np.float32), int(sample_rate)
