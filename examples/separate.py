"""Separates a recording into its stems: python examples/separate.py SONG [MODEL [FOLDER]]"""

import sys

from tqdm import tqdm

from mlx_xformer import Separator
from mlx_xformer.separate import Progress


def main(song: str, name: str = "htdemucs", folder: str = "separated") -> None:
    separator = Separator(name)
    with tqdm(unit="segment") as bar:

        def progress(now: Progress) -> None:
            bar.total = now.total
            bar.update(now.done - bar.n)

        made = separator.separate_file(song, folder, progress=progress)
    for path in made.files.values():
        print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
