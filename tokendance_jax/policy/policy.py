"""The interface of policies: a policy opens a round as lanes and steps, and closes it."""

import abc
import dataclasses
from collections.abc import Generator, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int32

from tokendance_jax.plan.lane import LanePlan
from tokendance_jax.prompt.tokenized import TokenizedPrompt

# The seat of a base's lane, which belongs to no agent.
NOBODY = -1


@dataclasses.dataclass(frozen=True, slots=True)
class Compute:
    """Computes the rows of lanes, through all layers.

    Attributes:
      lanes: the lanes, in an order in which they may read each other: of the pages written in this
        step, a lane reads those that it writes itself or that earlier lanes write.
      seats: the agent of each lane, or `NOBODY`.
    """

    lanes: Sequence[LanePlan]
    seats: Sequence[int]


@dataclasses.dataclass(frozen=True, slots=True)
class Link:
    """Copies K and V between slots, and rotates keys to the position of the copy.

    Attributes:
      source: slot (page * page_size + offset) to read.
      target: slot to write.
      shift: position of the copy minus position of the source.
    """

    source: Int32[np.ndarray, " slots"]
    target: Int32[np.ndarray, " slots"]
    shift: Int32[np.ndarray, " slots"]


@dataclasses.dataclass(frozen=True, slots=True)
class Look:
    """Scores rows, so that the policy can choose which of them to compute.

    The rows run through the first layers and are then compared with the pages in their lanes'
    tables. Rows whose slots are in pages of the lane's own write their K and V of these layers;
    rows whose slots are in base pages do not. The scores are sent back into the policy's steps,
    one array per lane.

    Attributes:
      what: the kind of scores. "deviation": the squared changes of each row's K and V at layer 1,
        f32 [2, rows]. "attention": how much the rows attend to each table entry in a middle layer,
        f32 [entries].
      lanes: the lanes; `computed` names the rows.
      seats: the agent of each lane.
      resume: whether a `Rest` step continues the rows after layer 0.
    """

    what: Literal["deviation", "attention"]
    lanes: Sequence[LanePlan]
    seats: Sequence[int]
    resume: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Rest:
    """Runs some rows of the preceding `Look` through layer 1 and the layers after it.

    Attributes:
      lanes: the lanes of that `Look` in the same order; `computed` names the rows to continue.
      seats: the agent of each lane.
    """

    lanes: Sequence[LanePlan]
    seats: Sequence[int]


Step = Compute | Link | Look | Rest
Scores = list[Float32[np.ndarray, "..."]]
Steps = Generator[Step, Scores | None, None]


def no_steps() -> Steps:
    """Yields no steps."""
    yield from ()


@dataclasses.dataclass(slots=True, eq=False)
class OpenRound:
    """A round whose pages are taken.

    Attributes:
      lanes: the agents' lanes, in the round's order. Their tables may change until all steps are
        done; after that they hold the prompt and room for the answer.
      bases: lanes of bases that the round holds.
      exact_hits: number of leading tokens of each prompt that are read from exact pages.
      preamble_tokens: number of tokens of the neutral preamble in front of the bases.
      steps: what the device has to do, in order. The scores of each `Look` are sent into the
        generator.
      left: number of leading entries of the bases' tables whose pages were released when all steps
        were done; these entries hold a preamble. Later rounds can still find the pages, but this
        round no longer reads them.
      written: for each agent, the tokens whose K and V were written, in logical order; None until
        the round succeeds, as its pages may hold anything until then.
    """

    lanes: list[LanePlan]
    bases: list[LanePlan]
    exact_hits: list[int]
    preamble_tokens: int
    steps: Steps
    left: int = 0
    written: list[Int32[np.ndarray, " _"]] | None = None

    @property
    def base_pages(self) -> Int32[np.ndarray, " references"]:
        """Pages that the bases hold, with one occurrence per reference."""
        pages = [lane.page[self.left :] for lane in self.bases]
        return np.concatenate(pages) if pages else np.zeros(0, np.int32)


class Policy(abc.ABC):
    """Decides which pages a round takes and which rows it computes; host only.

    Attributes:
      programs: names of the programs that its steps may need, which are compiled in advance.
      bases: most lanes of bases that it computes together with the agents' lanes.
      frames: most changes of frame that an agent's table is expected to have.
    """

    programs: tuple[str, ...] = ("prefill",)
    bases: int = 0
    frames: int = 0

    @abc.abstractmethod
    def open(self, prompts: Sequence[TokenizedPrompt], rooms: Sequence[int]) -> OpenRound:
        """Takes the pages of a round.

        Args:
          prompts: the agents' prompts.
          rooms: for each lane, how many more tokens it must have room for.

        Raises:
          OutOfPages: the pool cannot allocate them; no reference is held then.
        """

    @abc.abstractmethod
    def close(self, opened: OpenRound, written: Sequence[Int32[np.ndarray, " _"]] | None) -> None:
        """Releases the pages of a round.

        Args:
          opened: an open round.
          written: for each agent, the tokens whose K and V were written, in logical order; None if
            the round failed and its pages may hold anything.
        """

    def base_pages(self) -> Int32[np.ndarray, " pages"]:
        """Returns the pages of the bases that later rounds may read."""
        return np.zeros(0, np.int32)
