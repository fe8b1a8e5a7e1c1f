"""Paged KV memory: pages, their reference counts, and the reuse of exact prefixes."""

from tokendance_jax.paged.kv import KVSpec, PagedKV
from tokendance_jax.paged.page_pool import OutOfPages, PagePool
from tokendance_jax.paged.prefix_cache import PrefixCache

__all__ = ["KVSpec", "OutOfPages", "PagePool", "PagedKV", "PrefixCache"]
