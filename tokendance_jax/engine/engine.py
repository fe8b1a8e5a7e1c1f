"""The engine: serves rounds of agents from one model and one page pool."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float32

from tokendance_jax.collector.lane import LanePlan
from tokendance_jax.collector.policies import PolicyOptions, make_policy
from tokendance_jax.collector.policy import OpenRound
from tokendance_jax.collector.shapes import PACKING, Shapes
from tokendance_jax.engine.clock import Clock
from tokendance_jax.engine.decode import Answer, OnToken, generate, take
from tokendance_jax.engine.errors import NotFiniteError
from tokendance_jax.engine.ledger import account
from tokendance_jax.engine.limits import answer_limits, check_kv_memory, check_page_size, too_large
from tokendance_jax.engine.prefill import Cost, Prefill
from tokendance_jax.engine.programs import DecodeState, Programs
from tokendance_jax.engine.result import RoundResult, Timings
from tokendance_jax.engine.sampling import (
    SamplingArrays,
    agent_key,
    check_stop_ids,
    sampling_arrays,
)
from tokendance_jax.kernels import dispatch
from tokendance_jax.kernels.lanes import GroupTables, LaneTables
from tokendance_jax.mirror import MasterMirror, Quantised, decode_pages, encode
from tokendance_jax.model import Model
from tokendance_jax.paged.kv import PagedKV, pool_format
from tokendance_jax.paged.page_pool import PagePool
from tokendance_jax.prompt.authors import name_authors
from tokendance_jax.prompt.live import put_answers
from tokendance_jax.prompt.preamble import DEFAULT_PREAMBLE
from tokendance_jax.prompt.round import PromptError, Round
from tokendance_jax.prompt.tokenized import TokenizedPrompt, tokenize_round
from tokendance_jax.prompt.trace import Trace

DEFAULT_KV_MEMORY = 1 << 30


class RoundEngine:
    """Serves rounds: plans them on the host, prefills them as one batch, decodes all agents.

    The engine owns the page pool. A round takes the pages of its prompts and its longest answers
    before any device work, so a round that is admitted always finishes, and gives them back however
    it ends. Nothing is traced once the programs of a bucket shape are compiled.
    """

    def __init__(
        self,
        model: Model,
        *,
        policy: str = "prefix",
        options: PolicyOptions | None = None,
        preamble: str = DEFAULT_PREAMBLE,
        salt: bytes = b"",
        page_size: int = 16,
        kv_memory: int = DEFAULT_KV_MEMORY,
        kv_dtype: DTypeLike | None = None,
        row_budget: int = 2048,
        max_agents: int = 128,
        decode_steps: int = 8,
        cold: bool = False,
        implementation: str | None = None,
        programs: Programs | None = None,
    ):
        """Makes an engine with an empty pool.

        Args:
          model: the model to serve.
          policy: which KV is reused, and how: one of `POLICIES`.
          options: choices within the policies.
          preamble: neutral text in front of shared text that is computed for all agents, where
            their prompts begin with nothing in common.
          salt: secret of a tenant; pages are found again only under the same salt.
          page_size: token slots in a page: a power of two, at most 256.
          kv_memory: bytes of the page pool.
          kv_dtype: precision of the pool; the model's if None.
          row_budget: most rows computed in one prefill call; longer rounds take several.
          max_agents: most agents in a round.
          decode_steps: tokens that a decode call generates before the host looks at them.
          cold: whether timings count compilation.
          implementation: which kernels run: "xla", "mosaic_gpu", "mosaic_tpu", or "interpret", the
            GPU kernels in a simulator; None: those of the platform.
          programs: programs of another engine with the same model and sizes, to share what is
            compiled.

        Raises:
          ValueError: if an argument is out of its range, or the device has no room for the pool.
        """
        for name, value in (
            ("row_budget", row_budget),
            ("max_agents", max_agents),
            ("decode_steps", decode_steps),
        ):
            if value < 1:
                raise ValueError(f"{name}: {value} is too small; give at least 1")
        check_page_size(page_size)
        spec = model.kv_spec(
            pages=1, page_size=page_size, dtype=kv_dtype, implementation=implementation
        )
        platform = dispatch.platform_of(implementation)
        room = spec.page_room(platform)
        pages = kv_memory // room
        if pages < 2:
            raise ValueError(
                f"kv_memory: {kv_memory} bytes hold {pages} pages of {room} bytes; "
                f"give at least {2 * room}"
            )
        check_kv_memory(kv_memory)
        self.model = model
        self.policy = policy
        self.page_bytes = spec.page_bytes
        self._options = options
        self._preamble = np.array(model.tokenizer.encode_text(preamble), np.int32)
        self._salt = salt
        self._kv_spec = dataclasses.replace(spec, pages=pages)
        shapes = Shapes.of(
            row_budget=row_budget,
            max_lanes=max_agents,
            max_tokens=model.config.max_position_embeddings,
            pages=pages,
            page_size=page_size,
            packing=PACKING.get(platform),
        )
        if programs is None:
            programs = Programs(model, shapes, implementation=implementation)
        self.programs = programs
        served = programs.model
        if served.state is not model.state or served.config != model.config:
            raise ValueError("programs: they serve another model; leave the argument out")
        if programs.shapes != shapes or programs.implementation != implementation:
            raise ValueError(
                "programs: they were made for other sizes or kernels; leave the argument out"
            )
        self._decode_steps = decode_steps
        self._cold = cold
        self._reset()

    @property
    def shapes(self) -> Shapes:
        """The static shapes."""
        return self.programs.shapes

    def serve(
        self,
        moment: Round,
        *,
        chat: bool | None = None,
        on_token: OnToken | None = None,
        mirrors: Literal["exact", "int8"] | None = None,
    ) -> RoundResult:
        """Serves one round.

        Args:
          moment: the prompts and how to sample.
          chat: whether to set the segments into the model's chat markup; None: if the model has a
            template.
          on_token: called for every token of an answer, in order, between decode calls; with a
            stop token only if text was held back. The texts joined are the answer.
          mirrors: whether to copy the KV of the round out of the pool, as a `MasterMirror`: to the
            bit, or quantised in about half the bytes of a bfloat16 pool.

        Returns:
          Answers, timings and ledger, and the mirrors where they are asked for.

        Raises:
          ValueError: if there are no such mirrors; nothing has been computed then.
          PromptError: if a prompt cannot be served; nothing has been computed then.
          OutOfPages: if the pool cannot hold the round; nothing has been computed then.
          NotFiniteError: if the model's logits are NaN or infinite; nothing of the round is kept.
        """
        form = self._mirror_form(mirrors)
        identity = None if mirrors is None else self.model.identity
        clock = Clock(self.programs, cold=self._cold)
        if chat is None:
            chat = self.model.tokenizer.chat_template is not None
        prompts = tokenize_round(moment, self.model.tokenizer, chat=chat)
        limits = self._admit(moment, prompts)
        stop_ids = (*self.model.tokenizer.stop_ids, *moment.sampling.stop_token_ids)
        check_stop_ids(stop_ids)
        sampling_of = self._sampling_of(moment, limits, stop_ids)
        # The last token of an answer is never computed, so it needs no slot.
        opened = self._policy.open(prompts, [limit - 1 for limit in limits])
        written: list[np.ndarray] | None = None
        try:
            plan_s = clock.lap()
            prefill = self._prefill(opened)
            lanes, hidden = opened.lanes, prefill.hidden
            prefill_s = clock.lap()

            first = np.asarray(self.programs.first_token(hidden, sampling_of(range(len(lanes)))))
            first_token_s = clock.total()
            clock.lap()
            answers = [
                Answer(
                    prompt.agent,
                    self.model.tokenizer,
                    limit=limit,
                    stop=moment.sampling.stop,
                    stop_ids=frozenset(stop_ids),
                    on_token=on_token,
                )
                for prompt, limit in zip(prompts, limits, strict=True)
            ]
            take(answers, first[: len(answers), None], round_index=moment.index)
            generate(
                self._decode,
                lanes,
                answers,
                sampling_of,
                self.shapes,
                steps=self._decode_steps,
                round_index=moment.index,
            )
            decode_s = clock.lap()

            written = [
                np.concatenate([prompt.token_ids, np.asarray(answer.chosen[:-1], np.int32)])
                for prompt, answer in zip(prompts, answers, strict=True)
            ]
            lengths = list(map(len, written))
            agents, ledger = account(
                prompts,
                answers,
                opened,
                prefill.cost,
                lengths=lengths,
                layers=self.programs.layers,
                page_size=self.shapes.page_size,
                page_bytes=self.page_bytes,
                form=form,
            )
            timings = Timings(plan_s, prefill_s, first_token_s, decode_s, clock.compile_s)
            kept = None
            if identity is not None:
                kept = encode(lanes, lengths, self._kv, identity=identity, form=form)
            return RoundResult(moment.index, agents, timings, ledger, kept)
        finally:
            self._close(opened, written)

    def restore(self, mirrors: MasterMirror) -> list[LanePlan]:
        """Restores the KV of a round into pages of the pool.

        Args:
          mirrors: of a round of a model with the same weights in the same precision; in an exact
            form of the pool's precision, or int8.

        Returns:
          A lane for each agent, with nothing to compute. The caller holds a reference for each
          table entry, and gives them back: `engine.pool.release(lane.page)`.

        Raises:
          MirrorError: if another model computed the mirrors, or they do not fit the pool; nothing
            is held then.
          OutOfPages: if the pool cannot hold them; nothing is held then.
        """
        try:
            self._kv, lanes = decode_pages(
                mirrors,
                self._kv,
                self.pool,
                identity=self.model.identity,
                implementation=self.programs.implementation,
            )
        finally:
            self._recover()
        return lanes

    def warm_up(self, *, agents: int, tokens: int) -> float:
        """Compiles all programs that rounds within these bounds may need.

        Rounds served afterwards trace and compile nothing. Without it, programs are compiled when a
        round first needs them.

        Args:
          agents: most agents in a round.
          tokens: most tokens of an agent, prompt and answer together.

        Returns:
          Seconds that compilation took.

        Raises:
          ValueError: if the engine serves no rounds of this size.
        """
        before = self.programs.compile_s
        self.programs.warm_up(
            self._kv, self._policy, agents=agents, tokens=tokens, steps=self._decode_steps
        )
        return self.programs.compile_s - before

    def run(
        self,
        trace: Trace,
        *,
        replay: bool = True,
        chat: bool | None = None,
        on_token: OnToken | None = None,
    ) -> Iterator[RoundResult]:
        """Serves a trace's rounds in order.

        Args:
          trace: the rounds.
          replay: whether shared blocks are the recorded answers; else those that are answers of
            earlier rounds (`name_authors`) are the ones that this engine gave.
          chat: whether to set the segments into chat markup; None: not in replays, whose prompts
            stand as they were recorded, else as in `serve`.
          on_token: see `serve`.

        Yields:
          One result per round.

        Raises:
          PromptError: before anything is served, if a round of a replay can't be, or if it can't be
            told whose answers the shared blocks are that a live run replaces.
        """
        if chat is None and replay:
            chat = False
        if replay:
            for moment in trace.rounds:
                self._admit(moment, tokenize_round(moment, self.model.tokenizer, chat=bool(chat)))
        else:
            trace = name_authors(trace)
        answers: list[dict[str, str]] = []
        for moment in trace.rounds:
            served = moment if replay else put_answers(moment, answers)
            result = self.serve(served, chat=chat, on_token=on_token)
            answers.append(result.texts)
            yield result

    def follow(
        self, prompts: Sequence[TokenizedPrompt], answers: Sequence[np.ndarray]
    ) -> tuple[list[Float32[np.ndarray, "_ width"]], Cost]:
        """Computes the residual stream along given answers (teacher forcing).

        The policy reads and computes what it would in a round of these prompts, and the answers
        behind them; it keeps what it would keep of the prompts.

        Args:
          prompts: the agents' prompts.
          answers: token ids i32 [tokens] of each answer; may be empty.

        Returns:
          For each agent, the residual stream f32 [1 + tokens, width] at the end of the prompt and
          at every token of the answer; and what was computed, answers included.

        Raises:
          PromptError: if a prompt and its answer are longer than the model's context; nothing has
            been computed then.
          OutOfPages: if the pool cannot hold the sequences.
          NotFiniteError: if the residual stream is NaN or infinite; nothing is kept then.
        """
        sequences = [p.followed_by(ids) for p, ids in zip(prompts, answers, strict=True)]
        context = self.model.config.max_position_embeddings
        for sequence in sequences:
            if len(sequence.token_ids) > context:
                raise PromptError(
                    f"agent {sequence.agent!r}: prompt and answer have {len(sequence.token_ids)} "
                    f"tokens, the model's context {context}; shorten them"
                )
        opened = self._policy.open(sequences, [0] * len(sequences))
        written = None
        try:
            wanted = [len(prompt.token_ids) - 1 for prompt in prompts]
            prefill = self._prefill(opened, wanted)
            streams = prefill.streams()
            for prompt, x in zip(prompts, streams, strict=True):
                _check_finite(x, f"agent {prompt.agent!r}", "residual stream")
            written = [prompt.token_ids for prompt in sequences]
        finally:
            self._close(opened, written)
        return streams, prefill.cost

    def logits(
        self, hidden: Float32[np.ndarray, "rows width"]
    ) -> Float32[np.ndarray, "rows vocab"]:
        """Next-token logits of residual-stream rows.

        Raises:
          NotFiniteError: if they are NaN or infinite.
        """
        size = self.shapes.rows.minimum
        logits = [np.zeros((0, self.model.config.vocab_size), np.float32)]
        for start in range(0, len(hidden), size):
            part = hidden[start : start + size]
            padded = np.pad(part, ((0, size - len(part)), (0, 0)))
            logits.append(np.asarray(self.programs.logits(padded))[: len(part)])
        found = np.concatenate(logits)
        _check_finite(found, "logits", "rows")
        return found

    def score(
        self, prompts: Sequence[TokenizedPrompt], answers: Sequence[np.ndarray]
    ) -> tuple[list[Float32[np.ndarray, "_ vocab"]], Cost]:
        """As `follow`, with next-token logits f32 [1 + tokens, vocab] for each agent."""
        streams, cost = self.follow(prompts, answers)
        return [self.logits(x) for x in streams], cost

    def shuffle_bases(self, seed: int) -> int:
        """Puts cached base pages into a wrong order, keys into one and values into another.

        For audits only: what agents read from bases afterwards is wrong, and a measure of quality
        that does not see that does not see the cache. In one order for both, attention would still
        find most of what it looks for.

        Args:
          seed: of the orders.

        Returns:
          Number of pages.
        """
        pages = self._policy.base_pages()
        draw = np.random.default_rng(seed)

        def shuffled(pool: jax.Array) -> jax.Array:
            order = np.arange(self.shapes.pages)
            order[pages] = draw.permutation(pages)
            return pool[:, order]

        pools = PagedKV(k=shuffled(self._kv.k), v=shuffled(self._kv.v))
        self._kv = jax.device_put(pools, pool_format())
        return len(pages)

    def _prefill(self, opened: OpenRound, wanted: Sequence[int] | None = None) -> Prefill:
        """Carries out a round's steps."""
        prefill = Prefill(self.programs, self._kv, agents=len(opened.lanes))
        try:
            prefill.run(opened.steps, wanted)
        finally:
            self._kv = prefill.kv
        return prefill

    def _reset(self) -> None:
        """Starts over with an empty pool."""
        try:
            self._kv = jax.block_until_ready(self._kv_spec.zeros())
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            size = self._kv_spec.pages * self.page_bytes
            raise too_large(size, "the device has not so much left") from None
        self.pool = PagePool(self.shapes.pages)
        config = self.model.config
        namespace = f"{self.model.name}/{config}/{self._kv_spec.storage}/{self.model.dtype}"
        self._policy = make_policy(
            self.policy,
            self.pool,
            self.shapes.page_size,
            namespace,
            options=self._options,
            preamble=self._preamble,
            context=config.max_position_embeddings,
            salt=self._salt,
        )

    def _admit(self, moment: Round, prompts: Sequence[TokenizedPrompt]) -> list[int]:
        """Checks prompts against the model's and the engine's limits; returns answer limits."""
        if len(prompts) > self.shapes.lanes.budget:
            raise PromptError(
                f"round {moment.index}: {len(prompts)} agents, the engine serves at most "
                f"{self.shapes.lanes.budget}; raise max_agents"
            )
        return answer_limits(moment, prompts, self.model.config)

    def _mirror_form(self, mirrors: str | None) -> Quantised | None:
        """How pages are stored in mirrors of a name."""
        if mirrors not in (None, "exact", "int8"):
            raise ValueError(f"mirrors: {mirrors!r} is unknown; choose exact or int8")
        if mirrors != "int8":
            return None
        return Quantised(self.model.key_bias, self.model.config.rope_theta)

    def _sampling_of(
        self, moment: Round, limits: Sequence[int], stop_ids: Sequence[int]
    ) -> Callable[[Sequence[int]], SamplingArrays]:
        """Gives the function that stacks how the agents of given indices sample."""
        sampling = moment.sampling
        keys = [agent_key(sampling.seed, moment.index, agent.agent) for agent in moment.agents]

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

    def _decode(
        self,
        state: DecodeState,
        tables: LaneTables,
        groups: GroupTables,
        slot: np.ndarray,
        sampling: SamplingArrays,
    ) -> np.ndarray:
        self._kv, tokens = self.programs.decode(self._kv, state, tables, groups, slot, sampling)
        return np.asarray(tokens)

    def _close(self, opened: OpenRound, written: Sequence[np.ndarray] | None) -> None:
        """Gives a round's pages back; after a failure, keeps nothing that may be half written."""
        self._policy.close(opened, written)
        self._recover()

    def _recover(self) -> None:
        """Starts over if a call that took the pool did not hand it back: an interrupt, say."""
        if self._kv.k.is_deleted() or self._kv.v.is_deleted():
            self._reset()


def _check_finite(x: np.ndarray, where: str, what: str) -> None:
    """Refuses [rows, columns] with numbers that are not finite."""
    broken = np.flatnonzero(~np.isfinite(x).all(axis=-1))
    if len(broken):
        raise NotFiniteError(
            where, what, f"row {broken[0]} of {len(x)} has NaN or infinite numbers"
        )
