"""The page diff as XLA code: a few comparisons at a time, one layer after the other."""

import jax
import jax.numpy as jnp

from tokendance_jax.kernels import flash
from tokendance_jax.kernels.lanes import Array
from tokendance_jax.kernels.page_diff.plan import SCORES, DiffPlan
from tokendance_jax.kernels.paged_kv import PagedKV
from tokendance_jax.kernels.rope import Rope, rotate

# Comparisons per step. Tuned on a CPU, where the pages of a step stay in the cache.
STEP = 16


def page_diff_xla(
    kv: PagedKV,
    siblings: PagedKV | None,
    plan: DiffPlan,
    *,
    rope: Rope,
) -> jax.Array:
    """Computes the scores of `reference.page_diff_reference`. Arguments as for `api.page_diff`."""
    layers, _, page_size, _, head_dim = kv.k.shape
    comparisons = plan.sibling.shape[0]
    room = -(-comparisons // STEP) * STEP
    begin = jnp.asarray(plan.begin)
    count = begin[-1]
    number = jnp.arange(room, dtype=jnp.int32)
    of_page = jnp.searchsorted(begin, number, side="right", method="scan_unrolled")
    base = jnp.take(jnp.asarray(plan.page), of_page - 1, mode="clip")

    def padded(x: Array) -> jax.Array:
        return jnp.pad(jnp.asarray(x), (0, room - comparisons))

    sibling, frame, first, slots = map(padded, (plan.sibling, plan.frame, plan.first, plan.slots))
    frame = jnp.where(number < count, frame, 0)
    inside = jnp.arange(page_size, dtype=jnp.int32)[None, :] - first[:, None]
    used = (inside >= 0) & (inside < slots[:, None]) & (number < count)[:, None]
    cos, sin = rope.rotation(frame[:, None, None], head_dim)
    own = jax.tree.map(jnp.asarray, kv if siblings is None else siblings)

    def step(index: jax.Array, scores: jax.Array) -> jax.Array:
        layer, start = index % layers, index // layers * STEP

        def of_step(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, start, STEP)

        def read(pool: jax.Array, page: jax.Array) -> jax.Array:
            return flash.read_pages(pool, layer, of_step(page)).astype(jnp.float32)

        keys = read(kv.k, base)
        keys = jax.lax.cond(
            jnp.all(of_step(frame) == 0),
            lambda: keys,
            lambda: rotate(keys, of_step(cos), of_step(sin)),
        )
        found = [
            *_deviation(read(own.k, sibling), keys, of_step(used)),
            *_deviation(read(own.v, sibling), read(kv.v, base), of_step(used)),
        ]
        return jax.lax.dynamic_update_slice(scores, jnp.stack(found)[:, None], (0, layer, start))

    scores = jnp.zeros((SCORES, layers, room))
    steps = -(-count // STEP) * layers
    return jax.lax.fori_loop(0, steps, step, scores)[:, :, :comparisons]


def _deviation(own: jax.Array, shown: jax.Array, used: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the largest difference and the sum of squares of pages.

    Args:
      own: f32 [pages, W, K, H]; siblings.
      shown: f32 [pages, W, K, H]; base pages.
      used: bool [pages, W]; slots to compare.

    Returns:
      Two arrays f32 [pages].
    """
    gap = jnp.where(used[:, :, None, None], jnp.abs(own - shown), 0)
    # Reduce over slots and heads first: XLA's CPU code then processes the numbers of a head side by
    # side.
    largest = gap.max(axis=(1, 2)).max(axis=1)
    return largest, (gap * gap).sum(axis=(1, 2)).sum(axis=1)
