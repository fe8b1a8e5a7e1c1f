"""The pool of pages that kernels read and write."""

import dataclasses
from typing import no_type_check

import jax


@no_type_check  # JAX also builds these pytrees with leaves that are not arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedKV:
    """Keys and values in pages, passed into a jitted program and returned by it, never mutated.

    Programs donate their `PagedKV` argument: rebind its name on the line of the call. Page 0 is
    never read. The arrays have a storage dtype: on CPU, bfloat16 numbers are stored as their bits
    (see `kernels.storage`).

    Attributes:
      k: [layers, pages, page_size, kv_heads, head_dim]; keys, rotated at the canonical positions of
        their pages.
      v: as k; values.
    """

    k: jax.Array
    v: jax.Array
