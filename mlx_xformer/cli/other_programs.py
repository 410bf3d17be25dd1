"""Options and models that people know from demucs, demucs-mlx and audio-separator, and what takes their place here."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

# The options, and what to say. <X> stands for the option's value.
_OPTIONS: dict[str, str] = {
    "--mp3": "did you mean --format mp3?",
    "--flac": "did you mean --format flac?",
    "--int24": "did you mean --bits 24?",
    "--float32": "did you mean --bits 32?",
    "--mp3-preset": "did you mean --mp3-bitrate KBPS? 320 is the best",
    "--clip-mode": "did you mean --clip <MODE>?",
    **dict.fromkeys(("--mps", "--cuda"), "did you mean --device gpu?"),
    "--cpu": "did you mean --device cpu?",
    "-d": "did you mean --device <cpu|gpu>?",
    "-b": "did you mean --batch-size <N>?",
    "--repo": "did you mean -n <DIR>/NAME.yaml, or -n with the path of another model file?",
    **dict.fromkeys(("-s", "--sig"), "did you mean -n with the path of the model file?"),
    "--stem": "did you mean --stems <STEM>?",
    **dict.fromkeys(
        ("-j", "--jobs"), "leave it out: all cores work on one song (mlx.launch divides songs among processes)"
    ),
    **dict.fromkeys(("--write-workers", "--prefetch-tracks"), "leave it out: reading and writing need no setting"),
    **dict.fromkeys(("-v", "--verbose", "--debug"), "leave it out: warnings and errors are always printed"),
    **dict.fromkeys(("--no-split", "--demucs_segments_enabled"), "leave it out: songs are always read in segments"),
    "--progress-json": "did you mean --progress json?",
    "--track-name": 'did you mean --filename "NAME/{stem}.{ext}"?',
    **dict.fromkeys(("-m", "--model_filename"), "did you mean -n <NAME>?"),
    "--model_file_dir": "set MLX_XFORMER_CACHE=<DIR> instead",
    **dict.fromkeys(("-l", "--list_models"), "did you mean --list-models?"),
    "--output_format": "did you mean --format <FORMAT>?",
    "--output_bitrate": "did you mean --mp3-bitrate <KBPS>?",
    "--output_dir": "did you mean --out <DIR>?",
    "--single_stem": "did you mean --stems <STEM>?",
    "--normalization": "did you mean --clip rescale?",
    "--sample_rate": "did you mean --rate keep?",
    "--demucs_shifts": "did you mean --shifts <N>?",
    "--demucs_overlap": "did you mean --overlap <F>?",
    "--demucs_segment_size": "did you mean --segment <S>?",
}
_DEVICES = {"mps": "gpu", "cuda": "gpu", "metal": "gpu"}
_OTHER_MODELS = {  # of demucs, but none of HTDemucs' architecture
    **dict.fromkeys(("hdemucs_mmi", "mdx", "mdx_q", "demucs", "tasnet"), "htdemucs"),
    **dict.fromkeys(("mdx_extra", "mdx_extra_q", "demucs_extra", "tasnet_extra"), "htdemucs_ft"),
}


def add_hints(parser: argparse.ArgumentParser) -> None:
    """Adds the options of other programs, which end the command with a line that names ours; help hides them."""
    for option in _OPTIONS:
        parser.add_argument(option, action=_Hint, nargs="?", dest=argparse.SUPPRESS, help=argparse.SUPPRESS)


class _Hint(argparse.Action):
    """Ends the command with what to say of an option."""

    def __call__(self, parser: argparse.ArgumentParser, _: Any, value: Any, option: str | None = None) -> None:
        given = _DEVICES.get(value, value)
        give_hint(parser, f"{option}: {re.sub('<(.+?)>', lambda found: given or found[1], _OPTIONS[str(option)])}")


class DeviceAction(argparse.Action):
    """An option for the device; other programs' names of devices give a hint."""

    def __call__(self, parser: argparse.ArgumentParser, options: Any, value: Any, option: str | None = None) -> None:
        """Checks and keeps the value."""
        if value in _DEVICES:
            give_hint(parser, f"--device {value}: did you mean --device {_DEVICES[value]}?")
        if value not in ("cpu", "gpu"):
            parser.error(f"argument --device: invalid choice: {value!r} (choose from cpu, gpu)")
        setattr(options, self.dest, value)


class ModelAction(argparse.Action):
    """An option for the model; a name of demucs that is no HTDemucs gives a hint."""

    def __call__(self, parser: argparse.ArgumentParser, options: Any, value: Any, option: str | None = None) -> None:
        """Checks and keeps the value."""
        name = value.removesuffix(".yaml")
        if name in _OTHER_MODELS and not Path(value).exists():
            instead = _OTHER_MODELS[name]
            give_hint(parser, f"{option} {value}: not an HTDemucs, the only kind here; did you mean -n {instead}?")
        setattr(options, self.dest, value)


def give_hint(parser: argparse.ArgumentParser, text: str) -> None:
    """Ends the command as for wrong usage, with one line."""
    parser.exit(2, f"mlx-xformer: {text}\n")
