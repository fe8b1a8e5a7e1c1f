"""Sequences that come and go: their tokens, their order, and the pages that they hold."""

import dataclasses
import functools

import numpy as np
import pytest

from tests.engine.rounds import POLICIES, block, gathering, member, small_engine
from tokendance_jax.engine.admission import QueueFull
from tokendance_jax.paged import OutOfPages
from tokendance_jax.policy.policies import PolicyOptions
from tokendance_jax.prompt import Round, Sampling, tokenize_round


def engine_of(policy="tokendance", **settings):
    """An engine that shares the small programs. Only settings without a shape may change."""
    return small_engine(policy, PolicyOptions(), **settings)


def until(engine, condition):
    """Steps until a condition holds; returns the events."""
    events = []
    while not condition():
        assert not engine.idle
        for event in engine.step():
            if event.sequence.error is not None:
                raise event.sequence.error
            events.append(event)
    return events


def decoding(engine):
    """Steps until the next decode call is made."""
    before = engine.counters.decode_calls
    return until(engine, lambda: engine.counters.decode_calls > before)


def finish(engine):
    """Steps until nothing is left; returns all events."""
    events = until(engine, lambda: engine.idle)
    assert engine.pool.live == 0
    engine.pool.check()
    return events


def tokens(handle):
    assert [some.status for some in handle.sequences] == ["finished"] * len(handle.sequences)
    return {some.prompt.agent: tuple(some.answer.chosen) for some in handle.sequences}


@functools.cache
def alone(round_, policy="tokendance"):
    """The tokens of a round that is served alone."""
    engine = engine_of(policy)
    handle = engine.add(round_, chat=False, reserve=True)
    finish(engine)
    return tokens(handle)


FIRST, SECOND = gathering("abc", index=0), gathering("def", index=1)


def longer(round_, limit):
    return dataclasses.replace(round_, max_new_tokens=limit)


def test_a_round_begins_while_another_one_decodes():
    engine = engine_of()
    first = engine.add(longer(FIRST, 30), chat=False)
    events = decoding(engine)
    second = engine.add(SECOND, chat=False)
    events += finish(engine)
    of = [event.sequence.handle for event in events]
    assert of.index(second) < len(of) - 1 - of[::-1].index(first)
    assert tokens(first) == alone(longer(FIRST, 30))
    assert tokens(second) == alone(SECOND)
    # Between two decode calls of the first round there is at most one prefill call of the second.
    assert engine.counters.prefill_calls > 6


def units(engine):
    """Steps until nothing is left; returns what each step did."""
    found = []
    while not engine.idle:
        before = engine.counters
        engine.step()
        done = engine.counters - before
        found.append("p" * done.prefill_calls + "d" * done.decode_calls)
    return "".join(found)


@pytest.mark.parametrize(("calls", "pattern"), [(1, "pdpd"), (2, "ppdppd"), (0, "pppp")])
def test_prefill_and_decode_calls_alternate(calls, pattern):
    engine = engine_of("dense", prefill_calls=calls)
    engine.add(longer(gathering("a"), 60), chat=False)
    decoding(engine)
    engine.add(SECOND, chat=False)
    assert units(engine).startswith(pattern)


def test_pages_are_free_as_soon_as_an_answer_has_ended():
    engine = engine_of("dense")
    short, long = (member(name, block("a"), max_new_tokens=n) for name, n in (("a", 4), ("b", 30)))
    handle = engine.add(Round((short, long)), chat=False)
    held = []
    while not engine.idle:
        engine.step()
        statuses = [some.status for some in handle.sequences]
        held.append((statuses, engine.counters.pages_held))
    before = max(pages for statuses, pages in held if statuses == ["running", "running"])
    after = {pages for statuses, pages in held if statuses == ["finished", "running"]}
    assert max(after) < before


def test_a_late_joiner_computes_its_own_tokens_alone():
    engine = engine_of()
    handle = engine.add(longer(FIRST, 30), chat=False)
    decoding(engine)
    newcomer = member("x", *(block(name) for name in "abc"), private=25)
    before = engine.counters
    late = engine.add(Round((newcomer,), max_new_tokens=6), chat=False, join=handle)
    until(engine, lambda: late.done)
    done = engine.counters - before
    (sequence,) = late.sequences
    own = len(sequence.prompt.token_ids) - 3 * 35
    head = 4 * engine.shapes.page_size
    assert done.base_tokens == 0
    assert done.computed_tokens <= own + head
    assert done.shared_tokens >= 3 * 35 - head
    finish(engine)
    assert tokens(handle) == alone(longer(FIRST, 30))
    # As if it had been there from the beginning.
    together = Round((*FIRST.agents, newcomer), max_new_tokens=6)
    assert tokens(late)["x"] == alone(together)["x"]


