"""Sizes of the restore kernels, by what was compiled for their targets."""

# GPU: pieces on their way to the pool while the next is rotated.
STAGES = 2
