"""Files: tensors and checkpoints."""
