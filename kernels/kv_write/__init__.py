from tokendance_jax.kernels.kv_write.api import kv_write as kv_write
