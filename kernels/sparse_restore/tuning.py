"""Sizes of the restore kernels, chosen from kernels compiled for their targets."""

# GPU: stages for rotated keys. The next piece is rotated while others are copied to the pool.
STAGES = 2
