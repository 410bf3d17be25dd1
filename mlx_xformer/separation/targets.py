"""The files that stems go to: where they are, what is there already, and that none of them is a recording."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..audio.inspection import measure_file
from ..audio.recording import Recording
from ..audio.tags import Tags, read_tags
from .stems import Output

_TAG = re.compile(r"\{(artist|album|title|number)")  # in a pattern of names
_ROUNDING = 2  # samples by which a length may differ after resampling


@dataclass(frozen=True)
class Targets:
    """The files of a recording's stems.

    Args:
        stems: the file of each stem.
        stem_file: the file of the mix and all stems, if one is asked for.
        tags: of the recording, if names hold them.
    """

    stems: dict[str, Path]
    stem_file: Path | None = None
    tags: Tags | None = None

    @property
    def files(self) -> list[Path]:
        """All of the files."""
        return [*self.stems.values(), *([self.stem_file] if self.stem_file else [])]


def list_targets(
    output: Output, folder: Path, recording: Path, stems: Iterable[str], below: str = "", tags: Tags | None = None
) -> Targets:
    """Returns the files of a recording's stems.

    Args:
        output: chooses the names.
        folder: the output folder.
        recording: the recording's file.
        stems: the stems' names.
        below: the recording's folder below the one that was searched, "" for none.
        tags: of the recording; they are read if they are not given and the names hold them.

    Raises:
        ValueError: if the recording's name gives no names for its stems, or if a stem would take the place of the
            recording itself, be it by another name (a link, or other letters on a disk that takes them as equal).
    """
    if tags is None and _TAG.search(output.filename):
        tags = read_tags(recording)
    paths = {stem: output.path(folder, recording, stem, below=below, tags=tags) for stem in stems}
    stem_file = output.stem_file_path(folder, recording, below=below, tags=tags) if output.stem_file else None
    targets = Targets(paths, stem_file, tags)
    own = identify(recording)
    for path in targets.files:
        if own and identify(path) == own:
            remedy = "choose another output folder or other names"
            raise ValueError(f"{recording}: {path.name} would overwrite this recording itself; {remedy}")
    return targets


def identify(path: Path) -> tuple[int, int] | None:
    """What is the same for all names of a file; None if there is no such file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def are_whole(targets: Targets, recording: Recording, sample_rate: int, channels: int, output: Output) -> bool:
    """Tells whether the files of all stems of a recording are there and complete.

    Their headers and ends are read, not all of their samples.

    Args:
        targets: the files.
        recording: the recording. Files are compared with its length if that is known without reading all of it.
        sample_rate: the model's, in Hz.
        channels: the model's.
        output: how the files were to be written.
    """
    measured = {measure_file(path) for path in targets.files}
    found = measured.pop()
    rate = output.encoding.choose_rate(recording.sample_rate if output.rate == "keep" else sample_rate)
    if measured or found is None or (found.sample_rate, found.channels) != (rate, channels):
        return False
    if recording.samples is None:
        return True
    return abs(found.samples - recording.samples * rate / recording.sample_rate) <= _ROUNDING
