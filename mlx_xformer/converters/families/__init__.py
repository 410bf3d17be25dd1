"""The converters of each family, in a module of the family's name in models/."""

from . import bert, causal_lm, htdemucs, t5, transformer, whisper
from .guides import ferrotorch, llm_prep, scratch

CONVERTERS = tuple(
    converter
    for family in (causal_lm, htdemucs, bert, t5, whisper, transformer, scratch, ferrotorch, llm_prep)
    for converter in family.CONVERTERS
)
