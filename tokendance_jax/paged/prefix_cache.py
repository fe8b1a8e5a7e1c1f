"""Prefix cache: finds cached pages of token ids by a chain of hashes.

The idea is vLLM's automatic prefix caching: the key of a page is a hash of its token ids and of
the key of the page before it, so one dictionary finds the longest cached prefix. A cache has a
kind: pages that agents computed in their own full context are "exact", and bases of shared
segments have kinds of their own. A cache of one kind never finds a page of another.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from jaxtyping import Int, Int32

from tokendance_jax.paged.page_pool import PagePool


def _blake2b(message: bytes) -> bytes:
    return hashlib.blake2b(message, digest_size=16).digest()


@dataclass(eq=False, slots=True)
class _Block:
    """One cached page: its key, its content, and the block before it (`None` for the first).

    The parent is a link to content, not to an entry, so it outlives the parent's eviction.
    """

    key: bytes
    tokens: bytes
    parent: "_Block | None"
    page: int


def _same_content(a: _Block | None, b: _Block | None) -> bool:
    """Returns whether two chains hold the same token ids up to and including these blocks."""
    while a is not b:
        if a is None or b is None or a.tokens != b.tokens:
            return False
        a, b = a.parent, b.parent
    return True


class PrefixCache:
    """Maps prefixes of token ids to the pages that hold their keys and values.

    The key of a block (one page) is the digest of its parent's key and its token ids. The first
    parent's key is the digest of the namespace, the kind and the salt. A hit also requires that
    the token ids of the whole chain are equal, so colliding digests cost reuse, never
    correctness.

    `match` and `insert` cut token ids into full pages. A caller whose pages are cut elsewhere
    passes the blocks itself (`match_blocks`, `insert_blocks`), each as bytes that identify
    everything that its content depends on, besides the blocks before it.

    Eviction may remove a block and leave its children. The children then cannot be matched,
    because the chain is broken, and age out of the pool like other pages. When the same parent is
    inserted again, in any page, they can be matched again: their content depends on the token ids
    of the chain, not on the pages that held it. This is why a block links to its parent's content
    and not to its page.

    Blocks are inserted when a round is planned, before the device has written them. A later agent
    of the same round may match them, because a row reads a page only after it is written.

    Caches with different salts or namespaces may share a pool.

    Attributes:
      lookup_tokens: token ids passed to `match` so far.
      hit_tokens: token ids that `match` has found so far.
    """

    def __init__(
        self,
        pool: PagePool,
        page_size: int,
        namespace: str,
        salt: bytes = b"",
        kind: str = "exact",
        digest: Callable[[bytes], bytes] = _blake2b,
    ):
        """Creates an empty cache.

        Args:
          pool: the pool of the pages; it evicts blocks of this cache when it runs short.
          page_size: tokens per page.
          namespace: everything besides token ids that the content depends on: model and revision,
            dtype, RoPE settings.
          salt: secret of a tenant. Other tenants can neither hit nor probe its prefixes.
          kind: how the pages were computed; part of every key.
          digest: hashes a message to a key; tests force collisions with it.

        Raises:
          ValueError: `page_size` is not positive.
        """
        if page_size < 1:
            raise ValueError(f"page_size must be positive, got {page_size}")
        self.lookup_tokens = 0
        self.hit_tokens = 0
        self._pool = pool
        self._page_size = page_size
        self._digest = digest
        # Each part with its length, so that ("ab", "c") and ("a", "bc") have different roots.
        parts = (namespace.encode(), kind.encode(), salt)
        self._root = digest(b"".join(len(part).to_bytes(8, "little") + part for part in parts))
        self._by_key: dict[bytes, _Block] = {}
        self._by_page: dict[int, _Block] = {}

    def __len__(self) -> int:
        """Number of cached blocks."""
        return len(self._by_key)

    def match(self, token_ids: Int32[np.ndarray, " tokens"]) -> Int32[np.ndarray, " pages"]:
        """Finds the longest cached prefix and takes a reference to each of its pages.

        Args:
          token_ids: the whole sequence. At least its last token is left to compute, because its
            logits are needed.

        Returns:
          Pages of the first `len(pages) * page_size` tokens. The caller owns one reference each.
        """
        matched = self.match_blocks(self.split(token_ids[:-1]))
        self.lookup_tokens += len(token_ids)
        self.hit_tokens += len(matched) * self._page_size
        return matched

    def match_blocks(self, blocks: Sequence[bytes]) -> Int32[np.ndarray, " pages"]:
        """Finds the longest cached prefix of blocks and takes a reference to each of its pages."""
        pages = []
        parent = None
        for tokens, key in zip(blocks, self.keys(blocks), strict=True):
            block = self._by_key.get(key)
            if block is None or not self._holds(block, parent, tokens):
                break
            pages.append(block.page)
            parent = block
        matched = np.array(pages, np.int32)
        self._pool.retain(matched)
        return matched

    def peek(self, keys: Iterable[bytes]) -> int:
        """Returns how many leading blocks of one chain are cached, by its `keys`; see `count`."""
        return sum(1 for _ in takewhile(self._by_key.__contains__, keys))

    def keys(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        """Yields the keys under which the blocks of a chain are, or would be, cached."""
        key = self._root
        for tokens in blocks:
            key = self._digest(key + tokens)
            yield key

    def count(self, chains: Iterable[Iterable[bytes]]) -> list[int]:
        """Returns how many blocks of each chain would be found if all were matched and inserted.

        The chains are matched and inserted one after the other. In fact nothing is referenced or
        registered, and colliding digests are not told apart.

        Args:
          chains: the `keys` of each chain.
        """
        fresh: set[bytes] = set()
        counts = []
        for keys in chains:
            found = 0
            for index, key in enumerate(keys):
                if found == index and (key in self._by_key or key in fresh):
                    found += 1
                else:
                    fresh.add(key)
            counts.append(found)
        return counts

    def insert(
        self, token_ids: Int32[np.ndarray, " tokens"], pages: Int[np.ndarray, " pages"]
    ) -> None:
        """Registers the full pages of a sequence, which stay cached after their release.

        A block that is already cached keeps its page, and the sequence's own page stays uncached,
        so inserting twice changes nothing.

        Args:
          token_ids: the sequence; a last, partly filled page is left out.
          pages: the sequence's pages in order, referenced by the caller; at least one for each
            full page of tokens.

        Raises:
          ValueError: there are too few pages, or a page to be registered is not live, holds
            another block, or occurs twice. The cache is unchanged.
        """
        self.insert_blocks(self.split(token_ids), pages)

    def insert_blocks(self, blocks: Sequence[bytes], pages: Int[np.ndarray, " pages"]) -> None:
        """Registers blocks by their content; see `insert`.

        Args:
          blocks: the content of the pages, in order.
          pages: at least one page for each block.

        Raises:
          ValueError: as `insert`.
        """
        if len(pages) < len(blocks):
            raise ValueError(f"{len(blocks)} full pages of tokens, but {len(pages)} pages")
        fresh: dict[bytes, _Block] = {}
        parent = None
        for tokens, key, page in zip(blocks, self.keys(blocks), pages.tolist(), strict=False):
            block = self._by_key.get(key) or fresh.get(key)
            if block is None:
                block = fresh[key] = _Block(key, tokens, parent, page)
            elif not self._holds(block, parent, tokens):
                break  # a collision: the key is in use, and the rest of the chain depends on it
            parent = block
        # The pool checks the pages. If it refuses them, nothing is registered.
        self._pool.mark_cached(np.array([b.page for b in fresh.values()], np.int32), self._drop)
        self._by_key.update(fresh)
        self._by_page.update((block.page, block) for block in fresh.values())

    def forget(self, pages: Int[np.ndarray, " pages"]) -> None:
        """Removes blocks, for example those of a round that failed before it wrote its pages.

        References do not change: holders must still release their pages.

        Args:
          pages: page ids; those that hold no block of this cache are skipped.
        """
        held = [page for page in dict.fromkeys(pages.tolist()) if page in self._by_page]
        for page in held:
            self._drop(page)
        self._pool.unmark_cached(np.array(held, np.int32))

    def clear(self) -> None:
        """Removes every block; the statistics are kept."""
        self.forget(np.array(list(self._by_page), np.int32))

    def held(self, page: int) -> bytes | None:
        """Returns the key of the block that a page holds; None if it holds none."""
        block = self._by_page.get(page)
        return None if block is None else block.key

    def _drop(self, page: int) -> None:
        del self._by_key[self._by_page.pop(page).key]

    def split(self, token_ids: Int32[np.ndarray, " tokens"]) -> list[bytes]:
        """Returns the token ids of each full page, as bytes."""
        size = self._page_size * token_ids.itemsize
        full = len(token_ids) // self._page_size
        data = token_ids.tobytes()
        return [data[i * size : (i + 1) * size] for i in range(full)]

    def _holds(self, block: _Block, parent: _Block | None, tokens: bytes) -> bool:
        """Returns whether a block found by its key really holds these tokens after this parent."""
        if block.tokens != tokens or not _same_content(block.parent, parent):
            return False
        # A parent that was evicted and inserted again is a new object with the same content.
        # Linking to it makes the next comparison one of identity and frees the old object.
        block.parent = parent
        return True
