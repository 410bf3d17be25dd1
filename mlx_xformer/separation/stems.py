"""The files of a track's stems: names, gains against clipping, and all files put in place together.

Axes: C channels, n samples of a block.
"""

from __future__ import annotations

import os
import re
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import IO, Literal

import numpy as np

from ..audio.encode import Encoding, Format, open_encoder
from ..audio.files import AudioFile, defer_interrupt, prepare_target
from ..audio.quantization import Bits
from ..audio.recording import BLOCK
from ..audio.resampling import rechunk
from ..audio.tags import Tags, read_tags
from .stem_file import STEM_SUFFIX, StemEncoder, check_stems

Clip = Literal["rescale", "joint", "clamp", "none"]
_FIELDS = ("track", "trackext", "stem", "ext", "folder", "artist", "album", "title", "number")
_MAX_TAG = 120  # bytes of a tag in a name; a name may have 255


@dataclass(frozen=True)
class Output:
    """How stems become files.

    Args:
        format: "wav", "flac", "mp3", "ogg" (Vorbis), "opus" (at 48 kHz) or "m4a" (AAC).
        bits: per sample of wav (16, 24, or 32 for floats) and flac (16 or 24).
        mp3_bitrate: the bit rate if the format is mp3, in kbit/s; by default the highest at the sample rate.
        clip: what keeps samples within full scale. "rescale" divides each stem whose peak times 1.01 exceeds 1 by that
            product; "joint" divides all stems by the largest such product, so that they still add up to the mix;
            "clamp" limits samples to -0.99 and 0.99; "none" leaves them.
        rate: "model" for the model's sample rate, "keep" for the recording's own.
        filename: a pattern of {track}, {trackext}, {stem}, {ext}, {folder}, {artist}, {album}, {title} and {number},
            below the output folder. {folder} is the recording's folder below the one that was searched, so that a tree
            of recordings keeps its shape. The last four are the recording's tags: "unknown" if it has none, except that
            {number}, which has at least two digits, is empty.
        bitrate: of any lossy format, in kbit/s, see `Encoding`.
        stem_file: whether to write one more file, TRACK.stem.mp4, of the mix and the stems. There must be four stems.

    Raises:
        ValueError: if a field is out of range.
    """

    format: Format = "wav"
    bits: Bits = 16
    mp3_bitrate: int | None = None
    clip: Clip = "rescale"
    rate: Literal["model", "keep"] = "model"
    filename: str = "{folder}/{track}/{stem}.{ext}"
    bitrate: int | None = None
    stem_file: bool = False

    def __post_init__(self) -> None:
        _ = self.encoding  # checks its fields
        if self.clip not in ("rescale", "joint", "clamp", "none"):
            raise ValueError(f"clip must be one of rescale, joint, clamp, none, got {self.clip!r}")
        if self.rate not in ("model", "keep"):
            raise ValueError(f'rate must be "model" or "keep", got {self.rate!r}')
        try:
            fields = {name for _, name, _, _ in Formatter().parse(self.filename) if name is not None}
        except ValueError:
            fields = {"?"}
        if not fields <= set(_FIELDS) or "stem" not in fields:
            must = f"hold {{stem}} and only {{{'}, {'.join(_FIELDS)}}}"
            raise ValueError(f"filename must {must}, got {self.filename!r}")
        name = self.filename.format(**dict.fromkeys(_FIELDS, "a"))
        if Path(name).is_absolute() or ".." in Path(name).parts or name.endswith(("/", os.sep)):
            raise ValueError(f"filename must name files below the output folder, got {self.filename!r}")

    @property
    def encoding(self) -> Encoding:
        """How samples are stored in the files."""
        return Encoding(self.format, self.bits, self.mp3_bitrate, self.bitrate)

    def path(
        self,
        folder: Path,
        recording: Path,
        stem: str,
        ext: str | None = None,
        *,
        below: str = "",
        tags: Tags | None = None,
    ) -> Path:
        """Returns the file of a recording's stem.

        Args:
            folder: the output folder.
            recording: the recording's file, whose name gives {track} and {trackext}.
            stem: the stem's name.
            ext: the extension, by default the format's.
            below: {folder}, a relative path.
            tags: of the recording; by default they are read from its file if the pattern names one of them.

        Raises:
            ValueError: if the recording's name gives no track name, as ".wav" does, or if `below` is not a folder below
                another.
        """
        track, dot, trackext = recording.name.rpartition(".")
        track, trackext = (track, trackext) if dot else (trackext, "")
        if track in ("", ".", ".."):
            raise ValueError(f"{recording}: its name leaves none for its stems")
        if Path(below).is_absolute() or ".." in Path(below).parts:
            raise ValueError(f"below must be a relative path without '..', got {below!r}")
        fields = {"track": track, "trackext": trackext, "stem": stem, "ext": ext or self.format, "folder": below}
        if tags is None:
            tags = read_tags(recording) if re.search(r"\{(artist|album|title|number)", self.filename) else Tags()
        fields |= _get_name_fields(tags)
        # Without a number, what sets it apart from the rest goes too: "{number} - {title}" is the title.
        pattern = self.filename if fields["number"] else re.sub(r"\{number\}(\. |[ _-])*", "", self.filename)
        return folder / pattern.format(**fields).lstrip("/")

    def stem_file_path(self, folder: Path, recording: Path, *, below: str = "", tags: Tags | None = None) -> Path:
        """Returns the STEM file of a recording, TRACK.stem.mp4 in the folder of a stem with the name TRACK, see `path`.

        Where the pattern tells files apart by more than {track}, as by {title}, it names the STEM file too.
        """
        track = recording.name.rpartition(".")[0] or recording.name
        path = self.path(folder, recording, track, STEM_SUFFIX[1:], below=below, tags=tags)
        fields = {name for _, name, _, _ in Formatter().parse(self.filename.rpartition("/")[2])}
        if fields - {None} <= {"track", "stem", "ext"}:
            return path.with_name(track + STEM_SUFFIX)
        return path if path.name.endswith(STEM_SUFFIX) else path.with_name(path.name + STEM_SUFFIX)