def test_a_late_joiner_without_patches_computes_nothing_shared():
    newcomer = member("x", *(block(name) for name in "abc"), private=25)
    options = PolicyOptions(selection="none")
    together = small_engine("tokendance", options)
    expected = together.add(Round((*FIRST.agents, newcomer), max_new_tokens=6), chat=False)
    finish(together)
    engine = small_engine("tokendance", options)
    handle = engine.add(longer(FIRST, 30), chat=False)
    decoding(engine)
    late = engine.add(Round((newcomer,), max_new_tokens=6), chat=False, join=handle)
    finish(engine)
    (sequence,) = late.sequences
    assert sequence.computed_tokens == len(sequence.prompt.token_ids) - 3 * 35
    assert tokens(late)["x"] == tokens(expected)["x"]


QUICK = ("tokendance", "epic")


@pytest.mark.parametrize(
    "policy", [p if p in QUICK else pytest.param(p, marks=pytest.mark.sweep) for p in POLICIES]
)
def test_a_stalled_sequence_goes_on_where_it_was(policy):
    name, options = policy.split()[0], PolicyOptions(**POLICIES[policy])
    engines = [small_engine(name, options, answer_room=4) for _ in range(2)]
    whole = longer(FIRST, 40)
    undisturbed = engines[0].add(whole, chat=False, reserve=True)
    finish(engines[0])

    engine = engines[1]
    handle = engine.add(whole, chat=False)
    decoding(engine)
    taken = engine.pool.allocate(engine.pool.free + engine.pool.evictable)
    statuses = set()
    while "stalled" not in statuses:
        engine.step()
        statuses = {some.status for some in handle.sequences}
    assert [some.status for some in handle.sequences] == ["running", "running", "stalled"]
    (youngest,) = [some for some in handle.sequences if some.status == "stalled"]
    own = youngest.lane.base == 0
    assert not youngest.lane.page[own].any()
    assert youngest.lane.page[~own].all()
    assert engine.counters.waiting == 1
    engine.pool.release(taken)
    finish(engine)
    assert engine.counters.stalled == 1
    assert tokens(handle) == tokens(undisturbed)


def test_answers_that_no_page_is_left_for_end_at_their_length():
    engine = engine_of("dense", answer_room=4)
    handle = engine.add(longer(gathering("a"), 200), chat=False)
    decoding(engine)
    taken = engine.pool.allocate(engine.pool.free + engine.pool.evictable)
    until(engine, lambda: engine.idle)
    (sequence,) = handle.sequences
    assert sequence.status == "finished"
    assert sequence.answer.finish_reason == "length"
    assert 1 < len(sequence.answer.chosen) < 200
    assert engine.pool.live == len(taken)


def test_the_queue_is_ordered_by_priority_then_by_arrival():
    engine = engine_of("dense")
    names = {"abc": 0, "d": 0, "e": 2, "f": 1, "g": 2}
    handles = {
        name: engine.add(gathering(name), chat=False, priority=priority, reserve=True)
        for name, priority in names.items()
    }
    started = []
    while not engine.idle:
        for event in engine.step():
            name = next(n for n, handle in handles.items() if handle is event.sequence.handle)
            if name not in started:
                started.append(name)
    # The first found an idle engine.
    assert started == ["abc", "e", "g", "f", "d"]


def test_a_full_queue_refuses_and_changes_nothing():
    engine = engine_of("dense", max_waiting=3)
    handles = [engine.add(gathering("abc"), chat=False), engine.add(gathering("de"), chat=False)]
    with pytest.raises(
        QueueFull,
        match=r"^2 requests wait, and at most 3 may: try again later, or raise max_waiting$",
    ):
        engine.add(gathering("fg"), chat=False)
    handles.append(engine.add(gathering("f"), chat=False))
    finish(engine)
    assert all(handle.done for handle in handles)
    assert engine.counters.added == engine.counters.finished == 6


