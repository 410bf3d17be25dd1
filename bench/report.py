"""Tables from bench/results/*.jsonl, and the parts of bench/README.md that are written by scripts."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TITLES = {
    "attention": "Attention, 8 heads of 64",
    "cache": "One layer's cache (8 heads over 2, of width 64): 256 appends; 512 and 16 x 1 queries at 8k",
    "mixture": "8 experts, two a token (width 256, hidden 512, gated); runs of 1000, 40, 3 and 1 passes, or 3 steps",
    "pages": "A recording of 30 s: its separation into four stems, and its report page",
    "parts": "Parts, at their official sizes",
    "peers": "One official segment of 7.8 s (htdemucs, float32)",
    "bag": "One stem of a bag of four, a track of 12 s",
    "seq2seq": "64 tokens over a source of 256 (encoder-decoder, width 256, 4 layers a side, 8 heads, post-norm)",
    "language": "A prompt of 512 tokens and 128 after it (Llama of 32.5 million parameters)",
}
Record = dict[str, Any]


def append(path: Path, records: Sequence[Record]) -> None:
    """Adds one JSON line a record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")


def latest(path: Path) -> list[Record]:
    """The records of the last whole run in a file (runs of chosen cases do not count)."""
    records = [record for line in path.read_text().splitlines() if (record := json.loads(line))["whole"]]
    return [record for record in records if record["date"] == records[-1]["date"]]


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def _mib(value: float | None) -> str:
    return "" if value is None else f"{value:.0f} MiB" if value >= 10 or value == int(value) else f"{value:.2f} MiB"


def table(records: Sequence[Record]) -> str:
    """A Markdown table; columns that no record fills are left out."""
    columns = {
        "case": lambda r: r["case"],
        "wall, median": lambda r: _seconds(r["wall_median_s"]),
        "tokens per second": lambda r: f"{r['tokens'] / r['wall_median_s']:.1f}" if r.get("tokens") else "",
        "ratio": lambda r: f"{r['ratio']:.2f}",
        "fastest": lambda r: _seconds(min(r["wall_s"])),
        "CPU-seconds": lambda r: _seconds(r["cpu_median_s"]),
        "of these in the kernel": lambda r: _seconds(r["kernel_median_s"]) if r.get("kernel_median_s") else "",
        "first run": lambda r: _seconds(r["first_s"]) if r.get("cold") else "",
        "cores busy with others": lambda r: "" if None in r["others"] else f"{statistics.median(r['others']):.1f}",
        "cache": lambda r: _mib(r.get("cache_mib")),
        "peak RSS": lambda r: _mib(r["rss_mib"]),
        "peak MLX": lambda r: _mib(r["framework_mib"]),
        "SNR against PyTorch f32": lambda r: f"{r['snr_db']:.1f} dB" if r.get("snr_db") else "",
        "against its float64": lambda r: f"{r['snr64_db']:.1f} dB" if r.get("snr64_db") else "",
    }
    rows = {name: [cell(record) for record in records] for name, cell in columns.items()}
    rows = {name: cells for name, cells in rows.items() if any(cells)}
    lines = ["| " + " | ".join(rows) + " |", "|" + "---|" * len(rows)]
    lines += ["| " + " | ".join(cells) + " |" for cells in zip(*rows.values(), strict=True)]
    return "\n".join(lines)


def section(records: Sequence[Record]) -> str:
    """A table under its title, with machine, versions, date and commit."""
    first = records[0]
    threads = sorted({str(record["threads"]) for record in records})
    blas = sorted({record["blas"] for record in records})
    if len(blas) > 1:
        blas = [f"{record['blas']} ({record['case']})" for record in records]
    versions = {name: number for record in records for name, number in record["versions"].items()}
    setting = f"{', '.join(threads)} threads; {first['rounds']} rounds"
    line = provenance({**first, "versions": versions, "blas": "; ".join(blas)}, setting)
    return f"### {TITLES[first['suite']]}\n\n{table(records)}\n\n{line}"


def provenance(record: Record, setting: str = "") -> str:
    """The line below a table: machine, setting, date, commit, versions, BLAS."""
    machine = record["machine"]
    parts = [machine["cpu"], f"{machine['cores']} cores", f"{machine['memory_gib']} GiB", machine["system"]]
    about = "; ".join([", ".join(parts), *([setting] if setting else []), record["date"]])
    versions = ", ".join(f"{name} {number}" for name, number in sorted(record["versions"].items()))
    return f"{about}; commit {record['commit'] or 'none yet'}. {versions}. BLAS: {record['blas']}."


def fill(readme: Path, name: str, text: str) -> None:
    """Writes the text between the marks <!-- name: begin ... --> and <!-- name: end -->."""
    head, rest = re.split(rf"(?<=<!-- {name}: begin)", readme.read_text())
    mark, rest = rest.split("\n", 1)
    readme.write_text(f"{head}{mark}\n{text}\n<!-- {name}: end -->{rest.split(f'<!-- {name}: end -->')[1]}")


def renew(readme: Path, results: Path) -> None:
    """Writes the latest run of every file in `results` between the marks of `readme`."""
    runs = [latest(path) for path in sorted(results.glob("*.jsonl"))]
    sections = [section(records) for records in runs if records]
    fill(readme, "results", "\n\n".join(sections))


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    renew(here / "README.md", here / "results")
