"""Continues a text with a language model whose experts are spread over several processes:
mlx.launch -n 2 --backend ring -- python examples/expert_parallel.py MODEL PROMPT"""

import argparse
import sys

from mlx_xformer import Tokenizer, generate, load
from mlx_xformer.backend import device
from mlx_xformer.nn.moe import spread
from mlx_xformer.pretrained import resolve


def main(name: str, text: str) -> None:
    folder = resolve(name)
    model, tokenizer = load(folder), Tokenizer(folder)
    group = device.process_group()
    if group is not None:
        spread(model, group)
    tokens = generate(model, tokenizer.encode(text), max_tokens=100, tokenizer=tokenizer)
    made = "".join(token.text for token in tokens)
    if group is None or group.rank() == 0:
        print(made)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="a checkpoint, an original, or a name on the hub")
    parser.add_argument("text", metavar="PROMPT")
    given = parser.parse_args()
    try:
        main(given.model, given.text)
    except (OSError, ValueError) as error:
        sys.exit(f"expert_parallel.py: {error}")
