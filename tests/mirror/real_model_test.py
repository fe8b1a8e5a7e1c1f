"""A round of the real model, encoded into mirrors and restored into pages."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import shared_data
from tokendance_jax.engine.ledger import distinct_tokens
from tokendance_jax.engine.prefill import Prefill
from tokendance_jax.engine.rounds import RoundEngine
from tokendance_jax.engine.runner import Runner
from tokendance_jax.kernels import storage
from tokendance_jax.mirror import (
    MirrorLayout,
    Quantised,
    decode_dense,
    decode_pages,
    encode,
    restore_mirrors,
    save_mirrors,
)
from tokendance_jax.mirror.layout import cut
from tokendance_jax.model import Model
from tokendance_jax.paged import PagePool
from tokendance_jax.paged.kv import KVSpec, PagedKV
from tokendance_jax.plan.lane import LanePlan
from tokendance_jax.policy.policies import PolicyOptions, make_policy
from tokendance_jax.policy.policy import Compute
from tokendance_jax.prompt import read_trace, tokenize_round
from tokendance_jax.prompt.preamble import DEFAULT_PREAMBLE
from tokendance_jax.study.quality import agreement
from tokendance_jax.study.scoring import logits

pytestmark = pytest.mark.real_model

AGENTS = 2
TOKENS = 32  # of each recorded answer


@dataclasses.dataclass(frozen=True)
class Live:
    """A round whose pages are in the pool."""

    model: Model
    engine: RoundEngine
    spec: KVSpec
    prompts: list
    answers: list
    lanes: list
    kv: PagedKV

    @property
    def page_size(self):
        return self.spec.page_size

    @property
    def lengths(self):
        return [len(prompt.token_ids) for prompt in self.prompts]


@pytest.fixture(scope="module")
def model():
    return Model.from_checkpoint(shared_data.real_checkpoint("bfloat16"), "bfloat16")


@pytest.fixture(
    scope="module",
    params=["bfloat16", pytest.param("float32", marks=pytest.mark.sweep)],
)
def live(model, request):
    precision = np.dtype(request.param)
    memory = (48 << 20) * precision.itemsize
    engine = RoundEngine(model, kv_memory=memory, kv_dtype=precision, row_budget=512)
    size = engine.shapes.page_size
    spec = model.kv_spec(pages=engine.shapes.pages, page_size=size, dtype=precision)
    trace = read_trace(shared_data.shared_dir() / "traces" / "ga-25-thin-a.jsonl.gz")
    round_ = trace.rounds[2]
    prompts = list(tokenize_round(round_, model.tokenizer, chat=False)[:AGENTS])
    answers = [
        np.array(model.tokenizer.encode_text(agent.recorded_output)[:TOKENS], np.int32)
        for agent in round_.agents[:AGENTS]
    ]
    policy = make_policy(
        "tokendance",
        PagePool(spec.pages),
        size,
        "test",
        options=PolicyOptions(selection="none", least_saving=None),
        preamble=np.array(model.tokenizer.encode_text(DEFAULT_PREAMBLE), np.int32),
    )
    opened = policy.open(prompts, [0] * AGENTS)
    runner = Runner(engine.programs, spec, poisoned(spec))
    Prefill(runner, opened.steps, seats=range(AGENTS)).run()
    yield Live(model, engine, spec, prompts, answers, opened.lanes, runner.kv)
    policy.close(opened, [prompt.token_ids for prompt in prompts])


def poisoned(spec):
    nan = storage.store(jnp.full((), jnp.nan), spec.storage)
    return jax.tree.map(lambda x: jnp.full_like(x, nan), spec.zeros())


def of_lane(lane, kv, tokens, page_size):
    """K and V of a lane's tokens, slot by slot from the pool."""
    slot, _ = lane.locate(np.arange(tokens, dtype=np.int32), page_size)
    layers, _, _, *head = kv.k.shape
    return [np.asarray(x).reshape(layers, -1, *head)[:, slot].tobytes() for x in (kv.k, kv.v)]