@pytest.mark.parametrize("busy", [False, True])
def test_a_round_that_can_never_fit_is_refused_at_once_with_the_numbers(busy):
    engine = engine_of("dense")
    if busy:
        engine.add(longer(gathering("a"), 30), chat=False)
    large = longer(gathering("abcde"), 400)
    with pytest.raises(OutOfPages, match="KV pages requested, but of 96 only") as error:
        engine.add(large, chat=False, reserve=True)
    assert error.value.total == 96
    assert engine.counters.waiting == 0
    engine.add(large, chat=False, max_new_tokens=3)  # waits, but fits
    finish(engine)


def test_a_round_waits_until_the_pool_has_room():
    engine = engine_of("dense")
    first = engine.add(longer(gathering("abc"), 150), chat=False, reserve=True)
    second = engine.add(longer(gathering("def"), 150), chat=False, reserve=True)
    until(engine, lambda: second.opened)
    assert any(some.ended for some in first.sequences)
    finish(engine)
    assert tokens(second) == alone(longer(gathering("def"), 150), "dense")


@pytest.mark.parametrize("policy", ["tokendance", "epic"])
def test_several_answers_share_the_pages_of_their_prompt(policy):
    engine = engine_of(policy)
    whole = dataclasses.replace(gathering("ab"), sampling=Sampling(temperature=1.0, seed=5))
    handle = engine.add(whole, chat=False, answers=3, max_new_tokens=8)
    decoding(engine)
    lanes = [some.lane for some in handle.sequences[:3]]
    full = len(handle.sequences[0].prompt.token_ids) // engine.shapes.page_size
    for lane in lanes[1:]:
        np.testing.assert_array_equal(lane.page[:full], lanes[0].page[:full])
        assert lane.page[-1] != lanes[0].page[-1]
    finish(engine)
    answers = [tuple(some.answer.chosen) for some in handle.sequences]
    assert len(set(answers)) == 6
    # The first answer is the one that is given without the others.
    other = engine_of(policy)
    single = other.add(whole, chat=False, max_new_tokens=8)
    finish(other)
    assert [answers[0], answers[3]] == [tuple(some.answer.chosen) for some in single.sequences]


def test_draws_depend_on_seed_and_prompt_alone():
    sampling = Sampling(temperature=1.0, seed=3)
    engine = engine_of("prefix")
    prompts = tokenize_round(gathering("abc"), engine.model.tokenizer, chat=False)
    single = engine.add(prompts[1], sampling=sampling, max_new_tokens=9)
    finish(engine)
    engine = engine_of("prefix")
    engine.add(longer(SECOND, 20), chat=False)
    handles = [engine.add(prompt, sampling=sampling, max_new_tokens=9) for prompt in prompts]
    finish(engine)
    assert tokens(handles[1]) == tokens(single)
    other = engine.add(prompts[1], sampling=dataclasses.replace(sampling, seed=4), max_new_tokens=9)
    finish(engine)
    assert tokens(other) != tokens(single)


def test_each_agent_may_have_a_sampling_of_its_own():
    engine = engine_of("dense")
    a, b, c = gathering("abc").agents
    b = dataclasses.replace(b, sampling=Sampling(temperature=1.0, seed=1))
    c = dataclasses.replace(c, sampling=Sampling(logit_bias=((77, 100.0),), logprobs=2))
    handle = engine.add(Round((a, b, c), max_new_tokens=6), chat=False)
    events = finish(engine)
    expected = alone(gathering("abc"), "dense")
    found = tokens(handle)
    assert found["a"] == expected["a"]
    assert found["b"] != expected["b"]
    assert found["c"] == (77,) * 6
    for event in events:
        if event.sequence.prompt.agent == "c":
            assert event.logprobs.chosen <= event.logprobs.best[0][1] <= 0
            assert len(event.logprobs.best) == 2
        else:
            assert event.logprobs is None


def test_a_mask_may_change_with_every_token():
    engine = engine_of("dense")
    seen = []

    def mask(answer):
        seen.append(list(answer))
        allowed = np.zeros(engine.model.config.vocab_size, np.bool_)
        allowed[[50 + len(answer), 60 + len(answer)]] = True
        return allowed

    masked = engine.add(gathering("a"), chat=False, mask=mask)
    free = engine.add(gathering("b"), chat=False)
    finish(engine)
    (chosen,) = tokens(masked).values()
    assert all(token - index in (50, 60) for index, token in enumerate(chosen))
    assert seen == [list(chosen[:count]) for count in range(6)]
    assert tokens(free) == alone(gathering("b"), "dense")


