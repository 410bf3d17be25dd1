"""Music source separation: a song in, its stems out."""

from .separator import Cancelled, Separated, Separator, separate
from .stems import Output

__all__ = ["Cancelled", "Output", "Separated", "Separator", "separate"]
