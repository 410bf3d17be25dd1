"""A stack of pre-norm blocks whose keys have a width of their own, and an encoder-decoder made of it.

Its tokens attend to a continuous memory, such as the codes of a recording by an audio codec.

Source: yucoder14/guitar_effects, transformer_fun.ipynb, whose blocks and names this follows; its mistakes are options
(norm, dropout_at, score_dropout) or gone. No norm follows the last block.
"""

from .blocks import TransformerBlock, TransformerStack, UnbiasedLayerNorm
from .config import EncoderDecoderConfig, StackConfig
from .model import EncoderDecoder, cross_entropy

__all__ = [
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "StackConfig",
    "TransformerBlock",
    "TransformerStack",
    "UnbiasedLayerNorm",
    "cross_entropy",
]
