"""The KV of a round at rest: base pages, stored once, and each agent's own pages."""

from tokendance_jax.mirror.compression import Compression
from tokendance_jax.mirror.dense import decode_dense, encode_dense
from tokendance_jax.mirror.errors import MirrorError
from tokendance_jax.mirror.files import restore_mirrors, save_mirrors
from tokendance_jax.mirror.layout import MirrorLayout, MirrorTable
from tokendance_jax.mirror.master_mirror import MasterMirror, Mirror, decode_pages, encode
from tokendance_jax.mirror.pages import Quantised, StoredPages

__all__ = [
    "Compression",
    "MasterMirror",
    "Mirror",
    "MirrorError",
    "MirrorLayout",
    "MirrorTable",
    "Quantised",
    "StoredPages",
    "decode_dense",
    "decode_pages",
    "encode",
    "encode_dense",
    "restore_mirrors",
    "save_mirrors",
]
