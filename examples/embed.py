"""Compares the meanings of sentences: python examples/embed.py MODEL [SENTENCE ...]"""

import argparse
import sys
from collections.abc import Sequence

from mlx_xformer import SentenceEncoder

SENTENCES = (
    "A man is playing a guitar on stage.",
    "Someone performs music with a guitar.",
    "The stock market fell sharply today.",
    "Kubernetes schedules containers across a cluster.",
)
SHADES = " ░▒▓█"


def main(name: str, sentences: Sequence[str]) -> None:
    vectors = SentenceEncoder(name).encode(sentences)  # (N, E), each of length 1
    cosines = (vectors @ vectors.T).tolist()
    print(" " * 3 + "".join(f"{n:8}" for n in range(len(sentences))))
    for n, row in enumerate(cosines):
        shaded = "".join(f" {SHADES[round(4 * min(max(x, 0), 1))]} {x:5.2f}" for x in row)
        print(f"{n:3}{shaded}  {sentences[n]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", metavar="MODEL")
    parser.add_argument("sentences", metavar="SENTENCE", nargs="*", default=SENTENCES)
    given = vars(parser.parse_args())
    try:
        main(**given)
    except (OSError, ValueError) as error:
        sys.exit(f"embed.py: {error}")
