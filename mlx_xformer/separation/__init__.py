"""Music source separation: a song in, its stems out."""

from .run import Cancelled, Progress
from .separator import Separated, Separator, separate
from .stems import Output

__all__ = ["Cancelled", "Output", "Progress", "Separated", "Separator", "separate"]
