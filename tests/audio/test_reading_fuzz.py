"""Broken files of twenty formats: each is read as far as ffmpeg reads it or refused; none hangs or crashes.

MLX_XFORMER_EXAMPLES: how many files (make test-nightly); without it a few hundred.
"""

import json
import os
import random
import selectors
import subprocess
import sys

import pytest
from support.ffmpeg import decode, ffmpeg, song

WANTED = int(os.environ.get("MLX_XFORMER_EXAMPLES", "0")) or 400
COMPARED = 300  # at most, with ffmpeg
LIMIT = 10  # seconds for a file
FORMATS = {
    "x.wav": [],
    "x.w64": [],
    "rf64.wav": ["-rf64", "always"],
    "x.aiff": [],
    "x.caf": ["-c:a", "pcm_s16le"],
    "x.au": [],
    "x.flac": [],
    "x.mp3": ["-b:a", "64k"],
    "vbr.mp3": ["-q:a", "5", "-write_xing", "0"],
    "x.mp2": [],
    "x.aac": [],
    "x.m4a": ["-c:a", "aac", "-movflags", "+faststart"],
    "alac.m4a": ["-c:a", "alac"],
    "x.mkv": ["-c:a", "flac"],
    "x.webm": ["-c:a", "libopus", "-ar", 48000],
    "x.ogg": ["-c:a", "libvorbis"],
    "x.opus": ["-ar", 48000],
    "x.wma": ["-c:a", "wmav2"],
    "x.ac3": [],
    "x.ts": ["-c:a", "aac"],
    "x.tta": [],
    "x.wv": ["-c:a", "wavpack"],
}
PACKET = 0.15  # seconds: more than any of these formats puts into a packet
READER = """
import json, sys, traceback
import numpy as np
from mlx_xformer.audio.recording import Recording
for line in sys.stdin:
    warnings, said = [], {}
    try:
        recording = Recording.open(line.rstrip("\\n"))
        blocks = [block.shape[1] for block in recording.blocks(warnings.append)]
        said = {"seconds": sum(blocks) / recording.sample_rate, "warnings": warnings}
    except (ValueError, OSError) as error:
        said = {"refused": str(error)}
    except BaseException:
        said = {"fault": traceback.format_exc()}
    print(json.dumps(said), flush=True)
"""


class Reader:
    """A process that reads files, so that a crash is seen and a hang ended."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    def read(self, path):
        """What the process says of a file; {"fault": ...} if it crashes or takes too long."""
        with selectors.DefaultSelector() as selector:
            self.process.stdin.write(f"{path}\n".encode())
            self.process.stdin.flush()
            selector.register(self.process.stdout, selectors.EVENT_READ)
            line = self.process.stdout.readline() if selector.select(LIMIT) else None
        if line:
            return json.loads(line)
        self.close()
        self.__init__()
        return {"fault": "crashed" if line == b"" else f"took more than {LIMIT} s"}

    def close(self):
        self.process.kill()
        self.process.communicate()


def spoil(data, others, rng):
    """The bytes of a file, spoilt in one of six ways."""
    data, size = bytearray(data), len(data)
    way = rng.randrange(6)
    if way == 0:  # bits in its header
        for _ in range(rng.randint(1, 16)):
            data[rng.randrange(min(size, 400))] ^= 1 << rng.randrange(8)
    elif way == 1:  # bits anywhere
        for _ in range(rng.randint(1, 64)):
            data[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif way == 2:  # cut
        del data[rng.randrange(1, size) :]
    elif way == 3:  # the header of another file
        other = rng.choice(others)
        data[: rng.randrange(4, 600)] = other[: rng.randrange(4, 600)]
    elif way == 4:  # a stretch of zeros
        at = rng.randrange(size)
        data[at : at + rng.randrange(2000)] = bytes(rng.randrange(2000))
    else:  # a stretch twice
        at, end = sorted(rng.randrange(size) for _ in range(2))
        data[end:end] = data[at:end]
    return bytes(data)


@pytest.mark.slow
def test_broken_files(tmp_path):
    rng, originals = random.Random(0), {}
    for number, (name, arguments) in enumerate(FORMATS.items()):
        ffmpeg("-i", song(tmp_path, 2, 44100, seconds=1.3, seed=number), *arguments, tmp_path / name)
        originals[name] = (tmp_path / name).read_bytes()
    reader, faults, counts = Reader(), [], {"read": 0, "refused": 0, "compared": 0}
    for number in range(WANTED):
        name = rng.choice(list(originals))
        path = tmp_path / f"{number}_{name}"
        path.write_bytes(spoil(originals[name], list(originals.values()), rng))
        said = reader.read(path)
        counts["refused" if "refused" in said else "read"] += 1
        if "fault" in said or "\n" in said.get("refused", ""):
            faults.append((number, name, said))
        if number < COMPARED:
            try:
                theirs, rate = decode(path)
                seconds = theirs.shape[1] / rate
            except ValueError:
                seconds = 0.0
            counts["compared"] += 1
            if "seconds" in said and not said["warnings"] and said["seconds"] < seconds - PACKET:
                faults.append((number, name, said, seconds))
        path.unlink()
    reader.close()
    print(counts)
    assert counts["read"] > WANTED / 2
    assert not faults, faults
