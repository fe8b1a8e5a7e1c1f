from tokendance_jax.kernels.page_diff.api import page_diff as page_diff
from tokendance_jax.kernels.page_diff.plan import Deviation as Deviation
from tokendance_jax.kernels.page_diff.plan import DiffPlan as DiffPlan
