"""What a restore reads and writes: source pages, and the pieces of them that are copied."""

import dataclasses
from typing import Literal, no_type_check

import jax
import numpy as np

from tokendance_jax.kernels.lanes import Array


@no_type_check  # JAX also builds these pytrees with leaves that are not arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Source:
    """Pages to restore from, outside the pool.

    Attributes:
      k: [layers, pages, page_size, kv_heads, head_dim]; keys in the pool's dtype or int8.
      v: values, as k.
      k_scale: f32 [layers, pages, page_size, kv_heads]; factors of int8 keys. None for other keys.
      v_scale: as k_scale, for values.
      key_bias: f32 [layers, kv_heads, head_dim]; added to keys before they are rotated. Or None.
      rotated: whether keys are stored rotated at canonical positions. Otherwise they are stored
        before the rotary embedding, and slot o of a page is rotated by the piece's turn plus o.
    """

    k: Array
    v: Array
    k_scale: Array | None = None
    v_scale: Array | None = None
    key_bias: Array | None = None
    rotated: bool = dataclasses.field(default=True, metadata={"static": True})


@no_type_check  # JAX also builds these pytrees with leaves that are not arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RestorePlan:
    """Pieces of source pages, grouped so that each page is read once, wherever its pieces go.

    Attributes:
      page: i32 [pages]; the source pages that are read.
      begin: i32 [pages + 1]; pieces `begin[i]` to `begin[i + 1]` are of `page[i]`.
      first: i32 [pieces]; first slot of the piece in its page.
      slots: i32 [pieces]; number of slots.
      target: i32 [pieces]; the pool's slot that the first slot is copied to, page * page_size +
        offset. The other slots follow it.
      turn: i32 [pieces]; by how many positions keys are rotated: target minus source position. For
        keys that are not rotated yet, the target position of slot 0 of the source page.
    """

    page: Array
    begin: Array
    first: Array
    slots: Array
    target: Array
    turn: Array

    @classmethod
    def of_slots(
        cls, source: np.ndarray, target: np.ndarray, turn: np.ndarray, *, page_size: int
    ) -> "RestorePlan":
        """Joins single slots into pieces.

        Args:
          source: i32 [slots]; page * page_size + offset in the source.
          target: i32 [slots]; page * page_size + offset in the pool, without duplicates.
          turn: i32 [slots]; see `RestorePlan.turn`.
          page_size: slots of a page.

        Returns:
          The plan, with one piece per run of neighbouring slots.
        """
        order = np.lexsort((target, source // page_size))
        source, target, turn = source[order], target[order], turn[order]
        page = source // page_size
        new_page = np.diff(page, prepend=-1) != 0
        # A piece stays within one target page too, so that a kernel can write it as a whole.
        onward = (np.diff(source) == 1) & (np.diff(target) == 1) & (np.diff(turn) == 0)
        onward &= target[1:] % page_size != 0
        new_piece = new_page.copy()
        new_piece[1:] |= ~onward
        starts = np.flatnonzero(new_piece)
        begin = np.append(np.flatnonzero(new_page[starts]), len(starts))
        columns = (
            page[new_page],
            begin,
            source[starts] % page_size,
            np.diff(np.append(starts, len(source))),
            target[starts],
            turn[starts],
        )
        return cls(*(column.astype(np.int32) for column in columns))

    @classmethod
    def of_pages(cls, source: np.ndarray, target: np.ndarray, *, page_size: int) -> "RestorePlan":
        """Plans copies of whole pages without rotation.

        Args:
          source: i32 [pages]; pages of the source, in ascending order, without duplicates.
          target: i32 [pages]; pages of the pool.
          page_size: slots of a page.
        """
        zeros = np.zeros(len(source), np.int32)
        return cls(
            page=source.astype(np.int32),
            begin=np.arange(len(source) + 1, dtype=np.int32),
            first=zeros,
            slots=zeros + np.int32(page_size),
            target=target * np.int32(page_size),
            turn=zeros,
        )

    def cut(self, start: int, stop: int) -> "RestorePlan":
        """Returns the plan of pieces `start` to `stop` alone."""
        page, begin, *columns = self._columns()
        stop = min(stop, len(columns[0]))
        begin = np.clip(begin, start, stop) - start
        used = np.diff(begin) > 0
        begin = np.append(begin[:-1][used], stop - start).astype(np.int32)
        return RestorePlan(page[used], begin, *(column[start:stop] for column in columns))

    def padded(self, pages: int, pieces: int) -> "RestorePlan":
        """Pads the arrays to these sizes, which must be at least their own."""

        def fill(x: np.ndarray, size: int, mode: Literal["constant", "edge"]) -> np.ndarray:
            return np.pad(x, (0, size - len(x)), mode=mode)

        page, begin, *columns = self._columns()
        return RestorePlan(
            fill(page, pages, "constant"),
            fill(begin, pages + 1, "edge"),
            *(fill(column, pieces, "constant") for column in columns),
        )

    def _columns(self) -> list[np.ndarray]:
        """Returns the arrays of a plan on the host, in the order of its fields."""
        return [np.asarray(getattr(self, field.name)) for field in dataclasses.fields(self)]
