"""Compiles programs for the shapes of their arguments, and calls them."""

import dataclasses
import functools
import inspect
import time
from collections.abc import Callable
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import jax
import numpy as np
from flax import nnx

from tokendance_jax.model import Model
from tokendance_jax.models.decoder.config import DecoderConfig
from tokendance_jax.models.decoder.model import Decoder
from tokendance_jax.paged.kv import PagedKV, pool_format
from tokendance_jax.plan.shapes import Shapes

P = ParamSpec("P")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True, slots=True)
class Build:
    """The settings that programs are compiled for, apart from the shapes of their arguments.

    Attributes:
      config: the model's sizes.
      page_size: token slots in a page.
      no_slot: the write slot of rows that write nothing.
      implementation: which kernels run (see `kernels.dispatch`).
      rolled: whether one loop runs all layers (see `Decoder.hidden`).
    """

    config: DecoderConfig
    page_size: int
    no_slot: int
    implementation: str | None
    rolled: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Program(Generic[P, R]):
    """A function that runs on the device, declared by `program` or `pool_program`.

    Attributes:
      function: function of a `Build`, the model, the pool if `pool` is true, and further
        arguments. With a pool, it returns the pool and a result.
      pool: whether the function takes the pool, which is then donated.
      donated: names of other arguments that are donated.
    """

    function: Callable[..., Any]
    pool: bool
    donated: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.__name__

    @functools.cached_property
    def places(self) -> tuple[int, ...]:
        """Indices of the donated arguments, counted after model and pool."""
        names = list(inspect.signature(self.function).parameters)[2 + self.pool :]
        return tuple(map(names.index, self.donated))


def program(function: Callable[Concatenate[Build, Decoder, P], R]) -> Program[P, R]:
    """Declares a program that needs no pool."""
    return Program(function, pool=False)


def pool_program(
    *donated: str,
) -> Callable[
    [Callable[Concatenate[Build, Decoder, PagedKV, P], tuple[PagedKV, R]]], Program[P, R]
]:
    """Declares a program on the pool. The pool and the named arguments are donated."""
    return lambda function: Program(function, pool=True, donated=donated)


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    """How arguments are passed to a program: host arrays packed as one, device arrays as they are.

    Each transfer has a cost that does not depend on its size, and a plan has 30 arrays.

    Attributes:
      tree: structure of the arguments.
      leaves: shape, dtype and kind of each leaf: "packed" is a host array, "taken" a donated
        device array, "kept" any other device array.
    """

    tree: Any
    leaves: tuple[tuple[tuple[int, ...], np.dtype, str], ...]

    @classmethod
    def of(cls, arguments: tuple[Any, ...], donated: tuple[int, ...]) -> tuple["Form", list[Any]]:
        """Returns the form of arguments, and their leaves.

        Args:
          arguments: pytrees of arrays, or of shapes on a device.
          donated: indices of the donated arguments.

        Raises:
          TypeError: a host array is not bool, and its dtype does not have four bytes.
        """
        leaves, tree = jax.tree.flatten(arguments)
        taken = {id(leaf) for place in donated for leaf in jax.tree.leaves(arguments[place])}
        kinds = [
            "packed" if isinstance(x, np.ndarray) else "taken" if id(x) in taken else "kept"
            for x in leaves
        ]
        for x, kind in zip(leaves, kinds, strict=True):
            if kind == "packed" and x.dtype.itemsize != 4 and x.dtype != np.bool_:
                raise TypeError(f"an array of {x.dtype}: pass bool or a dtype of four bytes")
        forms = [(tuple(x.shape), np.dtype(x.dtype), k) for x, k in zip(leaves, kinds, strict=True)]
        return cls(tree, tuple(forms)), leaves

    def pack(self, leaves: list[Any]) -> tuple[list[Any], list[Any], np.ndarray]:
        """Returns the donated device arrays, the others, and all host arrays as i32 [words]."""
        sorted_: dict[str, list[Any]] = {"taken": [], "kept": [], "packed": []}
        for x, (_, dtype, kind) in zip(leaves, self.leaves, strict=True):
            if kind == "packed":
                x = x.astype(np.int32) if dtype == np.bool_ else np.ascontiguousarray(x)
                x = x.reshape(-1).view(np.int32)
            sorted_[kind].append(x)
        packed = sorted_["packed"]
        words = np.concatenate(packed) if packed else np.zeros(0, np.int32)
        return sorted_["taken"], sorted_["kept"], words

    def unpack(self, taken: list[Any], kept: list[Any], words: jax.Array) -> Any:
        """Rebuilds the arguments from what `pack` returned, inside the compiled program."""
        device, start = {"taken": iter(taken), "kept": iter(kept)}, 0
        leaves = []
        for shape, dtype, kind in self.leaves:
            if kind != "packed":
                leaves.append(next(device[kind]))
                continue
            stop = start + int(np.prod(shape))
            x = words[start:stop].reshape(shape)
            if dtype == np.bool_:
                x = x != 0
            elif dtype != np.int32:
                x = jax.lax.bitcast_convert_type(x, dtype)
            leaves.append(x)
            start = stop
        return jax.tree.unflatten(self.tree, leaves)


