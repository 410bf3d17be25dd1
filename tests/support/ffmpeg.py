"""The ffmpeg program, an independent reader and writer of audio files."""

import functools
import subprocess

import imageio_ffmpeg
import numpy as np
import soundfile

from mlx_xformer.audio.recording import Recording

# Decoders of floats are rounded differently by different releases of FFmpeg: 16 steps of float32 at full scale.
FLOATS = 2.0**-20
SECONDS = 2.1


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


def song(folder, channels=2, rate=44100, seconds=SECONDS, seed=0, name=None):
    """A WAV file of tones with an onset twice a second, as loud as music."""
    rng, t = np.random.default_rng(seed), np.arange(round(rate * seconds)) / rate
    x = np.zeros((channels, len(t)))
    for line in x:
        for frequency in rng.uniform(60, min(6000, 0.4 * rate), 9):
            line += rng.uniform(0.2, 1) * np.sin(2 * np.pi * frequency * t + rng.uniform(0, 6))
        line += 1.5 * np.exp(-12 * (2 * t % 1)) * rng.standard_normal(len(t))
    path = folder / (name or f"song{channels}_{rate}_{seed}.wav")
    soundfile.write(path, 0.1 * (x / x.std()).T, rate, subtype="FLOAT")
    return path


def read(path, **options):
    """What we read, and the warnings."""
    warnings = []
    recording = Recording.open(path, **options)
    whole = np.concatenate(list(recording.blocks(warnings.append)), axis=1)
    assert warnings or recording.samples in (None, whole.shape[1])
    return whole, recording.sample_rate, warnings


def differ(ours, theirs):
    """The largest difference; infinite where the shapes differ."""
    return np.abs(ours - theirs).max() if ours.shape == theirs.shape else np.inf