def test_a_round_at_rest_holds_shared_text_once_and_every_bit(live):
    spec, lanes, lengths, size = live.spec, live.lanes, live.lengths, live.page_size
    mirrors = encode(lanes, lengths, live.kv, identity=live.model.identity)

    whole = MirrorLayout.of_lanes(lanes, lengths).compression(
        page_size=size, page_bytes=spec.page_bytes
    )
    assert mirrors.nbytes == whole.stored_bytes
    dense = sum(-(-tokens // size) for tokens in lengths) * spec.page_bytes
    ceiling = sum(lengths) / distinct_tokens(live.prompts)
    print(f"dense / stored bytes {dense / mirrors.nbytes:.2f} of {ceiling:.2f}")
    assert dense == whole.dense_bytes
    assert dense / mirrors.nbytes >= 0.95 * ceiling

    pages = PagePool(spec.pages)
    pages.allocate(7)  # so that pages get other ids than before
    restored, back = decode_pages(mirrors, poisoned(spec), pages, identity=live.model.identity)
    for index, (lane, again, tokens) in enumerate(zip(lanes, back, lengths, strict=True)):
        held = of_lane(lane, live.kv, tokens, size)
        assert of_lane(again, restored, tokens, size) == held
        decoded = decode_dense(mirrors, index, rotate=False)
        assert [x.tobytes() for x in decoded] == held
        numbers = storage.load(jnp.asarray(decoded[1]))
        assert jnp.isfinite(numbers).all()
        assert jnp.abs(numbers).max() > 0
    assert (pages.live - 7) * spec.page_bytes == whole.stored_bytes - whole.index_bytes


def score(live, mirrors):
    """Logits of the recorded answers behind restored mirrors, or if None, behind the live pages."""
    spec, size = live.spec, live.page_size
    pages = PagePool(spec.pages)
    if mirrors is None:
        kv = jax.tree.map(jnp.copy, live.kv)
        lanes = [cut(lane, tokens) for lane, tokens in zip(live.lanes, live.lengths, strict=True)]
        pages.allocate(int(max(lane.page.max() for lane in lanes)))
    else:
        kv, lanes = decode_pages(mirrors, poisoned(spec), pages, identity=live.model.identity)
    longer = []
    for lane, answer in zip(lanes, live.answers, strict=True):
        room = pages.allocate(-(-len(answer) // size))
        zeros = np.zeros_like(room)
        columns = {"page": room, "frame": zeros, "first": zeros, "slots": zeros + size}
        columns |= {"base": zeros, "token_ids": answer}
        joined = {name: np.concatenate([getattr(lane, name), x]) for name, x in columns.items()}
        computed = np.arange(len(lane.token_ids), len(joined["token_ids"]), dtype=np.int32)
        longer.append(LanePlan(computed=computed, **joined))

    def steps():
        yield Compute(longer, list(range(AGENTS)))

    runner = Runner(live.engine.programs, spec, kv)
    prefill = Prefill(runner, steps(), seats=range(AGENTS), wanted=live.lengths)
    prefill.run()
    return [logits(live.engine, x) for x in prefill.streams()]


def rounded_as_they_lie(pages):
    """Rounds keys and values to int8 steps as the pool stores them: keys rotated and with bias."""

    def rounded(x):
        numbers = x.view(storage.value_dtype(x.dtype))
        scale = np.abs(numbers.astype(np.float32)).max(axis=-1, keepdims=True) / 127
        scale[scale == 0] = 1
        steps = np.round(numbers.astype(np.float32) / scale)
        return (steps * scale).astype(numbers.dtype).view(x.dtype)

    return dataclasses.replace(pages, k=rounded(pages.k), v=rounded(pages.v))


def test_a_continuation_behind_int8_pages_is_that_behind_the_live_pages(live, tmp_path):
    lanes, lengths, model = live.lanes, live.lengths, live.model
    form = Quantised(model.key_bias, model.config.rope)
    taken = partial(encode, lanes, lengths, live.kv, identity=model.identity)
    exact, int8 = taken(), taken(form=form)
    whole = MirrorLayout.of_lanes(lanes, lengths).compression(
        page_size=live.page_size, page_bytes=live.spec.page_bytes, form=form
    )
    assert int8.nbytes == whole.stored_bytes
    assert whole.form_ratio == exact.nbytes / int8.nbytes
    print(
        f"\nbytes: dense {whole.dense_bytes:,}, exact {exact.nbytes:,}, int8 {int8.nbytes:,}: "
        f"{whole.form_ratio:.3f} of the exact form, {whole.round_ratio:.2f} of dense, "
        f"{whole.mirror_ratio:.2f} of dense for each mirror"
    )
    assert whole.form_ratio > (1.85 if live.spec.storage.itemsize == 2 else 3.7)

    reference = score(live, None)
    save_mirrors(tmp_path / "int8", int8)
    forms = {
        "exact": exact,
        "int8": restore_mirrors(tmp_path / "int8"),
        "int8, key bias left on": taken(form=dataclasses.replace(form, key_bias=0 * form.key_bias)),
        "int8, keys as they lie": dataclasses.replace(
            exact,
            base=rounded_as_they_lie(exact.base),
            mirrors=tuple(
                dataclasses.replace(
                    mirror,
                    private=rounded_as_they_lie(mirror.private),
                    patch=rounded_as_they_lie(mirror.patch),
                )
                for mirror in exact.mirrors
            ),
        ),
    }
    found = {}
    for name, mirrors in forms.items():
        found[name] = agreement(reference, score(live, mirrors))
        print(f"{name}: {found[name]}")
    assert found["exact"].kl_mean == 0
    # Measured: 2.9e-4 nats with a bfloat16 pool and 1.7e-4 with a float32 pool. If keys keep their
    # bias, 4 and 5 times as much; if they are also rotated, 12 and 18 times.
    int8 = found["int8"]
    assert int8.kl_mean < 1e-3
    assert int8.top1 > 0.97
    assert found["int8, key bias left on"].kl_mean > 2 * int8.kl_mean
    assert found["int8, keys as they lie"].kl_mean > 5 * int8.kl_mean
