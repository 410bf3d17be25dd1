"""What tests that start programs share: tiny models in checkpoint folders, noise to separate, and the programs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from mlx.utils import tree_flatten
from support.harness import draw
from support.htdemucs_options import options

from mlx_xformer.models.htdemucs import Bag, BagConfig, HTDemucs, HTDemucsConfig
from mlx_xformer.storage.checkpoint import save_checkpoint

RATE = 8000
STEMS = ("drums", "voice", "rest")
TINY = {"nfft": 256, "depth": 2, "t_layers": 2, "segment": "128/1000", "t_heads": 2, "bottom_channels": 8}
# The waveform's branch alone, in few steps: hours of audio take seconds (with mode="time_only").
FAST = {"depth": 1, "t_layers": 0, "channels": 2, "dconv_mode": 0, "bottom_channels": 0, "rewrite": False}


def checkpoint(folder: Path, seed: int = 1, **changes: Any) -> Path:
    """A folder with a tiny HTDemucs of drawn weights."""
    config = HTDemucsConfig.from_dict(options("base") | TINY | changes)
    model = HTDemucs(config)
    draw(model, seed)
    return _save(folder, "htdemucs", model, config.to_dict())


def bag_checkpoint(folder: Path, weights: Any, **changes: Any) -> Path:
    """A folder with a bag of as many tiny HTDemucs as `weights` has rows."""
    config = HTDemucsConfig.from_dict(options("base") | TINY | changes)
    bag = Bag(BagConfig((config,) * len(weights), weights))
    for seed, member in enumerate(bag.models):
        draw(member, seed)
    return _save(folder, "htdemucs_bag", bag, bag.config.to_dict())


def _save(folder: Path, family: str, model: Any, config: dict) -> Path:
    weights = dict(tree_flatten(model.parameters()))
    save_checkpoint(folder, weights, family=family, config=config, provenance={})
    return folder


def noise(path: Path, samples: int, rate: int = RATE, *, seed: int = 0, level: float = 0.5, **kind: Any) -> Path:
    """A stereo recording of noise whose level changes, a stretch of odd length at a time."""
    rng = np.random.default_rng(seed)
    stretch, turn = 30011, 0
    burst = rng.uniform(-level, level, (stretch, 2)).astype(np.float32)
    with soundfile.SoundFile(path, "w", rate, 2, **kind) as file:
        while samples:
            file.write(burst[:samples] * np.float32(1 / (turn % 7 + 1)))
            samples, turn = samples - min(samples, stretch), turn + 1
    return path


def start(code, *arguments, **given):
    """A Python of its own, with errors as text."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **given)


def end(process, limit=120):
    """(exit code, stdout, stderr) of a process that may take `limit` seconds."""
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


# Runs command lines as told on standard input, each with room for `file` bytes in a file or `disk` bytes on the disk;
# answers what came of each, and what lies below the output folder, which then goes. Descriptors are caught, so that
# what C libraries print is seen as well.
SHELL = """
import faulthandler, json, os, pathlib, resource, shutil, sys, tempfile
from hashlib import sha256
from mlx_xformer import cli

def run(arguments, out, file, disk):
    ballast = out.parent / "ballast"
    if disk is not None:
        room = os.statvfs(out.parent)
        with ballast.open("wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, room.f_bavail * room.f_frsize - disk)
    if file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file, resource.RLIM_INFINITY))
    try:
        return cli.main(arguments), None
    except BaseException as failure:
        return None, repr(failure)
    finally:
        sys.stdout.flush()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        ballast.unlink(missing_ok=True)

answers = os.fdopen(os.dup(1), "w")
faulthandler.enable(os.dup(2))
for line in sys.stdin:
    print("begin", file=answers, flush=True)
    arguments, out, *room = json.loads(line)
    out, streams = pathlib.Path(out), [tempfile.TemporaryFile() for _ in "oe"]
    for stream, fd in zip(streams, (1, 2)):
        os.dup2(stream.fileno(), fd)
    code, error = run([*arguments, "-o", str(out)], out, *room)
    texts = [os.pread(stream.fileno(), 10**6, 0).decode(errors="replace") for stream in streams]
    files = [path for path in out.rglob("*") if path.is_file()]
    found = {str(path.relative_to(out)): [path.stat().st_size, sha256(path.read_bytes()).hexdigest()] for path in files}
    print(json.dumps([code, *texts, error, found, out.exists()]), file=answers, flush=True)
    shutil.rmtree(out, ignore_errors=True)
"""


@dataclass
class Result:
    """What came of a command line; files: sizes and SHA-256 of all below the output folder."""

    code: int | None
    out: str
    err: str
    error: str | None
    files: dict[str, list]
    folder_exists: bool


def run_all(tasks, prefix=(), limit=240):
    """The Result of each (arguments, out, room in a file or None, room on the disk or None), in one process."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([*prefix, sys.executable, "-c", SHELL], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    given = "".join(json.dumps([list(map(str, arguments)), str(out), *room]) + "\n" for arguments, out, *room in tasks)
    try:
        out, err = process.communicate(given, timeout=limit)
    except subprocess.TimeoutExpired as late:
        process.kill()
        done = (late.stdout or b"").decode().count("begin")
        raise AssertionError(f"hangs in {tasks[done - 1]}") from None
    lines = [line for line in out.splitlines() if line != "begin"]
    last = tasks[min(out.count("begin\n"), len(tasks)) - 1]
    assert process.returncode == 0, f"exit code {process.returncode} in {last}: {err}"
    return [Result(*json.loads(line)) for line in lines]
