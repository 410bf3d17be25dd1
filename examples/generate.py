"""Continues a text with a language model: python examples/generate.py MODEL PROMPT [TEMPERATURE]"""

import sys

from mlx_xformer import Tokenizer, generate, load, make_sampler
from mlx_xformer.pretrained import resolve


def main(name: str, text: str, temperature: str = "0") -> None:
    folder = resolve(name)  # of a checkpoint, or of an original, which is converted
    model, tokenizer = load(folder), Tokenizer(folder)
    sampler = make_sampler(float(temperature), seed=0)
    for token in generate(model, tokenizer.encode(text), max_tokens=100, sampler=sampler, tokenizer=tokenizer):
        print(token.text, end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
