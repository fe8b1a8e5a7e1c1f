"""Sizes of the page diff kernels, chosen from kernels compiled for their targets."""

# GPU: siblings in shared memory: the one that is compared, and those that are being copied. A block
# also holds the base page and the tables of angles there. With parts as large as those of a
# restore, three blocks fit an H100's 227 KiB.
STAGES = 2
# TPU: bytes of a page's keys in the layers that are compared at a time. A program has 16 MiB of
# VMEM, which holds the keys and values of two pages, double-buffered.
LAYERS_BYTES = 1 << 19
