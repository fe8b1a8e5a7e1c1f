"""The runner, which owns a model's weights, its page pool and its compiled programs."""

import time
from collections.abc import Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jaxtyping import Float

from tokendance_jax.engine.compiling import Program, Programs
from tokendance_jax.engine.limits import too_large
from tokendance_jax.mirror import MasterMirror, Quantised, decode_pages, encode
from tokendance_jax.model import Model
from tokendance_jax.paged.kv import KVSpec, PagedKV
from tokendance_jax.paged.page_pool import PagePool
from tokendance_jax.plan.lane import LanePlan
from tokendance_jax.plan.shapes import Shapes

P = ParamSpec("P")
R = TypeVar("R")


class Runner:
    """Runs programs on a page pool.

    Only the runner holds the pool's arrays. They are donated to each program, and the arrays that
    the program returns replace them.

    Attributes:
      programs: the compiled programs; other runners may share them.
      spec: shape and storage of the pool.
      kv: the pool.
      waited_s: seconds that the host waited for results, in all calls of `wait`.
    """

    def __init__(self, programs: Programs, spec: KVSpec, kv: PagedKV | None = None):
        """Creates the pool, unless one is passed.

        Args:
          programs: programs of a model, made for the pool's sizes.
          spec: shape and storage of the pool.
          kv: the pool; None: a new one.

        Raises:
          ValueError: the device has no room for the pool.
        """
        self.programs = programs
        self.spec = spec
        self.waited_s = 0.0
        if kv is None:
            self.reset()
        else:
            self.kv = kv

    @property
    def model(self) -> Model:
        """The model."""
        return self.programs.model

    @property
    def shapes(self) -> Shapes:
        """The static shapes."""
        return self.programs.shapes

    @property
    def layers(self) -> int:
        """Decoder layers of the model."""
        return self.model.config.num_hidden_layers

    @property
    def lost(self) -> bool:
        """Whether a call consumed the donated pool without returning it, say after an interrupt."""
        return self.kv.k.is_deleted() or self.kv.v.is_deleted()

    def reset(self) -> None:
        """Replaces the pool by a new one that is filled with zeros.

        Raises:
          ValueError: the device has no room for it.
        """
        try:
            self.kv = jax.block_until_ready(self.spec.zeros())
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            size = self.spec.pages * self.spec.page_bytes
            raise too_large(size, "the device does not have that much left") from None

    def run(self, program: Program[P, R], *arguments: P.args, **_: P.kwargs) -> R:
        """Runs a program on the pool, and compiles it first if its shapes are new.

        Args:
          program: one of `engine.programs`.
          arguments: its arguments after build, model and pool. All host arrays are transferred to
            the device as one.

        Returns:
          The program's result, without the pool.
        """
        if not program.pool:
            return self.programs.call(program, None, *arguments)
        self.kv, result = self.programs.call(program, self.kv, *arguments)
        return result

    def prepare(self, program: Program[P, Any], *arguments: P.args, **_: P.kwargs) -> None:
        """Compiles a program for arguments of these shapes, unless it is already compiled."""
        self.programs.prepare(program, self.kv if program.pool else None, *arguments)

    def new_hidden(self, lanes: int) -> Float[jax.Array, "lanes width"]:
        """Returns a residual stream of zeros for `lanes` lanes (a bucket)."""
        return jax.device_put(np.zeros((lanes, self.model.config.hidden_size), np.float32))

    def gather(
        self, hidden: Float[jax.Array, "lanes width"], rows: Sequence[int]
    ) -> Float[jax.Array, "bucket width"]:
        """Returns rows of a residual stream, in the bucket of their number."""
        chosen = np.zeros((self.shapes.lanes.fit(len(rows)), hidden.shape[1]), np.float32)
        chosen[: len(rows)] = np.asarray(hidden)[list(rows)]
        return jax.device_put(chosen)

    def wait(self, results: Any) -> None:
        """Waits until results of calls are there."""
        start = time.perf_counter()
        jax.block_until_ready(results)
        self.waited_s += time.perf_counter() - start

    def encode(
        self, lanes: Sequence[LanePlan], lengths: Sequence[int], form: Quantised | None = None
    ) -> MasterMirror:
        """Copies the KV of lanes out of the pool; see `mirror.encode`."""
        return encode(lanes, lengths, self.kv, identity=self.model.identity, form=form)

    def restore(self, mirrors: MasterMirror, pages: PagePool) -> list[LanePlan]:
        """Restores the KV of a round into pages of the pool; see `mirror.decode_pages`."""
        self.kv, lanes = decode_pages(
            mirrors,
            self.kv,
            pages,
            identity=self.model.identity,
            implementation=self.programs.build.implementation,
        )
        return lanes
