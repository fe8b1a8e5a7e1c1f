"""Audits: damage that a measure of quality must see."""

import jax
import numpy as np

from tokendance_jax.engine.engine import RoundEngine
from tokendance_jax.paged.kv import PagedKV, pool_format


def shuffle_bases(engine: RoundEngine, seed: int) -> int:
    """Puts cached base pages into a wrong order, keys into one and values into another.

    What agents read from bases afterwards is wrong, and a measure of quality that does not see that
    does not see the cache. In one order for both, attention would still find most of what it looks
    for.

    Args:
      engine: whose pages are shuffled.
      seed: of the orders.

    Returns:
      Number of pages.
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
