"""The page diff in plain jax.numpy, all pages at once: the reference for the implementations."""

import jax
import jax.numpy as jnp
import numpy as np

from tokendance_jax.kernels import storage
from tokendance_jax.kernels.lanes import Array
from tokendance_jax.kernels.page_diff.plan import SCORES, DiffPlan
from tokendance_jax.kernels.paged_kv import PagedKV
from tokendance_jax.kernels.rope import Rope, rotate


def page_diff_reference(
    kv: PagedKV,
    siblings: PagedKV | None,
    plan: DiffPlan,
    *,
    rope: Rope,
) -> jax.Array:
    """Gathers, rotates and subtracts pages.

    Arguments as for `api.page_diff`, but the plan must be on the host.

    Returns:
      f32 [SCORES, layers, comparisons], in the order of `Deviation`.
    """
    layers, _, page_size, _, head_dim = kv.k.shape
    plan = jax.tree.map(np.asarray, plan)
    count = int(plan.begin[-1])
    base = np.repeat(plan.page, np.diff(plan.begin))
    offset = np.arange(page_size)[None, :] - plan.first[:count, None]
    used = jnp.asarray((offset >= 0) & (offset < plan.slots[:count, None]))

    def load(pool: Array, page: Array) -> jax.Array:
        return storage.load(jnp.asarray(pool)[:, page]).astype(jnp.float32)

    frame = jnp.asarray(plan.frame[:count], jnp.int32)[None, :, None, None]
    cos, sin = rope.rotation(frame, head_dim)
    keys, values = rotate(load(kv.k, base), cos, sin), load(kv.v, base)
    other = kv if siblings is None else siblings
    own_keys, own_values = (load(pool, plan.sibling[:count]) for pool in (other.k, other.v))
    scores = []
    for own, shown in ((own_keys, keys), (own_values, values)):
        gap = jnp.where(used[None, :, :, None, None], jnp.abs(own - shown), 0)
        scores += [gap.max(axis=(2, 3, 4)), (gap * gap).sum(axis=(2, 3, 4))]
    out = jnp.zeros((SCORES, layers, plan.sibling.shape[0]))
    return out.at[:, :, :count].set(jnp.stack(scores))
