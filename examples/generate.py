"""Continues a text with a language model: python examples/generate.py MODEL PROMPT [TEMPERATURE]"""

import argparse
import sys

from mlx_xformer import Tokenizer, generate, load, make_sampler
from mlx_xformer.pretrained import resolve


def main(name: str, text: str, temperature: float) -> None:
    folder = resolve(name)  # converts an original first
    model, tokenizer = load(folder), Tokenizer(folder)
    sampler = make_sampler(temperature, seed=0)
    for token in generate(model, tokenizer.encode(text), max_tokens=100, sampler=sampler, tokenizer=tokenizer):
        print(token.text, end="", flush=True)
    print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", metavar="MODEL")
    parser.add_argument("text", metavar="PROMPT")
    parser.add_argument("temperature", metavar="TEMPERATURE", nargs="?", type=float, default=0.0)
    given = vars(parser.parse_args())
    try:
        main(**given)
    except (OSError, ValueError) as error:
        sys.exit(f"generate.py: {error}")
