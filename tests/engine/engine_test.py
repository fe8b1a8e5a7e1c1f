import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.engine.rounds import SMALL, agent, gathering, small_engine, three, tiny
from tokendance_jax import host
from tokendance_jax.demo import harbour_trace
from tokendance_jax.engine import programs as device
from tokendance_jax.engine.rounds import RoundEngine
from tokendance_jax.paged import OutOfPages
from tokendance_jax.paged.kv import KVSpec
from tokendance_jax.policy.policies import PolicyOptions
from tokendance_jax.prompt import AgentPrompt, PromptError, Round, Segment
from tokendance_jax.prompt.tokenized import tokenize_round
from tokendance_jax.study.scoring import score

# One size of calls, so that every program is compiled once.
SIZES: dict[str, Any] = {"kv_memory": 8 << 20, "row_budget": 64}


@pytest.fixture(scope="module")
def programs(small_model):
    """The programs that all engines of this module with `SIZES` share."""
    return RoundEngine(small_model, **SIZES).programs


@pytest.fixture
def engine(small_model, programs):
    engine = RoundEngine(small_model, policy="prefix", **SIZES, programs=programs)
    yield engine
    assert engine.pool.live == 0
    engine.pool.check()


@pytest.fixture
def dense(small_model, programs):
    return RoundEngine(small_model, policy="dense", **SIZES, programs=programs)