def _get_name_fields(tags: Tags) -> dict[str, str]:
    """The tags as parts of a file's name."""
    fields = {name: _clean(getattr(tags, name)) or "unknown" for name in ("artist", "album", "title")}
    number = _clean(tags.number.partition("/")[0])
    return fields | {"number": number and number.zfill(2)}


def _clean(text: str) -> str:
    """A tag without what a file's name cannot hold: control characters, separators of folders, a dot at its start."""
    kept = "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp"))
    kept = re.sub(r"[/\\]|^\.", "_", kept.strip())
    return kept.encode()[:_MAX_TAG].decode(errors="ignore").strip()


class StemFiles:
    """Files of equal sample rate, channels and length that are written together.

    This is a context manager: on leaving it, everything that was not committed is removed. Where a gain needs the peak
    of the whole track, or a STEM file all tracks, samples wait in unnamed temporary files beside the targets.

    Args:
        paths: the file of each stem.
        sample_rate: in Hz.
        channels: of each stem.
        samples: per channel of each stem.
        output: how samples are stored and kept from clipping.
        tags: of the recording.
        stem_file: one more file, of the mix and all stems, and what gives the (C, n) blocks of the mix.

    Raises:
        ValueError: if the format cannot hold such audio.
        OSError: if a file cannot be written; so do its methods.
    """

    def __init__(
        self,
        paths: Mapping[str, Path],
        sample_rate: int,
        channels: int,
        samples: int,
        output: Output,
        *,
        tags: Tags | None = None,
        stem_file: tuple[Path, Callable[[], Iterable[np.ndarray]]] | None = None,
    ):
        output.encoding.check(sample_rate, channels)
        if stem_file:
            check_stems(list(paths), sample_rate, channels, output.encoding)
        self._paths, self._sample_rate, self._channels, self._samples = dict(paths), sample_rate, channels, samples
        self._output, self._tags, self._stem_file = output, tags or Tags(), stem_file
        self._peaks = dict.fromkeys(paths, np.float32(0))
        self._needs_peak = output.clip in ("rescale", "joint")
        self._stack = ExitStack()
        self._spools: dict[str, IO[bytes]] = {}
        self._files: dict[str, AudioFile] = {}

    def __enter__(self) -> StemFiles:
        try:
            for stem, path in self._paths.items():
                prepare_target(path, self._stack)
                if self._needs_peak or self._stem_file:
                    self._spools[stem] = self._stack.enter_context(tempfile.TemporaryFile(dir=path.parent))
                else:
                    self._open(stem)
            if self._stem_file:
                prepare_target(self._stem_file[0], self._stack)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def write(self, stems: Mapping[str, np.ndarray]) -> None:
        """Appends (C, n) samples to every stem."""
        for stem, audio in stems.items():
            if not np.isfinite(audio).all():
                raise ValueError(f"{stem} must be finite, got NaN or infinite samples")
            if self._needs_peak:
                self._peaks[stem] = max(self._peaks[stem], np.abs(audio).max(initial=0))
            kept = np.clip(audio, -0.99, 0.99) if self._output.clip == "clamp" else audio
            if self._spools:
                self._spools[stem].write(np.ascontiguousarray(kept.T, np.float32).data)
            else:
                self._files[stem].write(kept)

    def commit(self) -> dict[str, float]:
        """Finishes all files and puts them in place, all or none; returns the gain of each stem."""
        divisors = {stem: max(np.float32(1.01) * peak, np.float32(1)) for stem, peak in self._peaks.items()}
        if self._output.clip == "joint":
            divisors = dict.fromkeys(divisors, max(divisors.values()))
        for stem, spool in self._spools.items():
            spool.flush()
            self._open(stem)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [pool.submit(self._finish, stem, divisors[stem]) for stem in self._paths]
            if self._stem_file:
                jobs.append(pool.submit(self._write_stem_file, *self._stem_file, divisors))
            for job in jobs:
                job.result()
        placed: list[AudioFile] = []
        with defer_interrupt():
            try:
                for file in self._files.values():
                    file.move_into_place()
                    placed.append(file)
            except OSError:
                for file in placed:
                    file.remove_from_place()
                raise
        return {stem: float(1 / divisor) for stem, divisor in divisors.items()}

    def _open(self, stem: str) -> None:
        form = (self._sample_rate, self._channels, self._samples, self._output.encoding, self._tags.of_stem(stem))
        self._files[stem] = AudioFile(self._paths[stem], lambda sink: open_encoder(sink, *form), self._stack)

    def _finish(self, stem: str, divisor: np.float32) -> None:
        """Completes the file of a stem."""
        file = self._files[stem]
        for audio in self._read_spool(stem, divisor) if self._spools else ():
            file.write(audio)
        file.close()

    def _write_stem_file(
        self, path: Path, mix: Callable[[], Iterable[np.ndarray]], divisors: Mapping[str, np.float32]
    ) -> None:
        form = (self._sample_rate, self._channels, list(self._paths), self._output.encoding, self._tags)
        file = AudioFile(path, lambda sink: StemEncoder(sink, *form), self._stack)
        stems = [rechunk(self._read_spool(stem, divisors[stem]), BLOCK) for stem in self._paths]
        for tracks in zip(rechunk(mix(), BLOCK), *stems, strict=True):
            file.write(*tracks)
        file.close()
        self._files[STEM_SUFFIX] = file

    def _read_spool(self, stem: str, divisor: np.float32) -> Iterator[np.ndarray]:
        """The (C, n) samples of a stem, in blocks, with its gain. Several threads may read at once."""
        spool, at = self._spools[stem].fileno(), 0
        while block := os.pread(spool, 4 * BLOCK * self._channels, at):
            at += len(block)
            yield np.frombuffer(block, np.float32).reshape(-1, self._channels).T / divisor
