"""Separates a recording into its stems: python examples/separate.py SONG [MODEL [FOLDER]]"""

import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mlx_xformer import load, separate
from mlx_xformer.audio import prevent_clipping, read, write


def main(song: str, name: str = "htdemucs", folder: str = "separated") -> None:
    model = load(name)
    audio, rate = read(song)
    with tqdm(unit="segment") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        stems = separate(model, audio, rate, progress=progress)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for stem, samples in stems.items():
        path = Path(folder) / f"{Path(song).stem}.{stem}.wav"
        write(path, prevent_clipping(np.array(samples), "rescale"), model.config.samplerate)
        print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
