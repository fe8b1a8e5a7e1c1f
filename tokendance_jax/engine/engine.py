"""The engine: serves rounds of agents from one model and one page pool."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32

from tokendance_jax.engine import programs as device
from tokendance_jax.engine.clock import Clock
from tokendance_jax.engine.compiling import Programs
from tokendance_jax.engine.config import EngineConfig
from tokendance_jax.engine.decode import Answer, OnToken, generate, take
from tokendance_jax.engine.ledger import account
from tokendance_jax.engine.limits import answer_limits
from tokendance_jax.engine.prefill import Prefill
from tokendance_jax.engine.result import RoundResult, Timings
from tokendance_jax.engine.runner import Runner
from tokendance_jax.engine.sampling import (
    SamplingArrays,
    agent_key,
    check_stop_ids,
    sampling_arrays,
)
from tokendance_jax.engine.warm_up import warm_up
from tokendance_jax.kernels import dispatch
from tokendance_jax.mirror import MasterMirror, MirrorLayout, Quantised
from tokendance_jax.model import Model
from tokendance_jax.paged.kv import KVSpec
from tokendance_jax.paged.page_pool import PagePool
from tokendance_jax.plan.lane import LanePlan
from tokendance_jax.plan.shapes import PACKING, Shapes
from tokendance_jax.policy.policies import make_policy
from tokendance_jax.policy.policy import OpenRound
from tokendance_jax.prompt.authors import name_authors
from tokendance_jax.prompt.live import put_answers
from tokendance_jax.prompt.round import PromptError, Round
from tokendance_jax.prompt.tokenized import TokenizedPrompt, tokenize_round
from tokendance_jax.prompt.trace import Trace


class RoundEngine:
    """Serves rounds: plans each on the host, prefills it as one batch, and decodes all agents.

    Before any device work, a round allocates the pages of its prompts and of its longest answers,
    so a round that is admitted always finishes. It releases the pages however it ends. Once the
    programs of a bucket shape are compiled, nothing is traced.

    Attributes:
      config: the settings.
      runner: runs programs on the device.
      pool: reference counts of the pages in the runner's pool.
    """

    def __init__(
        self,
        model: Model,
        config: EngineConfig | None = None,
        *,
        programs: Programs | None = None,
        **settings: Any,
    ):
        """Creates an engine with an empty pool.

        Args:
          model: the model to serve.
          config: the settings; None: the defaults.
          programs: programs of another engine with the same model and sizes, which saves
            compiling them again.
          settings: fields of `EngineConfig` that override those of `config`.

        Raises:
          ValueError: if a setting is out of its range, the device has no room for the pool, or
            `programs` belongs to another model, other sizes or other kernels.
        """
        config = dataclasses.replace(config or EngineConfig(), **settings)
        spec, shapes = _sizes(model, config)
        if programs is None:
            programs = Programs(model, shapes, implementation=config.implementation)
        served = programs.model
        if served.state is not model.state or served.config != model.config:
            raise ValueError("programs: they serve another model; leave the argument out")
        if programs.shapes != shapes or programs.build.implementation != config.implementation:
            raise ValueError(
                "programs: they were made for other sizes or kernels; leave the argument out"
            )
        self.config = config
        self.runner = Runner(programs, spec)
        self._preamble = np.array(model.tokenizer.encode_text(config.preamble), np.int32)
        self._start()

    @property
    def model(self) -> Model:
        """The model."""
        return self.runner.model

    @property
    def programs(self) -> Programs:
        """The compiled programs."""
        return self.runner.programs

    @property
    def shapes(self) -> Shapes:
        """The static shapes."""
        return self.runner.shapes

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
          NotFiniteError: if the model's logits are NaN or infinite; nothing of the round is kept.
        """
        form = self._mirror_form(mirrors)
        if mirrors is not None:
            _ = self.model.identity  # hashes the weights once, before the clock starts
        clock = Clock(self.programs, cold=self.config.cold)
        if chat is None:
            chat = self.model.tokenizer.chat_template is not None
        prompts = tokenize_round(round_, self.model.tokenizer, chat=chat)
        limits = self._admit(round_, prompts)
        stop_ids = (*self.model.tokenizer.stop_ids, *round_.sampling.stop_token_ids)
        check_stop_ids(stop_ids)
        sampling_of = self._sampling_of(round_, limits, stop_ids)
        answers = [
            Answer(
                prompt.agent,
                self.model.tokenizer,
                limit=limit,
                stop=round_.sampling.stop,
                stop_ids=frozenset(stop_ids),
                on_token=on_token,
            )
            for prompt, limit in zip(prompts, limits, strict=True)
        ]
        # No K and V are computed for the last token of an answer, so it needs no slot.
        with self.open(prompts, [limit - 1 for limit in limits]) as opened:
            plan_s = clock.lap()
            prefill = self.prefill(opened)
            prefill_s = clock.lap()

            sampling = sampling_of(range(len(prompts)))
            first = np.asarray(self.runner.run(device.first_token, prefill.hidden, sampling))
            first_token_s = clock.total()
            clock.lap()
            take(answers, first[: len(answers), None], round_index=round_.index)
            generate(
                self.runner,
                opened.lanes,
                answers,
                sampling_of,
                steps=self.config.decode_steps,
                round_index=round_.index,
            )
            decode_s = clock.lap()

            opened.written = [
                np.concatenate([prompt.token_ids, np.asarray(answer.chosen[:-1], np.int32)])
                for prompt, answer in zip(prompts, answers, strict=True)
            ]
            lengths = list(map(len, opened.written))
            layout = kept = None
            if mirrors is not None or at_rest:
                layout = MirrorLayout.of_lanes(opened.lanes, lengths)
            if mirrors is not None:
                kept = self.runner.encode(opened.lanes, lengths, form)
            mirror_s = clock.lap()
            agents, ledger = account(
                prompts,
                answers,
                opened,
                prefill.cost,
                lengths=lengths,
                layers=self.runner.layers,
                page_size=self.shapes.page_size,
                page_bytes=self.page_bytes,
                layout=layout,
                form=form,
            )
        timings = Timings(plan_s, prefill_s, first_token_s, decode_s, mirror_s, clock.compile_s)
        return RoundResult(round_.index, agents, timings, ledger, kept)

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
        """
        try:
            return self.runner.restore(mirrors, self.pool)
        finally:
            self._recover()

    def warm_up(self, *, agents: int, tokens: int) -> float:
        """Compiles all programs that rounds within these bounds may need.

        Rounds served afterwards trace and compile nothing. Without it, programs are compiled when a
        round first needs them.

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
                self._admit(round_, tokenize_round(round_, self.model.tokenizer, chat=bool(chat)))
        else:
            trace = name_authors(trace)
        answers: list[dict[str, str]] = []
        for round_ in trace.rounds:
            served = round_ if replay else put_answers(round_, answers)
            result = self.serve(served, chat=chat, on_token=on_token, at_rest=at_rest)
            answers.append(result.texts)
            yield result

    @contextlib.contextmanager
    def open(self, prompts: Sequence[TokenizedPrompt], rooms: Sequence[int]) -> Iterator[OpenRound]:
        """Allocates the pages of a round, and releases them when the block ends.

        Unless the block sets `OpenRound.written`, no page that may be half written stays cached.

        Args:
          prompts: the agents' prompts.
          rooms: for each lane, the number of further tokens that it must have room for.

        Raises:
          OutOfPages: if the pool cannot provide them; nothing is held then.
        """
        opened = self._policy.open(prompts, rooms)
        try:
            yield opened
        finally:
            self._policy.close(opened, opened.written)
            self._recover()

    def prefill(self, opened: OpenRound, wanted: Sequence[int] | None = None) -> Prefill:
        """Runs the steps of an open round.

        Args:
          opened: the round.
          wanted: for each agent, the first position whose residual stream is kept for
            `Prefill.streams`; None: none is kept.
        """
        prefill = Prefill(self.runner, agents=len(opened.lanes))
        prefill.run(opened.steps, wanted)
        return prefill

    def base_pages(self) -> Int32[np.ndarray, " pages"]:
        """Returns the pages of shared text that later rounds may read."""
        return self._policy.base_pages()

    def _start(self) -> None:
        """Creates the policy and the reference counts of an empty pool."""
        model, config = self.model, self.config
        self.pool = PagePool(self.shapes.pages)
        namespace = f"{model.name}/{model.config}/{self.runner.spec.storage}/{model.dtype}"
        self._policy = make_policy(
            config.policy,
            self.pool,
            self.shapes.page_size,
            namespace,
            options=config.options,
            preamble=self._preamble,
            context=model.config.max_position_embeddings,
            salt=config.salt,
        )

    def _recover(self) -> None:
        """Starts over with an empty pool if a call lost the donated pool (see `Runner.lost`)."""
        if self.runner.lost:
            self.runner.reset()
            self._start()

    def _admit(self, round_: Round, prompts: Sequence[TokenizedPrompt]) -> list[int]:
        """Checks prompts against the model's and the engine's limits; returns answer limits."""
        if len(prompts) > self.shapes.lanes.budget:
            raise PromptError(
                f"round {round_.index}: {len(prompts)} agents, the engine serves at most "
                f"{self.shapes.lanes.budget}; raise max_agents"
            )
        return answer_limits(round_, prompts, self.model.config)

    def _mirror_form(self, mirrors: str | None) -> Quantised | None:
        """Returns how mirrors of this name store pages; None: bit for bit."""
        if mirrors not in (None, "exact", "int8"):
            raise ValueError(f"mirrors: {mirrors!r} is unknown; choose exact or int8")
        if mirrors != "int8":
            return None
        return Quantised(self.model.key_bias, self.model.config.rope)

    def _sampling_of(
        self, round_: Round, limits: Sequence[int], stop_ids: Sequence[int]
    ) -> Callable[[Sequence[int]], SamplingArrays]:
        """Returns a function that stacks the sampling settings of agents with given indices."""
        sampling = round_.sampling
        keys = [agent_key(sampling.seed, round_.index, agent.agent) for agent in round_.agents]

        def sampling_of(seats: Sequence[int]) -> SamplingArrays:
            return sampling_arrays(
                self.shapes.lanes.fit(len(seats)),
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                keys=[keys[seat] for seat in seats],
                limits=[limits[seat] for seat in seats],
                stop_ids=stop_ids,
            )

        return sampling_of


def _sizes(model: Model, config: EngineConfig) -> tuple[KVSpec, Shapes]:
    """Returns the spec of the largest pool that fits `kv_memory`, and the static shapes."""
    spec = model.kv_spec(
        pages=1,
        page_size=config.page_size,
        dtype=config.kv_dtype,
        implementation=config.implementation,
    )
    platform = dispatch.platform_of(config.implementation)
    room = spec.page_room(platform)
    pages = config.kv_memory // room
    if pages < 2:
        raise ValueError(
            f"kv_memory: {config.kv_memory} bytes hold {pages} pages of {room} bytes; "
            f"give at least {2 * room}"
        )
    shapes = Shapes.of(
        row_budget=config.row_budget,
        max_lanes=config.max_agents,
        max_tokens=model.config.max_position_embeddings,
        pages=pages,
        page_size=config.page_size,
        packing=PACKING.get(platform),
    )
    return dataclasses.replace(spec, pages=pages), shapes
