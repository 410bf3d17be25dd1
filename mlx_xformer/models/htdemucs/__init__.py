"""HTDemucs: configuration, model, bags."""

from .config import HTDemucsConfig
from .model import Bag, BagConfig, HTDemucs, InferenceMode

__all__ = ["Bag", "BagConfig", "HTDemucs", "HTDemucsConfig", "InferenceMode"]
