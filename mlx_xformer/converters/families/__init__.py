"""The converters of each family, in a module of the family's name in models/."""

from . import bert, causal_lm, htdemucs, t5, transformer, whisper
from .guides import ferrotorch, llm_prep, scratch

CONVERTERS = (
    causal_lm.CONVERTER,
    htdemucs.CONVERTER,
    htdemucs.BAG_CONVERTER,
    bert.CONVERTER,
    t5.CONVERTER,
    whisper.CONVERTER,
    *transformer.CONVERTERS,
    scratch.CONVERTER,
    scratch.ENCODER_DECODER,
    ferrotorch.CONVERTER,
    llm_prep.CONVERTER,
)
