"""Paged KV memory: pages, their reference counts, and the reuse of exact prefixes.

The arrays on the device are in `tokendance_jax.paged.kv`. The other modules need no device.
"""

from tokendance_jax.paged.page_pool import OutOfPages, PagePool
from tokendance_jax.paged.prefix_cache import PrefixCache

__all__ = ["OutOfPages", "PagePool", "PrefixCache"]
