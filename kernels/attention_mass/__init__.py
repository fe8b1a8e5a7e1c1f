from tokendance_jax.kernels.attention_mass.api import attention_mass as attention_mass
