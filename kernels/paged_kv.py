"""The pool of pages that kernels read and write."""

import dataclasses
from typing import no_type_check

import jax


@no_type_check  # JAX also builds pytrees of stand-ins that are no arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedKV:
    """Keys and values in pages, passed into a jitted program and returned by it, never mutated.

    A program that takes a `PagedKV` takes it donated: rebind the name on the same line. Page 0 is
    never read. The arrays have a storage dtype: on CPU, bfloat16 numbers are held as their bits
    (see `kernels.storage`).

    Attributes:
      k: [layers, pages, page_size, kv_heads, head_dim]; keys, rotated at the canonical positions of
        their pages.
      v: as k; values.
    """

    k: jax.Array
    v: jax.Array
