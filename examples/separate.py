"""Separates a recording into its stems: python examples/separate.py SONG [MODEL [FOLDER]]"""

import argparse
import sys

from tqdm import tqdm

from mlx_xformer import Separator
from mlx_xformer.separation import Progress


def main(song: str, name: str, folder: str) -> None:
    separator = Separator(name)
    with tqdm(unit="segment", disable=None) as bar:

        def progress(now: Progress) -> None:
            bar.total = now.total
            bar.update(now.done - bar.n)

        made = separator.separate_file(song, folder, progress=progress)
    for path in made.files.values():
        print(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("song", metavar="SONG")
    parser.add_argument("name", metavar="MODEL", nargs="?", default="htdemucs")
    parser.add_argument("folder", metavar="FOLDER", nargs="?", default="separated")
    given = vars(parser.parse_args())
    try:
        main(**given)
    except (OSError, ValueError) as error:
        sys.exit(f"separate.py: {error}")
