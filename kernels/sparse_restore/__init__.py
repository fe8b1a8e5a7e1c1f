from tokendance_jax.kernels.sparse_restore.api import sparse_restore as sparse_restore
from tokendance_jax.kernels.sparse_restore.plan import RestorePlan as RestorePlan
from tokendance_jax.kernels.sparse_restore.plan import Source as Source