def test_a_mask_that_fails_fails_its_sequence_alone():
    engine = engine_of("dense")
    vocab = engine.model.config.vocab_size

    def mask(answer):
        return np.full(vocab, len(answer) < 3)

    masked = engine.add(gathering("a"), chat=False, mask=mask)
    free = engine.add(gathering("b"), chat=False)
    while not engine.idle:
        engine.step()
    (sequence,) = masked.sequences
    assert sequence.status == "aborted"
    assert str(sequence.error) == "round 0: agent 'a': mask allows no token; allow one"
    assert len(sequence.answer.chosen) == 3
    assert tokens(free) == alone(gathering("b"), "dense")
    with pytest.raises(ZeroDivisionError):
        engine.add(gathering("a"), chat=False, mask=lambda answer: np.ones(1 // len(answer)))
    finish(engine)


def test_streams_of_two_handles_take_turns():
    engine = engine_of("prefix")
    handles = [engine.add(gathering(name), chat=False) for name in "ab"]
    streams = [engine.stream(handle) for handle in handles]
    texts = ["", ""]
    for _ in range(6):
        for index, stream in enumerate(streams):
            texts[index] += next(stream).text
    assert [next(stream, None) for stream in streams] == [None, None]
    assert texts == [handle.sequences[0].answer.text for handle in handles]
    finish(engine)


def test_held_pages_stay_until_they_are_released():
    engine = engine_of("dense")
    handle = engine.add(gathering("a"), chat=False, hold=True)
    until(engine, lambda: engine.idle)
    assert engine.counters.pages_held == len(handle.sequences[0].lane.page)
    engine.release(handle)
    engine.release(handle)
    finish(engine)


def test_counters_add_up():
    engine = engine_of()
    handles = [engine.add(round_, chat=False) for round_ in (FIRST, SECOND)]
    finish(engine)
    counters = engine.counters
    prompts = sum(len(s.prompt.token_ids) for handle in handles for s in handle.sequences)
    answers = sum(len(s.answer.chosen) for handle in handles for s in handle.sequences)
    read = counters.exact_tokens + counters.shared_tokens
    assert counters.prompt_tokens == prompts == read + counters.computed_tokens
    each = [s.computed_tokens for handle in handles for s in handle.sequences]
    assert counters.computed_tokens == sum(each)
    assert counters.prefill_rows == counters.computed_tokens + counters.base_tokens
    assert counters.decoded_tokens == answers
    assert counters.added == counters.finished == 6
    assert counters.waiting == counters.running == counters.pages_held == 0
    assert counters.pages_free + counters.pages_cached == engine.pool.total - 1
    parts = counters.prefill_s + counters.first_token_s + counters.decode_s
    assert 0 < counters.host_s < parts + counters.plan_s
    assert (counters - counters).steps == 0


def test_several_prompts_cannot_join():
    engine = engine_of()
    handle = engine.add(FIRST, chat=False)
    with pytest.raises(ValueError, match="join: a round lays bases of its own"):
        engine.add(SECOND, chat=False, join=handle)
    finish(engine)


def test_blocking_calls_share_an_engine_with_others():
    engine = engine_of()
    handle = engine.add(longer(FIRST, 30), chat=False)
    engine.step()
    result = engine.serve(SECOND, chat=False)
    assert {a.agent: a.token_ids for a in result.agents} == alone(SECOND)
    with pytest.raises(RuntimeError, match="sequences are being served"), engine.open([]):
        pass
    finish(engine)
    assert tokens(handle) == alone(longer(FIRST, 30))


def test_coming_and_going_compiles_nothing_in_steady_state():
    engine = engine_of()
    for _ in range(2):
        compiled = engine.programs.compile_s
        first = engine.add(longer(FIRST, 20), chat=False)
        decoding(engine)
        engine.add(SECOND, chat=False)
        newcomer = member("x", *(block(name) for name in "abc"), private=25)
        engine.add(Round((newcomer,), max_new_tokens=6), chat=False, join=first)
        finish(engine)
    assert engine.programs.compile_s == compiled
