"""Audits: deliberate damage that a measure of quality must detect."""

import jax
import numpy as np

from tokendance_jax.engine.rounds import RoundEngine
from tokendance_jax.paged.kv import PagedKV, pool_format


def shuffle_bases(engine: RoundEngine, seed: int) -> int:
    """Shuffles the cached base pages: keys in one order, values in another.

    Afterwards, what agents read from bases is wrong. A measure of quality that does not show this
    does not depend on the cache. With one order for both, attention would still find most of what
    it looks for.

    Args:
      engine: the engine whose pages are shuffled.
      seed: seed of the orders.

    Returns:
      Number of shuffled pages.
    """
    pages, runner = engine.base_pages(), engine.runner
    draw = np.random.default_rng(seed)

    def shuffled(pool: jax.Array) -> jax.Array:
        order = np.arange(engine.shapes.pages)
        order[pages] = draw.permutation(pages)
        return pool[:, order]

    pools = PagedKV(k=shuffled(runner.kv.k), v=shuffled(runner.kv.v))
    runner.kv = jax.device_put(pools, pool_format())
    return len(pages)
