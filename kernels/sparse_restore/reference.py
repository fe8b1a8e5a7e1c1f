"""The sparse restore in plain jax.numpy, all slots at once: the reference for implementations."""

import jax
import jax.numpy as jnp
import numpy as np

from tokendance_jax.kernels import storage
from tokendance_jax.kernels.lanes import Array
from tokendance_jax.kernels.paged_kv import PagedKV
from tokendance_jax.kernels.rope import Rope, rotate
from tokendance_jax.kernels.sparse_restore.plan import RestorePlan, Source


def sparse_restore_reference(
    kv: PagedKV,
    source: Source | None,
    plan: RestorePlan,
    *,
    rope: Rope,
) -> PagedKV:
    """Gathers, rotates and scatters slots.

    Arguments as for `api.sparse_restore`, but the plan must be on the host.
    """
    page_size, head_dim = kv.k.shape[2], kv.k.shape[4]
    origin = Source(kv.k, kv.v) if source is None else source
    plan = jax.tree.map(np.asarray, plan)
    pieces = int(plan.begin[-1])
    page = np.repeat(plan.page, np.diff(plan.begin))
    inside = np.concatenate([np.arange(slots) for slots in plan.slots[:pieces]])
    of_slot = np.repeat(np.arange(pieces), plan.slots[:pieces])
    offset = plan.first[of_slot] + inside
    target = plan.target[of_slot] + inside
    turn = plan.turn[of_slot] + (0 if origin.rotated else offset)
    read = (slice(None), page[of_slot], offset)
    write = (slice(None), target // page_size, target % page_size)

    def plain(x: Array, scale: Array | None) -> jax.Array:
        """Returns the scaled numbers, f32 [layers, slots, kv_heads, head_dim]."""
        number = storage.load(jnp.asarray(x)[read]).astype(jnp.float32)
        return number if scale is None else number * jnp.asarray(scale)[read][..., None]

    keys, values = plain(origin.k, origin.k_scale), plain(origin.v, origin.v_scale)
    if origin.key_bias is not None:
        keys = keys + jnp.asarray(origin.key_bias)[:, None]
    cos, sin = rope.rotation(jnp.asarray(turn, jnp.int32), head_dim)
    keys = rotate(keys, cos[None, :, None, :], sin[None, :, None, :])
    return PagedKV(
        kv.k.at[write].set(storage.store(keys, kv.k.dtype)),
        kv.v.at[write].set(storage.store(values, kv.v.dtype)),
    )
