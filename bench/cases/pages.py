"""The report page of 30 seconds of audio, and the separations before it: by the demo model, by one of full size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from memory import record

from cases.bag import CONFIG
from cases.common import describe_ours
from mlx_xformer import HTDemucs, Separator
from mlx_xformer.separation.report.page import write_report

SECONDS = 30
CASES = {
    "separation, htdemucs_mini": "separate_small",
    "separation, htdemucs": "separate_full",
    "report page": "write_page",
}


def make_song(folder: Path) -> Path:
    """The demo, repeated."""
    song = folder / "song.flac"
    record(song, SECONDS / 60)
    return song


def separate_small(folder: Path) -> dict[str, Any]:
    separator, song = Separator("htdemucs_mini"), make_song(folder)
    return describe_ours(lambda: separator.separate_file(song, folder) and None)


def separate_full(folder: Path) -> dict[str, Any]:
    """With the weights that a new model has: the time of a separation does not depend on them."""
    separator, song = Separator(HTDemucs(CONFIG)), make_song(folder)
    return describe_ours(lambda: separator.separate_file(song, folder) and None)


def write_page(folder: Path) -> dict[str, Any]:
    song = make_song(folder)
    files = Separator("htdemucs_mini").separate_file(song, folder).files

    def run() -> None:
        write_report(folder / "report.html", song, files, title="song", facts={})

    return describe_ours(run)
