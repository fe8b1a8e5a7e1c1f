"""The round engine: serves whole rounds, each to its end."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int32

from tokendance_jax.engine.engine import Engine
from tokendance_jax.engine.ledger import account
from tokendance_jax.engine.prefill import Prefill
from tokendance_jax.engine.requests import check_number, requests_of
from tokendance_jax.engine.result import RoundResult, Timings
from tokendance_jax.engine.sequence import Handle
from tokendance_jax.engine.warm_up import warm_up
from tokendance_jax.mirror import MasterMirror, MirrorLayout, Quantised
from tokendance_jax.plan.lane import LanePlan
from tokendance_jax.policy.policy import OpenRound
from tokendance_jax.prompt.authors import name_authors
from tokendance_jax.prompt.live import put_answers
from tokendance_jax.prompt.round import Round
from tokendance_jax.prompt.tokenized import TokenizedPrompt
from tokendance_jax.prompt.trace import Trace

# Called with agent, token id and the text that the token completes. A stop token is reported only
# if it completes text.
OnToken = Callable[[str, int, str], None]


class RoundEngine(Engine):
    """An engine with a barrier: `serve` returns when all agents of a round have answered.

    A round takes the pages of its prompts and of its longest answers before any device work, so a
    round that is admitted always finishes. It releases the pages however it ends. Other sequences
    that were added before go on meanwhile.
    """

    @property
    def page_bytes(self) -> int:
        """Bytes of a page in all layers."""
        return self.runner.spec.page_bytes

    def serve(
        self,
        round_: Round,
        *,
        chat: bool | None = None,
        on_token: OnToken | None = None,
        mirrors: Literal["exact", "int8"] | None = None,
        at_rest: bool = False,
    ) -> RoundResult:
        """Serves one round.

        Args:
          round_: the prompts and how to sample.
          chat: whether to wrap the segments in the model's chat markup; None: if the model has a
            template.
          on_token: called for every token of an answer, in order, between decode calls; for a
            stop token only if text was held back. The concatenated texts are the answer.
          mirrors: whether to copy the KV of the round out of the pool, as a `MasterMirror`:
            "exact" copies it bit for bit, "int8" quantises it, to about half the bytes of a
            bfloat16 pool.
          at_rest: whether the ledger counts the bytes of the mirrors, even if none are made.

        Returns:
          Answers, timings and ledger, and the mirrors if requested.

        Raises:
          ValueError: if `mirrors` is unknown, or there are too many stop tokens; nothing has been
            computed then.
          PromptError: if a prompt cannot be served; nothing has been computed then.
          OutOfPages: if the pool cannot hold the round; nothing has been computed then.
          NotFiniteError: if the model's logits are NaN or infinite; nothing of the agent and of the
            round's shared text is kept.
        """
        form = self._mirror_form(mirrors)
        if mirrors is not None:
            _ = self.model.identity  # hashes the weights once, before the clock starts
        handle = self.add(round_, chat=chat, reserve=True, hold=mirrors is not None)
        try:
            for event in self.stream(handle):
                sequence = event.sequence
                if event.last and sequence.error is not None:
                    raise sequence.error
                token = event.token
                if on_token is None or token is None:
                    continue
                if event.text or token not in sequence.answer.stop_ids:
                    on_token(sequence.prompt.agent, token, event.text)
            return self._result(round_, handle, form, mirrors=mirrors, at_rest=at_rest)
        finally:
            self.abort(handle)

    def _result(
        self,
        round_: Round,
        handle: Handle,
        form: Quantised | None,
        *,
        mirrors: str | None,
        at_rest: bool,
    ) -> RoundResult:
        """Builds the result of a round whose answers have ended."""
        opened, cost = handle.opened, handle.cost
        assert opened is not None
        assert cost is not None
        handle.clock.lap()
        lengths = [sequence.length for sequence in handle.sequences]
        layout = kept = None
        if mirrors is not None or at_rest:
            layout = MirrorLayout.of_lanes(opened.lanes, lengths)
        if mirrors is not None:
            kept = self.runner.encode(opened.lanes, lengths, form)
        mirror_s = handle.clock.lap()
        agents, ledger = account(
            handle.sequences,
            opened,
            cost,
            layers=self.runner.layers,
            page_size=self.shapes.page_size,
            page_bytes=self.page_bytes,
            layout=layout,
            form=form,
        )
        timings = Timings(
            handle.plan_s,
            handle.prefill_s,
            handle.first_token_s,
            handle.decode_s,
            mirror_s,
            handle.clock.compile_s,
        )
        return RoundResult(round_.index, agents, timings, ledger, kept)

    def run(
        self,
        trace: Trace,
        *,
        replay: bool = True,
        chat: bool | None = None,
        on_token: OnToken | None = None,
        at_rest: bool = False,
    ) -> Iterator[RoundResult]:
        """Serves a trace's rounds in order.

        Args:
          trace: the rounds.
          replay: whether shared blocks are served as recorded. Otherwise, blocks that are answers
            of earlier rounds (`name_authors`) are replaced by the answers of this engine.
          chat: whether to wrap the segments in chat markup; None: not in replays, whose prompts are
            served as recorded; otherwise as in `serve`.
          on_token: see `serve`.
          at_rest: see `serve`.

        Yields:
          One result per round.

        Raises:
          PromptError: before anything is served, if a round of a replay cannot be served, or if
            the author of a shared block that a live run would replace cannot be identified.
        """
        if chat is None and replay:
            chat = False
        if replay:
            for round_ in trace.rounds:
                requests = requests_of(self.model, round_, chat=bool(chat))
                check_number(requests, answers=1, lanes=self.shapes.lanes.budget)
        else:
            trace = name_authors(trace)
        answers: list[dict[str, str]] = []
        for round_ in trace.rounds:
            served = round_ if replay else put_answers(round_, answers)
            result = self.serve(served, chat=chat, on_token=on_token, at_rest=at_rest)
            answers.append(result.texts)
            yield result

    def warm_up(self, *, agents: int, tokens: int) -> float:
        """Compiles all programs that rounds within these bounds may need.

        Rounds served afterwards trace and compile nothing. Without it, programs are compiled when a
        round first needs them. So are those for penalties, biases, masks, log-probabilities and
        several answers to one prompt.

        Args:
          agents: maximum number of agents in a round.
          tokens: maximum number of tokens of an agent, prompt and answer together.

        Returns:
          Seconds spent compiling.

        Raises:
          ValueError: if the engine cannot serve rounds of this size.
        """
        before, steps = self.programs.compile_s, self.config.decode_steps
        warm_up(self.runner, self._policy, agents=agents, tokens=tokens, steps=steps)
        return self.programs.compile_s - before

    def restore(self, mirrors: MasterMirror) -> list[LanePlan]:
        """Restores the KV of a round into pages of the pool.

        Args:
          mirrors: mirrors of a round that a model with the same weights in the same precision
            computed; exact in the pool's precision, or int8.

        Returns:
          One lane per agent, with nothing to compute. The caller holds one reference per table
          entry and releases them with `engine.pool.release(lane.page)`.

        Raises:
          MirrorError: if another model computed the mirrors, or they do not match the shape or
            precision of the pool; nothing is held then.
          OutOfPages: if the pool cannot hold them; nothing is held then.
          RuntimeError: sequences are being served.
        """
        if not self.idle:
            raise RuntimeError("sequences are being served; finish or abort them first")
        try:
            return self.runner.restore(mirrors, self.pool)
        finally:
            self._recover()

    @contextlib.contextmanager
    def open(self, prompts: Sequence[TokenizedPrompt]) -> Iterator[OpenRound]:
        """Takes the pages of prompts, which the block computes, and releases them when it ends.

        If the block raises an error, no page that may be half written stays cached.

        Raises:
          RuntimeError: sequences are being served.
          OutOfPages: if the pool cannot provide the pages; nothing is held then.
        """
        if not self.idle:
            raise RuntimeError("sequences are being served; finish or abort them first")
        opened = self._policy.open(prompts, [0] * len(prompts))
        written = None
        try:
            yield opened
            written = [prompt.token_ids for prompt in prompts]
        finally:
            self._policy.close(opened, written)
            self._recover()

    def prefill(self, opened: OpenRound, wanted: Sequence[int] | None = None) -> Prefill:
        """Runs the steps of an open round.

        Args:
          opened: the round.
          wanted: for each agent, the first position whose residual stream is kept for
            `Prefill.streams`; None: none is kept.
        """
        seats = range(len(opened.lanes))
        prefill = Prefill(self.runner, opened.steps, seats=seats, wanted=wanted)
        prefill.run()
        return prefill

    def base_pages(self) -> Int32[np.ndarray, " pages"]:
        """Returns the pages of shared text that later rounds may read."""
        return self._policy.base_pages()

    def _mirror_form(self, mirrors: str | None) -> Quantised | None:
        """Returns how mirrors of this name store pages; None: bit for bit."""
        if mirrors not in (None, "exact", "int8"):
            raise ValueError(f"mirrors: {mirrors!r} is unknown; choose exact or int8")
        if mirrors != "int8":
            return None
        return Quantised(self.model.key_bias, self.model.config.rope)
