"""Transcribes a recording, 30 seconds at a time: python examples/transcribe.py MODEL RECORDING [en]"""

import argparse
import json
import sys

from mlx_xformer import Tokenizer, generate, load  # isort: skip (must come before MLX)

import mlx.core as mx

from mlx_xformer.audio import Recording, rechunk
from mlx_xformer.models.whisper import Whisper
from mlx_xformer.nn.mel import SAMPLE_RATE, SAMPLES, log_mel
from mlx_xformer.pretrained import resolve
from mlx_xformer.text import greedy, suppress_tokens


def main(name: str, recording: str, language: str) -> None:
    model, tokenizer = load(folder := resolve(name)), Tokenizer(folder)  # converts an original first
    if not isinstance(model, Whisper):
        sys.exit(f"{name} must be a Whisper, got a {type(model).__name__}")
    settings = json.loads(path.read_text("utf-8")) if (path := folder / "generation_config.json").is_file() else {}
    task = (
        f"<|{language}|><|transcribe|>" if model.config.vocab_size > 51864 else ""
    )  # smaller vocabularies are English only
    prompt = tokenizer.encode(f"<|startoftranscript|>{task}<|notimestamps|>", special=False)
    never, never_first = (settings.get(key) or [] for key in ("suppress_tokens", "begin_suppress_tokens"))
    sampler = suppress_tokens(greedy, never, first=never_first, prompt=len(prompt))
    ends = tokenizer.encode("<|endoftext|>", special=False)
    for window in rechunk(Recording.open(recording).convert_blocks(1, SAMPLE_RATE), SAMPLES):
        listener = model.listen(log_mel(mx.array(window[0]), bins=model.config.mel_bins))
        tokens = generate(listener, prompt, sampler=sampler, eos=ends, max_tokens=model.config.target_positions // 2)
        print(tokenizer.decode([token.id for token in tokens]).strip(), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", metavar="MODEL")
    parser.add_argument("recording", metavar="RECORDING")
    parser.add_argument("language", metavar="LANGUAGE", nargs="?", default="en")
    try:
        main(**vars(parser.parse_args()))
    except (OSError, ValueError) as error:
        sys.exit(f"transcribe.py: {error}")