@pytest.mark.sweep
def test_engines_of_other_pool_precisions_may_share_programs():
    engine = small_engine("dense", PolicyOptions())
    # As many pages of half the bytes.
    sizes = {"kv_memory": SMALL["kv_memory"] // 2, "kv_dtype": "bfloat16"}
    other = small_engine("dense", PolicyOptions(), **sizes)
    assert other.runner.kv.k.dtype != engine.runner.kv.k.dtype
    expected = ids(engine.serve(gathering("a"), chat=False))
    assert ids(other.serve(gathering("a"), chat=False)).keys() == expected.keys()
    assert ids(engine.serve(gathering("a"), chat=False)) == expected


def ids(result):
    return {a.agent: a.token_ids for a in result.agents}


def poison(engine):
    """Fills the whole pool with NaN."""
    engine.runner.kv = jax.tree.map(lambda a: jnp.full(a.shape, jnp.nan, a.dtype), engine.runner.kv)


def test_policies_give_the_same_tokens_over_rounds(engine, dense):
    poison(engine)
    poison(dense)
    for prefix, full in zip(engine.run(harbour_trace()), dense.run(harbour_trace()), strict=True):
        assert ids(prefix) == ids(full)
        assert full.ledger.reused_tokens == 0
        lengths = [agent.ledger.prompt_tokens for agent in full.agents]
        assert full.ledger.attended == sum(n * (n + 1) // 2 for n in lengths)
        assert (prefix.ledger.attended < full.ledger.attended) == (prefix.index > 0)
        assert (prefix.ledger.reused_tokens > 0) == (prefix.index > 0)


def test_the_same_round_twice_and_in_another_order_gives_the_same_tokens(engine):
    round_ = three(temperature=0.8, top_k=40, top_p=0.95, seed=3)
    first = ids(engine.serve(round_))
    assert ids(engine.serve(round_)) == first
    turned = dataclasses.replace(round_, agents=round_.agents[::-1])
    assert ids(engine.serve(turned)) == first
    assert len(set(first.values())) == 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_do_not_depend_on_the_other_agents(engine, temperature):
    round_ = three(temperature=temperature, seed=1)
    together = ids(engine.serve(round_))
    for prompt in round_.agents:
        alone = dataclasses.replace(round_, agents=(prompt,))
        assert ids(engine.serve(alone)) == {prompt.agent: together[prompt.agent]}


def test_seed_and_round_change_the_draws(engine):
    round_ = three(temperature=1.5, seed=1)
    first = ids(engine.serve(round_))
    assert ids(engine.serve(three(temperature=1.5, seed=2))) != first
    assert ids(engine.serve(dataclasses.replace(round_, index=1))) != first


def test_chunks_of_a_round_give_the_tokens_of_one_call(small_model, dense):
    smaller: dict[str, Any] = SIZES | {"row_budget": 32}
    small = RoundEngine(small_model, policy="prefix", **smaller)
    round_ = three()
    result = small.serve(round_)
    assert result.ledger.computed_tokens > 4 * 32
    assert ids(result) == ids(dense.serve(round_))


def test_page_size_does_not_change_tokens(small_model, dense):
    wide = RoundEngine(small_model, policy="prefix", **SIZES, page_size=32)
    assert ids(wide.serve(three())) == ids(dense.serve(three()))


def test_agents_of_a_round_share_the_prefix_they_have_in_common(engine):
    prompts = tuple(
        AgentPrompt(
            name,
            (
                Segment("system", "town", text="A small harbour town, rain since Monday. " * 8),
                Segment("task", f"task/{name}", text=f"{name}, what do you do?\n"),
            ),
        )
        for name in ("Edda", "Tomas")
    )
    result = engine.serve(Round(prompts, max_new_tokens=4))
    first, second = (a.ledger for a in result.agents)
    assert first.reused_tokens == 0
    assert second.reused_tokens >= 16
    assert result.ledger.kv_bytes_held < result.ledger.kv_bytes_dense
    alone = engine.serve(Round(prompts[1:], max_new_tokens=4))
    assert alone.agents[0].token_ids == result.agents[1].token_ids


def test_ledger_adds_up(engine):
    engine.serve(three())
    result = engine.serve(three())
    ledger = result.ledger
    assert sum(ledger.tokens.values()) == ledger.prompt_tokens
    assert ledger.computed_tokens + ledger.reused_tokens == ledger.prompt_tokens
    shared = ledger.tokens["shared"]
    assert ledger.distinct_tokens == ledger.prompt_tokens - shared + shared // 3
    held = sum(a.ledger.kv_bytes_held for a in result.agents)
    assert held == pytest.approx(ledger.kv_bytes_held)
    for a in result.agents:
        written = a.ledger.prompt_tokens + a.ledger.decoded_tokens - 1
        assert a.ledger.kv_bytes_dense == -(-written // 16) * engine.page_bytes
        assert a.ledger.computed_tokens <= 16  # all full pages but the last token's are reused


def test_full_pages_of_answers_are_reused(engine):
    tokenizer = engine.model.tokenizer
    round_ = Round((agent("Edda", limit=40),))
    answer = engine.serve(round_, chat=False).agents[0]
    said = tuple(tokenizer.encode_text("".join(s.text or "" for s in round_.agents[0].segments)))
    followed = AgentPrompt(
        "Edda", (Segment("task", "t", token_ids=(*said, *answer.token_ids, 5, 6)),)
    )
    result = engine.serve(Round((followed,), max_new_tokens=1), chat=False)
    assert result.ledger.reused_tokens == (len(said) + 39) // 16 * 16


@pytest.mark.sweep
def test_steady_state_traces_nothing(small_model):
    engine = RoundEngine(small_model, **SIZES, max_agents=4)
    assert engine.warm_up(agents=4, tokens=200) > 0
    names = ("Edda", "Tomas", "Ines", "Oskar")

    def round_(index):
        agents = tuple(
            agent(name, persona="You wait. " * (3 + 5 * index + 2 * place))
            for place, name in enumerate(names[: 4 - index % 2])
        )
        return Round(agents, max_new_tokens=9 + index, index=index)

    before = engine.programs.compile_s
    with jax.no_tracing(True):
        for index in range(3):
            assert engine.serve(round_(index)).timings.compile_s == 0
    assert engine.programs.compile_s == before


@pytest.mark.parametrize("bounds", [{"agents": 9, "tokens": 100}, {"agents": 1, "tokens": 10**6}])
def test_warm_up_beyond_the_engines_sizes_is_refused(small_model, bounds):
    engine = RoundEngine(small_model, **SIZES, max_agents=4)
    with pytest.raises(ValueError, match="budget"):
        engine.warm_up(**bounds)


def test_callback_gets_every_token_in_order(engine):
    heard = {"Edda": [], "Tomas": [], "Ines": []}
    result = engine.serve(three(), on_token=lambda name, token, _: heard[name].append(token))
    assert {name: tuple(tokens) for name, tokens in heard.items()} == ids(result)


def test_an_answer_ends_at_a_stop_token(engine):
    round_ = three()
    free = engine.serve(round_).agents[0]
    stop = free.token_ids[4]
    first = free.token_ids.index(stop)
    cut = dataclasses.replace(
        round_, sampling=dataclasses.replace(round_.sampling, stop_token_ids=(stop,))
    )
    result = engine.serve(cut).agents[0]
    assert result.token_ids == free.token_ids[:first]
    assert result.finish_reason == "stop"
    assert result.ledger.decoded_tokens == first + 1
    assert free.finish_reason == "length"


def test_ignore_eos_ignores_the_models_stop_tokens_only(engine, monkeypatch):
    free = engine.serve(three()).agents[0]
    stop, later = free.token_ids[4], free.token_ids[-1]
    monkeypatch.setattr(engine.model.tokenizer, "stop_ids", (stop,))
    first = free.token_ids.index(stop)
    assert engine.serve(three()).agents[0].token_ids == free.token_ids[:first]
    ignoring = engine.serve(three(ignore_eos=True)).agents[0]
    assert (ignoring.token_ids, ignoring.finish_reason) == (free.token_ids, "length")
    ended = engine.serve(three(ignore_eos=True, stop_token_ids=(later,))).agents[0]
    assert ended.token_ids == free.token_ids[: free.token_ids.index(later)]


def test_min_p_of_one_is_greedy(engine):
    assert ids(engine.serve(three(temperature=3.0, min_p=1))) == ids(engine.serve(three()))


def test_an_answer_ends_before_a_stop_string(engine):
    round_ = three()
    free = engine.serve(round_).agents[0]
    stop = free.text[len(free.text) // 2 :][:3]
    cut = dataclasses.replace(round_, sampling=dataclasses.replace(round_.sampling, stop=(stop,)))
    result = engine.serve(cut).agents[0]
    assert result.text == free.text[: free.text.index(stop)]
    assert result.finish_reason == "stop"


def test_limits_of_agents(engine):
    round_ = Round((agent("Edda", limit=1), agent("Tomas", limit=20)), max_new_tokens=5)
    result = engine.serve(round_)
    assert [len(a.token_ids) for a in result.agents] == [1, 20]


def test_live_rounds_quote_the_agents_own_answers(engine):
    trace = harbour_trace()
    replayed = list(engine.run(trace, replay=True))
    live = list(engine.run(trace, replay=False, chat=False))
    assert ids(live[0]) == ids(replayed[0])
    assert ids(live[1]) != ids(replayed[1])
    assert live[1].ledger.tokens["history"] == replayed[1].ledger.tokens["history"]


def test_chat_markup_is_the_default_of_live_rounds(engine):
    trace = dataclasses.replace(harbour_trace(), rounds=harbour_trace().rounds[:1])
    (live,) = engine.run(trace, replay=False)
    (replayed,) = engine.run(trace)
    assert live.ledger.tokens["markup"] > 0
    assert replayed.ledger.tokens["markup"] == 0
    round_ = trace.rounds[0]
    assert ids(engine.serve(round_)) == ids(live)
    assert ids(engine.serve(round_, chat=False)) == ids(replayed)


class Broken(Exception):
    pass


def test_an_error_in_the_callback_loses_nothing(engine):
    expected = ids(engine.serve(three()))
    before = engine.pool.free + engine.pool.evictable
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 20:
            raise Broken

    with pytest.raises(Broken):
        engine.serve(three(), on_token=fail)
    assert engine.pool.live == 0
    assert engine.pool.free + engine.pool.evictable == before
    assert ids(engine.serve(three())) == expected


def test_a_failed_prefill_leaves_no_unwritten_page_in_the_cache(engine, monkeypatch):
    poison(engine)

    call = engine.programs.call

    def fail(program, *arguments):
        if program is device.prefill:
            raise Broken
        return call(program, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(engine.programs, "call", fail)
        with pytest.raises(Broken):
            engine.serve(three())
    result = engine.serve(three())
    assert result.ledger.reused_tokens == 0


def test_the_engine_survives_a_call_that_kept_the_pool(engine, monkeypatch):
    expected = ids(engine.serve(three()))

    call = engine.programs.call

    def swallow(program, kv, *arguments):
        if program is not device.decode:
            return call(program, kv, *arguments)
        kv.k.delete()
        kv.v.delete()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.programs, "call", swallow)
        with pytest.raises(KeyboardInterrupt):
            engine.serve(three())
    result = engine.serve(three())
    assert ids(result) == expected
    assert result.ledger.reused_tokens == 0


def test_a_round_that_does_not_fit_the_pool_is_refused_whole(small_model, dense):
    engine = RoundEngine(small_model, **SIZES | {"kv_memory": 40 * dense.page_bytes})
    free = engine.pool.free
    with pytest.raises(OutOfPages, match="kv_memory"):
        engine.serve(dataclasses.replace(three(), max_new_tokens=500))
    assert engine.pool.free == free
    assert engine.pool.live == engine.pool.evictable == 0


def test_a_prompt_longer_than_the_context_is_refused(engine):
    ids_ = (5,) * engine.model.config.max_position_embeddings
    prompt = AgentPrompt("Edda", (Segment("task", "t", token_ids=ids_),))
    with pytest.raises(PromptError, match=r"Edda.*context"):
        engine.serve(Round((prompt,)))


def test_all_rounds_of_a_trace_are_checked_before_the_first(engine):
    long = (5,) * engine.model.config.max_position_embeddings
    late = AgentPrompt("Edda", (Segment("task", "t", token_ids=long),))
    served = []
    trace = harbour_trace()
    rounds = (*trace.rounds[:2], dataclasses.replace(trace.rounds[2], agents=(late,)))
    with pytest.raises(PromptError, match="round 2: agent 'Edda': the prompt has 8192 tokens"):
        served += engine.run(dataclasses.replace(trace, rounds=rounds))
    blocks = (Segment("shared", "out/r1/Nobody", text="Who am I?\n"), *late.segments)
    unclear = dataclasses.replace(
        trace.rounds[2], agents=(dataclasses.replace(late, segments=blocks),)
    )
    rounds = (*trace.rounds[:2], unclear)
    with pytest.raises(PromptError, match="round 2: shared segment 'out/r1/Nobody'"):
        served += engine.run(dataclasses.replace(trace, rounds=rounds), replay=False)
    assert not served


def test_too_many_stop_tokens_are_refused_before_the_prefill(engine, monkeypatch):
    monkeypatch.setattr(engine, "prefill", None)
    round_ = three(stop_token_ids=tuple(range(17)))
    with pytest.raises(ValueError, match=r"stop_token_ids: .* at most 16"):
        engine.serve(round_)


def test_an_answer_to_follow_beyond_the_context_is_refused(engine):
    prompts = tokenize_round(three(), engine.model.tokenizer, chat=False)
    answers = [np.full(engine.model.config.max_position_embeddings, 5, np.int32)] * len(prompts)
    with pytest.raises(PromptError, match=r"Edda.*context"):
        score(engine, prompts, answers)


def test_a_token_outside_of_the_vocabulary_is_refused(engine):
    prompt = AgentPrompt("Edda", (Segment("task", "t", token_ids=(1 << 20,)),))
    with pytest.raises(PromptError, match="token"):
        engine.serve(Round((prompt,)))


def test_more_agents_than_lanes_are_refused(small_model):
    engine = RoundEngine(small_model, **SIZES, max_agents=2)
    with pytest.raises(PromptError, match="max_agents"):
        engine.serve(three())


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("kv_memory", 1000),
        ("kv_memory", 1 << 60),
        ("page_size", 24),
        ("page_size", 0),
        ("row_budget", 0),
        ("max_agents", 0),
        ("decode_steps", 0),
        ("policy", "magic"),
    ],
)
def test_bad_arguments_are_named(small_model, argument, value):
    with pytest.raises(ValueError, match=argument):
        RoundEngine(small_model, **SIZES | {argument: value})


def test_a_pool_that_the_device_cannot_hold_is_named(small_model, monkeypatch):
    def full(spec):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.")

    monkeypatch.setattr(KVSpec, "zeros", full)
    with pytest.raises(
        ValueError, match=r"kv_memory: a pool of 0\.0 GiB .* not have that much left; give"
    ):
        RoundEngine(small_model, **SIZES)


def test_an_automatic_pool_of_the_same_size_serves_the_same_tokens(small_model, dense, monkeypatch):
    monkeypatch.setattr(host, "free_memory", lambda: 2 * SIZES["kv_memory"])
    sizes = SIZES | {"kv_memory": "auto", "memory_fraction": 0.5}
    engine = RoundEngine(small_model, policy="dense", **sizes, programs=dense.programs)
    assert engine.shapes.pages == SIZES["kv_memory"] // engine.page_bytes
    assert ids(engine.serve(three())) == ids(dense.serve(three()))


def test_a_context_that_ends_ends_the_answer(small_model):
    config = dataclasses.replace(small_model.config, max_position_embeddings=64)
    engine = RoundEngine(dataclasses.replace(small_model, config=config), **SIZES)
    prompt = AgentPrompt("Edda", (Segment("task", "t", token_ids=tuple(range(2, 62))),))
    result = engine.serve(Round((prompt,), max_new_tokens=100), chat=False)
    assert len(result.agents[0].token_ids) == 4
    assert result.agents[0].finish_reason == "length"
    assert np.isfinite(result.timings.decode_s)


def test_compilation_is_in_the_timings_only_when_asked_for():
    def timings(cold):
        engine = RoundEngine(tiny(), **SMALL | {"max_agents": 1, "cold": cold})
        return engine.serve(gathering("a"), chat=False).timings

    warm, cold = timings(False), timings(True)
    assert warm.compile_s > 0
    assert warm.prefill_s + warm.decode_s < cold.prefill_s + cold.decode_s
    assert cold.prefill_s + cold.decode_s + cold.first_token_s > cold.compile_s
