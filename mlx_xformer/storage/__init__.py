"""Files: tensors and checkpoints."""

from .checkpoint import Checkpoint, is_checkpoint, read_checkpoint, save_checkpoint

__all__ = ["Checkpoint", "is_checkpoint", "read_checkpoint", "save_checkpoint"]
