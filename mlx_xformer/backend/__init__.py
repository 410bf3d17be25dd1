"""What computes: the device, its memory, and the form of each operation that serves there."""
