"""What every policy is: it opens a round as lanes and steps, and closes it."""

import abc
import dataclasses
from collections.abc import Generator, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int32

from tokendance_jax.plan.lane import LanePlan
from tokendance_jax.prompt.tokenized import TokenizedPrompt

# The seat of a lane that belongs to no agent: a base's.
NOBODY = -1


@dataclasses.dataclass(frozen=True, slots=True)
class Compute:
    """Computes the rows of lanes, through all layers.

    Attributes:
      lanes: in an order in which they may read each other: a lane reads pages that it writes
        itself or that lanes before it write.
      seats: the agent of each lane, or `NOBODY`.
    """

    lanes: Sequence[LanePlan]
    seats: Sequence[int]


@dataclasses.dataclass(frozen=True, slots=True)
class Link:
    """Copies K and V between slots, keys rotated to the position of the copy.

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
    """Scores rows before it is decided which of them are computed.

    The rows run through the first layers and are then compared with the pages that their lanes
    show. Those that stand in pages of the lane's own write their K and V of these layers; those
    that stand in base pages do not. The scores are sent back into the policy's steps: one array for
    each lane.

    Attributes:
      what: "deviation": the squared changes of each row's K and V at layer 1, f32 [2, rows];
        "attention": how much the rows attend to each table entry, in a layer in the middle, f32
        [entries].
      lanes: the lanes; `computed` names the rows.
      seats: the agent of each lane.
      resume: whether `Rest` takes the rows up after layer 0.
    """

    what: Literal["deviation", "attention"]
    lanes: Sequence[LanePlan]
    seats: Sequence[int]
    resume: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Rest:
    """Takes some rows of the `Look` before through the layers from 1 on.

    Attributes:
      lanes: the lanes of that step in the same order; `computed` names the rows to go on with.
      seats: the agent of each lane.
    """

    lanes: Sequence[LanePlan]
    seats: Sequence[int]


Step = Compute | Link | Look | Rest
Scores = list[Float32[np.ndarray, "..."]]
Steps = Generator[Step, Scores | None, None]


def no_steps() -> Steps:
    """Nothing to do."""
    yield from ()


@dataclasses.dataclass(slots=True, eq=False)
class OpenRound:
    """A round whose pages are taken.

    Attributes:
      lanes: the agents' lanes, in the round's order. While steps run their tables may still change;
        then they hold the prompt, and room for the answer.
      bases: lanes of bases that the round holds.
      exact_hits: leading tokens of each prompt that are read from exact pages.
      preamble_tokens: tokens of the neutral preamble in front of the bases.
      steps: what the device has to do, in order. The generator is sent the scores of each `Look`.
      left: leading entries of the bases' tables whose pages were given back when all steps were
        done: a preamble's. They stay findable, but nobody reads them in this round any more.
      written: for each agent, the tokens whose K and V were written, in logical order; None as long
        as the round has not succeeded, and its pages may hold anything.
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
        """Pages that the bases hold, each as often as they hold it."""
        pages = [lane.page[self.left :] for lane in self.bases]
        return np.concatenate(pages) if pages else np.zeros(0, np.int32)


class Policy(abc.ABC):
    """Decides which pages a round takes and which rows it computes; host only.

    Attributes:
      programs: names of the programs that its steps may need, so that they are compiled beforehand.
      bases: most lanes of bases that it computes with the agents'.
      frames: most changes of the frame that an agent's table is expected to have.
    """

    programs: tuple[str, ...] = ("prefill",)
    bases: int = 0
    frames: int = 0

    @abc.abstractmethod
    def open(self, prompts: Sequence[TokenizedPrompt], rooms: Sequence[int]) -> OpenRound:
        """Takes the pages of a round.

        Args:
          prompts: the agents' prompts.
          rooms: how many more tokens each lane must have room for.

        Raises:
          OutOfPages: if the pool cannot give them; nothing is held then.
        """

    @abc.abstractmethod
    def close(self, opened: OpenRound, written: Sequence[Int32[np.ndarray, " _"]] | None) -> None:
        """Gives the pages of a round back.

        Args:
          opened: an open round.
          written: for each agent, the tokens whose K and V were written, in logical order; None if
            the round failed and its pages may hold anything.
        """

    def base_pages(self) -> Int32[np.ndarray, " pages"]:
        """Pages of the bases that later rounds may read."""
        return np.zeros(0, np.int32)
