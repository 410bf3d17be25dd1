"""The models of llm_prep: a pooled regression, an autoregressive model of sequences, an encoder-decoder."""

from ....nn.moe import FFNConfig
from ....nn.transformer import auxiliary_loss
from .config import SequenceCheckpoint, SequenceConfig
from .model import AutoregressiveTransformerModel, EncoderDecoder, TransformerModel, make

__all__ = [
    "AutoregressiveTransformerModel",
    "EncoderDecoder",
    "FFNConfig",
    "SequenceCheckpoint",
    "SequenceConfig",
    "TransformerModel",
    "auxiliary_loss",
    "make",
]