class Programs:
    """A model's programs, each compiled once per shape of its arguments.

    Engines with the same model and sizes may share an instance. Calls of a compiled program trace
    nothing. `compile_s` is the total time spent compiling, so that callers can keep it out of
    their timings.
    """

    def __init__(
        self,
        model: Model,
        shapes: Shapes,
        *,
        implementation: str | None = None,
        device: jax.Device | None = None,
    ):
        """Compiles nothing yet.

        Args:
          model: the model.
          shapes: the static shapes.
          implementation: which kernels run (see `kernels.dispatch`).
          device: the device that runs the programs; None: the default device.
        """
        self.model = model
        self.shapes = shapes
        self.compile_s = 0.0
        self._device = device
        platform = (jax.devices()[0] if device is None else device).platform
        # XLA counts a donated pool twice, and rematerialization then computes products twice to
        # save memory.
        self._compiler_options: dict[str, str | bool] | None = (
            {"xla_disable_hlo_passes": "rematerialization"} if platform in ("cuda", "gpu") else None
        )
        self.build = Build(
            model.config,
            shapes.page_size,
            shapes.no_slot,
            implementation,
            # On CPU attention is XLA code, which takes long to compile for every layer.
            rolled=platform == "cpu",
        )
        self._compiled: dict[tuple[str, Form, Any], Callable[..., Any]] = {}

    def call(self, program: Program[..., Any], kv: PagedKV | None, *arguments: Any) -> Any:
        """Calls a program, and compiles it first if needed.

        Args:
          program: the program.
          kv: the pool, which is donated; None for a program without a pool.
          arguments: the program's arguments. The donated ones must be device arrays.

        Returns:
          The result of the program's function: with a pool, the pool and a result.
        """
        form, leaves = Form.of(arguments, program.places)
        pool = () if kv is None else (kv,)
        compiled = self.prepare(program, kv, *arguments, form=form)
        return compiled(self.model.state, *pool, *form.pack(leaves))

    def prepare(
        self,
        program: Program[..., Any],
        kv: PagedKV | None,
        *arguments: Any,
        form: Form | None = None,
    ) -> Callable[..., Any]:
        """Returns the program compiled for arguments of these shapes; compiles it if needed."""
        form = form or Form.of(arguments, program.places)[0]
        key = program.name, form, None if kv is None else kv.k.dtype
        found = self._compiled.get(key)
        if found is None:
            # Dispatch is asynchronous. Wait for earlier work to finish: otherwise it would overlap
            # with the compilation and be missing from the caller's timings.
            jax.block_until_ready([x for x in arguments if not isinstance(x, np.ndarray)])
            started = time.perf_counter()
            found = self._compiled[key] = self.compile(program, kv, *arguments)
            self.compile_s += time.perf_counter() - started
        return found

    def compile(
        self, program: Program[..., Any], kv: PagedKV | None, *arguments: Any
    ) -> jax.stages.Compiled:
        """Compiles a program for arguments of these shapes, even if that was done before."""
        lowered = self.lower(program, kv, *arguments)
        return lowered.compile(compiler_options=self._compiler_options)

    def lower(
        self, program: Program[..., Any], kv: PagedKV | None, *arguments: Any
    ) -> jax.stages.Lowered:
        """Traces and lowers a program for arguments of these shapes."""
        form, leaves = Form.of(arguments, program.places)
        given: Any = (*(() if kv is None else (kv,)), *form.pack(leaves))
        if self._device is not None:
            place = jax.sharding.SingleDeviceSharding(self._device)
            given = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), given
            )
        return self._jitted(program, form).lower(self.model.state, *given)

    def _jitted(self, program: Program[..., Any], form: Form) -> Any:
        """Returns the jitted function of the model's state, a pool if any, and packed arguments."""

        def traced(state: nnx.State, *given: Any) -> Any:
            *pool, taken, kept, words = given
            model = nnx.merge(self.model.graph, state)
            return program.function(self.build, model, *pool, *form.unpack(taken, kept, words))

        traced.__name__ = program.name
        if not program.pool:
            return jax.jit(traced, donate_argnums=(1,))
        pool = pool_format(self._device)
        return jax.jit(
            traced,
            donate_argnums=(1, 2),
            in_shardings=(None, pool, None, None, None),
            out_shardings=(pool, None),
        )
