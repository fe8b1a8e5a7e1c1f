"""Sizes of the page diff kernels, by what was compiled for their targets."""

# GPU: siblings in shared memory, the one that is compared and those on their way. A block has them,
# the base page and the tables of angles there: three blocks of parts as large as those of a restore
# then fit an H100's 227 KiB.
STAGES = 2
# TPU: bytes of keys of a page over the layers that are compared at a time. Keys and values of two
# pages, each with what comes next, are in VMEM, of which a program has 16 MiB.
LAYERS_BYTES = 1 << 19
