"""The engine: serves sequences step by step from one model and one page pool."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from tokendance_jax.engine.clock import Clock
from tokendance_jax.engine.compiling import Programs
from tokendance_jax.engine.config import EngineConfig, sizes
from tokendance_jax.engine.counters import Counters
from tokendance_jax.engine.executor import Executor
from tokendance_jax.engine.outputs import Outputs
from tokendance_jax.engine.requests import add_answers, check_number, requests_of
from tokendance_jax.engine.runner import Runner
from tokendance_jax.engine.scheduler import Scheduler, Unit
from tokendance_jax.engine.sequence import Event, Handle, Mask
from tokendance_jax.model import Model
from tokendance_jax.paged.page_pool import PagePool
from tokendance_jax.plan.shapes import Shapes
from tokendance_jax.policy.policies import make_policy
from tokendance_jax.policy.policy import Policy, pages_for
from tokendance_jax.prompt.round import Round, Sampling
from tokendance_jax.prompt.tokenized import TokenizedPrompt


class Engine:
    """Serves sequences: `add` them, call `step` until they are done, and read their events.

    Sequences come and go at any time. Those that are added together, as a round, share what their
    prompts have in common. Each step makes one call on the device: of a prefill, or of the decode
    of all running sequences. Once the programs of a bucket shape are compiled, nothing is traced.

    An engine is not thread-safe: one thread adds, steps and aborts.

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
        spec, shapes = sizes(model, config)
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
        self._arrivals = itertools.count()
        self._executor = Executor(self.runner, decode_steps=config.decode_steps)
        self._scheduler = Scheduler(
            self._executor.counts,
            slots=shapes.lanes.budget,
            decode_steps=config.decode_steps,
            prefill_calls=config.prefill_calls,
            max_waiting=config.max_waiting,
        )
        self._outputs = Outputs(self._scheduler, self._executor.counts)
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
    def idle(self) -> bool:
        """Whether every sequence has ended."""
        return self._scheduler.idle

    @property
    def counters(self) -> Counters:
        """A snapshot of what the engine has done so far."""
        scheduler, pool = self._scheduler, self.pool
        prefilling = len(scheduler.prefilling.sequences) if scheduler.prefilling else 0
        return dataclasses.replace(
            self._executor.counts,
            waiting=sum(len(admission.sequences) for admission in scheduler.waiting),
            running=len(scheduler.running) + prefilling,
            pages_free=pool.free,
            pages_cached=pool.evictable,
            pages_held=pool.live,
        )

    def add(
        self,
        request: Round | TokenizedPrompt,
        *,
        chat: bool | None = None,
        sampling: Sampling | None = None,
        max_new_tokens: int | None = None,
        answers: int = 1,
        mask: Mask | None = None,
        priority: int = 0,
        join: Handle | None = None,
        reserve: bool = False,
        hold: bool = False,
    ) -> Handle:
        """Adds a round, or a single sequence. Nothing is computed yet.

        Args:
          request: a round, whose prompts share what they have in common; or one prompt as token
            ids.
          chat: whether to wrap a round's segments in the model's chat markup; None: if the model
            has a template.
          sampling: how answers are sampled; None: as the round says, or greedily.
          max_new_tokens: limit for the answers; None: as the round says, or the model's context.
          answers: number of answers to each prompt. They share the pages of the prompt.
          mask: called before each token with the answer so far; returns which tokens may come next.
          priority: higher priorities are admitted first and stalled last.
          join: the handle of an earlier round. The prompt reads that round's bases, and computes
            only what they do not hold.
          reserve: whether to take the pages of the longest answers at once. Otherwise pages are
            taken as answers grow; if none is left, a sequence may be stalled for a while.
          hold: whether the sequences keep their pages when they end, until `release`.

        Returns:
          The handle of the new sequences.

        Raises:
          PromptError: a prompt cannot be served, or there are more sequences than `max_agents`.
          ValueError: there are too many stop tokens, a biased token is not in the vocabulary, or
            several prompts join a round.
          QueueFull: too many sequences wait.
          OutOfPages: the pool could not hold the sequences even if it were empty.
        """
        handle = Handle(
            Clock(self.programs, cold=self.config.cold),
            priority=priority,
            arrival=next(self._arrivals),
            answer_room=None if reserve else self.config.answer_room,
            hold=hold,
            joins=join,
        )
        requests = requests_of(
            self.model,
            request,
            chat=chat,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
        )
        if join and len(requests) > 1:
            raise ValueError("join: a round lays bases of its own; let its agents join one by one")
        check_number(requests, answers=answers, lanes=self.shapes.lanes.budget)
        for one in requests:
            add_answers(handle, one, self.model, answers=answers, mask=mask)
        idle = self.idle
        if not idle:
            self._check_fits(handle)
        self._scheduler.add(handle)
        if idle:
            self._scheduler.admit()
            for event in self._outputs.drained():
                assert event.sequence.error is not None
                raise event.sequence.error
        self._executor.counts.added += len(handle.sequences)
        return handle

    def step(self) -> list[Event]:
        """Makes one call on the device, and returns what happened.

        If the call fails, its sequences are aborted with the error. If it lost the pool's arrays,
        so are all sequences that hold pages, and the engine goes on with an empty pool.
        """
        scheduler, clock = self._scheduler, Clock(self.programs, cold=False)
        waited = self.runner.waited_s
        unit, events = scheduler.step(), self._outputs.drained()
        try:
            if unit == "prefill":
                assert scheduler.prefilling is not None
                chosen = self._executor.prefill(scheduler.prefilling, clock)
                if chosen is not None:
                    scheduler.prefilled()
                    events += self._outputs.take(chosen)
            elif unit == "decode":
                events += self._outputs.take(self._executor.decode(scheduler.running, clock))
        except BaseException as error:
            events += self._failed(unit, error)
            if not isinstance(error, Exception):
                raise
        finally:
            for event in events:
                event.sequence.handle.events.append(event)
        counts = self._executor.counts
        counts.steps += unit is not None
        counts.host_s += clock.total() - (self.runner.waited_s - waited)
        return events

    def stream(self, handle: Handle) -> Iterator[Event]:
        """Yields the events of a handle until all its sequences have ended, and steps as needed."""
        while True:
            while handle.events:
                yield handle.events.popleft()
            if handle.done:
                return
            self.step()

    def abort(self, handle: Handle) -> None:
        """Ends all sequences of a handle, and releases their pages."""
        for sequence in handle.sequences:
            if not sequence.ended:
                sequence.status = "aborted"
                self._executor.counts.aborted += 1
                self._scheduler.release(sequence, keep=True)
        self.release(handle)

    def release(self, handle: Handle) -> None:
        """Releases the pages that ended sequences of a handle hold; see `add`."""
        for sequence in handle.sequences:
            if sequence.ended:
                self._scheduler.release(sequence, keep=True)

    def _start(self) -> None:
        """Makes the policy and the reference counts of an empty pool."""
        self.pool = PagePool(self.shapes.pages)
        self._policy = self._new_policy(self.pool)
        self._scheduler.reset(self._policy, self.pool)
        self._executor.reset()

    def _new_policy(self, pool: PagePool) -> Policy:
        model, config = self.model, self.config
        return make_policy(
            config.policy,
            pool,
            self.shapes.page_size,
            f"{model.name}/{model.config}/{self.runner.spec.storage}/{model.dtype}",
            options=config.options,
            preamble=self._preamble,
            context=model.config.max_position_embeddings,
            salt=config.salt,
        )

    def _check_fits(self, handle: Handle) -> None:
        """Refuses what an empty pool could not hold."""
        size = self.shapes.page_size
        own = [some for some in handle.sequences if some.copies is None]
        prompts, rooms = [some.prompt for some in own], [some.room for some in own]
        tokens = zip(prompts, rooms, strict=True)
        if sum(pages_for(len(p.token_ids) + room, size) for p, room in tokens) >= self.pool.total:
            empty = self._new_policy(PagePool(self.pool.total))
            empty.open(prompts, rooms, [some.remaining for some in own])

    def _failed(self, unit: Unit | None, error: BaseException) -> list[Event]:
        """Aborts the sequences of a call that failed, and recovers a pool that it lost."""
        scheduler = self._scheduler
        admission = scheduler.prefilling if unit == "prefill" else None
        failed = list(admission.sequences if admission else scheduler.running)
        if self.runner.lost:
            failed = scheduler.holders()
            for sequence in list(scheduler.held):
                scheduler.release(sequence, keep=False)
        events = [self._outputs.end(sequence, "", error=error) for sequence in failed]
        self._recover()
        return events

    def _recover(self) -> None:
        """Starts over with an empty pool if a call lost the donated pool (see `Runner.lost`)."""
        if self.runner.lost:
            self.runner.reset()
            self._start()
