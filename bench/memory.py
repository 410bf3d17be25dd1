"""Peak memory of separating a file, short against long, and whether the stems are those of an unstreamed run.

    python bench/memory.py [--minutes 3,60] [--clip rescale,none] [--unstreamed 3,60] [--model htdemucs_mini]
                           [--mode full] [--json FILE]

The recording is the demo, repeated at changing levels. Every run has a process of its own, whose own high-water mark
counts. `--unstreamed` names the lengths that are also separated as one array in memory (Separator.separate) and
compared sample by sample: an hour of four stems takes about 14 GB there. `--mode time_only` runs a part of the model
only, which is quick and leaves all that is measured here as it is. Prints a table, appends JSON lines to
results/memory.jsonl and renews its part of README.md from the last run of each mode.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import BENCH, RESULTS, ROOT, add_json, origin
from report import append, fill, provenance

DEMO = ROOT / "mlx_xformer" / "data" / "demo.flac"
LEVELS = 7  # a repetition of the demo is one of so many levels, so that no two neighbours are alike
BLOCK = 2**20  # samples compared at a time


def record(path: Path, minutes: float) -> None:
    """Writes the demo over and over, `minutes` long."""
    import soundfile

    demo, rate = soundfile.read(DEMO, dtype="float32", always_2d=True)
    left, turn = round(60 * minutes * rate), 0
    with soundfile.SoundFile(path, "w", rate, demo.shape[1], subtype="PCM_16") as file:
        while left:
            level = (turn % LEVELS + 1) / LEVELS
            file.write(demo[:left] * level)
            left, turn = left - min(left, len(demo)), turn + 1


def peak_mib() -> float:
    """The most memory this process has held, in MiB. (On Linux a parent's peak shows in a child's ru_maxrss.)"""
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def streamed(model: str, mode: str, song: Path, out: Path, clip: str) -> dict[str, Any]:
    """Separates a file into files of 32-bit floats."""
    import mlx.core as mx

    from mlx_xformer.separation import Output, Separator

    made = Separator(model, mode=mode).separate_file(song, out, Output(bits=32, clip=clip))
    return {
        "audio_s": made.seconds,
        "wall_s": round(made.took, 1),
        "rss_mib": round(peak_mib(), 1),
        "framework_mib": round(mx.get_peak_memory() / 2**20, 1),
        **used(),
        "files": {stem: str(path) for stem, path in made.files.items()},
    }


def used() -> dict[str, Any]:
    """What this process computes with."""
    import mlx.core as mx

    import mlx_xformer
    from mlx_xformer.backend import device

    return {"blas": device.blas, "versions": {"mlx": mx.__version__, "mlx-xformer": mlx_xformer.__version__}}


def unstreamed(model: str, mode: str, song: Path, clip: str, files: dict[str, str]) -> dict[str, Any]:
    """Separates the whole recording at once in memory; counts the samples in which the files differ."""
    import mlx.core as mx
    import numpy as np
    import soundfile

    from mlx_xformer.audio import read
    from mlx_xformer.separation import Separator

    samples, rate = read(song)
    audio = mx.array(samples)
    del samples
    start = time.perf_counter()
    stems = Separator(model, mode=mode).separate(audio, rate)
    took, different, compared = time.perf_counter() - start, 0, 0
    for stem, path in files.items():
        whole = np.asarray(stems[stem])
        peak = max(np.abs(whole[:, at : at + BLOCK]).max() for at in range(0, whole.shape[1], BLOCK))
        divisor = max(np.float32(1.01) * peak, np.float32(1)) if clip == "rescale" else np.float32(1)
        at = 0
        for block in soundfile.blocks(path, blocksize=BLOCK, dtype="float32", always_2d=True):
            expected = whole[:, at : at + len(block)] / divisor
            different += int((expected != block.T).sum())
            at, compared = at + len(block), compared + block.size
        different += abs(whole.shape[1] - at) * whole.shape[0]
    return {
        "audio_s": audio.shape[1] / rate,
        "wall_s": round(took, 1),
        "rss_mib": round(peak_mib(), 1),
        "framework_mib": round(mx.get_peak_memory() / 2**20, 1),
        **used(),
        "compared": compared,
        "different": different,
    }


def child(name: str, *arguments: Any) -> dict[str, Any]:
    """What a function of this file returns in a process of its own."""
    task = json.dumps([name, [str(a) if isinstance(a, Path) else a for a in arguments]])
    answer = subprocess.run([sys.executable, __file__, "--task", task], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(answer.stdout.splitlines()[-1])


def perform(task: str) -> None:
    """A child's part of `child`."""
    if sys.platform == "linux":
        Path("/proc/self/oom_score_adj").write_text("1000")  # rather this one than what else runs here
    import mlx_xformer.backend.device  # noqa: F401 (before MLX, for its BLAS)

    name, arguments = json.loads(task)
    print(json.dumps({"streamed": streamed, "unstreamed": unstreamed}[name](*arguments)))


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record a run."""
    minutes, compared = ([float(n) for n in text.split(",") if n] for text in (options.minutes, options.unstreamed))
    clips, model = options.clip.split(","), (options.model, options.mode)
    with tempfile.TemporaryDirectory() as temporary:
        for length in minutes:
            song = Path(temporary) / f"{length:g}.flac"
            record(song, length)
            for clip in clips:
                print(f"  {length:g} minutes, {clip} ...", flush=True)
                made = child("streamed", *model, song, Path(temporary) / "out", clip)
                files = made.pop("files")
                yield {"case": "streamed", "minutes": length, "clip": clip, **made}
                if length in compared and clip == clips[0]:
                    print(f"  {length:g} minutes, unstreamed ...", flush=True)
                    whole = child("unstreamed", *model, song, clip, files)
                    yield {"case": "unstreamed", "minutes": length, "clip": clip, **whole}
                for path in files.values():
                    Path(path).unlink()
            song.unlink()


def table(found: list[dict[str, Any]]) -> str:
    """A Markdown table; `more` is against the shortest streamed run of the same clipping."""
    least = {r["clip"]: r["rss_mib"] for r in reversed(found) if r["case"] == "streamed"}
    lines = ["| run | minutes | clip | wall | peak RSS | more | peak MLX | differing samples |", "|" + "---|" * 8]
    for r in found:
        more = f"{r['rss_mib'] - least[r['clip']]:+.0f} MiB" if r["case"] == "streamed" else ""
        same = f"{r['different']} of {r['compared']:,}" if "different" in r else ""
        lines.append(
            f"| {r['case']} | {r['minutes']:g} | {r['clip']} | {r['wall_s']:.0f} s | {r['rss_mib']:.0f} MiB | {more} |"
            f" {r['framework_mib']:.0f} MiB | {same} |"
        )
    return "\n".join(lines)


def renew(readme: Path, results: Path) -> None:
    """Writes the last run of each mode, with machine, versions and date, between the marks of `readme`."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for record in map(json.loads, results.read_text().splitlines()):
        run = runs.setdefault(record["mode"], [])
        if run and run[0]["date"] != record["date"]:
            run.clear()
        run.append(record)
    parts = [f"{table(run)}\n\n{run[0]['model']}, {mode}; {provenance(run[0])}" for mode, run in runs.items()]
    fill(readme, "memory", "\n\n".join(parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", default="3,60")
    parser.add_argument("--clip", default="rescale")
    parser.add_argument("--unstreamed", default="3")
    parser.add_argument("--model", default="htdemucs_mini")
    parser.add_argument("--mode", choices=["full", "time_only"], default="full")
    add_json(parser)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        perform(options.task)
        return
    shared = {**origin("memory"), "model": options.model, "mode": options.mode}
    found = []
    for result in measure(options):
        found.append({**shared, **result})
        append(options.json or RESULTS / "memory.jsonl", found[-1:])
    if options.json is None:
        renew(BENCH / "README.md", RESULTS / "memory.jsonl")
    print(table(found))


if __name__ == "__main__":
    main()
