"""Text: tokenizers, samplers, generation, sentence vectors."""
