"""Sizes of the restore kernels, by what was compiled for their targets."""

# Bytes of keys of one part of a page. A block has a part's keys, its values, two stages of rotated
# keys and the tables of angles in shared memory: five blocks then fit an H100's 227 KiB, and three
# of those that restore pages at rest, which take float32 keys and another copy of the values.
PART_BYTES = 8 * 1024
# Numbers of one half of the heads that a block has in registers at a time.
CHUNK = 1024


def part_slots(page_size: int, slot_bytes: int) -> int:
    """Slots of a page that one block takes: a divisor of the page's slots.

    Args:
      page_size: slots of a page.
      slot_bytes: bytes of one slot's keys in the pool.
    """
    slots = page_size
    while slots % 2 == 0 and slots * slot_bytes > PART_BYTES:
        slots //= 2
    return slots
