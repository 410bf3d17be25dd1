"""The arguments of the command separate."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .other_programs import DeviceAction, ModelAction, add_hints

EXAMPLES = """\
examples:
  mlx-xformer separate song.mp3                          -> separated/htdemucs/song/drums.wav and three more
  mlx-xformer separate song.m4a --two-stems vocals --other-method minus --clip joint
                                                         vocals and karaoke, which add up to the song
  mlx-xformer separate music/ -o stems --format flac --skip-existing
                                                         a library, in the same folders; go on where a run ended
  mlx-xformer separate cd1/ cd2/ --filename "{folder}/{track} ({stem}).{ext}"
                                                         flat names, in the folders cd1 and cd2
  mlx-xformer separate song.wav -n htdemucs_ft --shifts 2 --bits 24 --rate keep
                                                         the best quality, at the song's own sample rate
"""
_REST = "the rest with --two-stems: the sum of the other stems, the mix minus the stem, or no file"
_CLIP = "against clipping: a gain for each stem, one gain for all (they still add up), limiting samples, or nothing"
_FILENAME = (
    "pattern of {track}, {trackext}, {stem}, {ext}, {folder}, {artist}, {album}, {title}, {number}; {folder} is the "
    "recording's folder below the one that was named; with several folders named it begins with their names"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments, in groups, and its examples."""
    parser.epilog = EXAMPLES
    _add_input_arguments(parser.add_argument_group("input"))
    _add_model_arguments(parser.add_argument_group("model"))
    _add_stem_arguments(parser.add_argument_group("stems"))
    _add_file_arguments(parser.add_argument_group("files"))
    _add_message_arguments(parser.add_argument_group("messages"))
    add_hints(parser)


def _add_input_arguments(group: argparse._ArgumentGroup) -> None:
    """Adds what is separated."""
    add = group.add_argument
    add(
        "files",
        nargs="+",
        type=_parse_path,
        metavar="FILE",
        help="recordings (wav, flac, mp3, m4a, mp4 ...), folders of them, searched through all levels, or - for "
        "standard input, whose stems are named as those of a file stdin",
    )
    add("--no-recursive", dest="recursive", action="store_false", help="do not search the folders below a folder")
    add("--skip-existing", action="store_true", help="pass over recordings whose stems are all there and complete")
    add("--start", type=_parse_time, default=0, metavar="TIME", help="separate from here: seconds, m:ss or h:mm:ss")
    add("--end", type=_parse_time, metavar="TIME", help="separate up to here; by default all")
    add("--stream", type=int, default=0, metavar="N", help="which sound track of a film, the first being 0")
    add(
        "--downmix",
        choices=["standard", "front"],
        default="standard",
        help="how 5.1 and more become stereo: by the standard, with the centre, or the two front channels alone",
    )
    add("--strict", action="store_true", help="refuse damaged recordings, which are otherwise read with a warning")


def _add_model_arguments(group: argparse._ArgumentGroup) -> None:
    """Adds the model, and how it is applied."""
    add = group.add_argument
    add(
        "-n",
        "--name",
        action=ModelAction,
        default="htdemucs",
        metavar="NAME|DIR",
        help="model name, checkpoint folder or file",
    )
    add("--list-models", action=_ListModels, help="list the models that have a name, and exit")
    add(
        "--shifts",
        type=int,
        default=1,
        metavar="N",
        help="how many passes, each shifted by a random part of 0.5 s, are averaged",
    )
    add("--overlap", type=float, default=0.25, metavar="F", help="part of a segment shared with the next")
    add("--segment", type=float, metavar="S", help="seconds per segment; at most, and by default, the model's own")
    add("--seed", type=int, default=0, metavar="N", help="seed of the random shifts")
    add(
        "--batch-size",
        type=int,
        metavar="N",
        help="how many segments run at once; by default as many as suit device and memory",
    )
    add(
        "--device",
        action=DeviceAction,
        metavar="{cpu,gpu}",
        help="the device to compute on; by default the GPU if there is one",
    )


def _add_stem_arguments(group: argparse._ArgumentGroup) -> None:
    """Adds which stems come out."""
    what = group.add_mutually_exclusive_group()
    what.add_argument(
        "--stems",
        type=_parse_names,
        metavar="A,B",
        help="only these stems; a bag (several models, outputs averaged) runs only the models that they need",
    )
    what.add_argument("--two-stems", metavar="STEM", help="this stem, and the rest as --other-method makes it")
    group.add_argument("--other-method", choices=["add", "minus", "none"], default="add", help=_REST)
    group.add_argument("--clip", choices=["rescale", "joint", "clamp", "none"], default="rescale", help=_CLIP)


def _add_file_arguments(group: argparse._ArgumentGroup) -> None:
    """Adds where and how stems are written."""
    add = group.add_argument
    add("-o", "--out", type=_parse_path, default=Path("separated"), metavar="DIR", help="the output folder")
    add("--filename", default="{folder}/{track}/{stem}.{ext}", metavar="PATTERN", help=_FILENAME)
    formats = ["wav", "flac", "mp3", "ogg", "opus", "m4a"]
    add("--format", choices=formats, default="wav", help="format of the stems' files")
    add("--bits", type=int, choices=[16, 24, 32], default=16, help="bits per sample of wav and flac; 32 is float wav")
    add("--bitrate", type=int, metavar="KBPS", help="kbit/s of mp3, ogg, opus or m4a; by default 320, 256, 192, 256")
    add("--mp3-bitrate", type=int, metavar="KBPS", help="the same, if the format is mp3")
    add(
        "--rate",
        choices=["model", "keep"],
        default="model",
        help="sample rate of the stems: the model's, or the recording's",
    )
    add("--stem-file", action="store_true", help="also write TRACK.stem.mp4: the mix and four stems for DJ programs")
    add("--report", action="store_true", help="also write an HTML page that plays and shows the stems together")


def _add_message_arguments(group: argparse._ArgumentGroup) -> None:
    """Adds what is printed."""
    add = group.add_argument
    add("--json", action="store_true", help="print a line of JSON for each recording")
    add(
        "--progress",
        choices=["bar", "json"],
        default="bar",
        help="on standard error: a bar, if it is a terminal, or lines of JSON",
    )


def _parse_path(text: str) -> Path:
    """A path; "-" alone stands for standard input, and "./-" for a file of that name."""
    path = Path(text)
    return path.absolute() if path == Path("-") and text != "-" else path


def _parse_time(text: str) -> float:
    """The seconds of "90.5", "1:30.5" or "0:01:30.5"."""
    found = re.fullmatch(r"(\d+:[0-5]?\d:[0-5]?\d|\d+:[0-5]?\d|\d+)(\.\d+)?", text, re.ASCII)
    if not found:
        raise argparse.ArgumentTypeError(f"must be seconds, m:ss or h:mm:ss, got {text!r}")
    seconds = 0
    for part in found[1].split(":"):
        seconds = 60 * seconds + int(part)
    return seconds + float(found[2] or 0)


def _parse_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


class _ListModels(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, help: str):
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from ..pretrained.summary import LICENCE, available

        for name, where in available().items():
            print(f"{name:15} {where}")
        print(f"Licence: {LICENCE}.", file=sys.stderr)
        parser.exit()
