"""Text: tokenizers, samplers, generation, sentence vectors."""

from .generation import Token, batch_generate, generate
from .prompt_cache import load_prompt, reuse, save_prompt
from .samplers import greedy, make_sampler, suppress_tokens
from .sentences import SentenceEncoder
from .tokenizer import Tokenizer

__all__ = [
    "SentenceEncoder",
    "Token",
    "Tokenizer",
    "batch_generate",
    "generate",
    "greedy",
    "load_prompt",
    "make_sampler",
    "reuse",
    "save_prompt",
    "suppress_tokens",
]
