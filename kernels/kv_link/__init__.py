from tokendance_jax.kernels.kv_link.api import kv_link as kv_link
