import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from tests.models.decoder import tiny
from tokendance_jax.engine import programs as device
from tokendance_jax.engine.compiling import Programs
from tokendance_jax.engine.programs import DecodeState
from tokendance_jax.engine.sampling import LaneSampling, sampling_arrays
from tokendance_jax.kernels.lanes import Rows
from tokendance_jax.kernels.rope import Rope, Yarn
from tokendance_jax.models.decoder.model import abstract_parameters, state_from_parameters
from tokendance_jax.models.decoder.parameters import parameter_shapes
from tokendance_jax.models.decoder.random import random_parameters
from tokendance_jax.plan.groups import group_tables
from tokendance_jax.plan.lane import LanePlan
from tokendance_jax.plan.round_plan import pack
from tokendance_jax.prompt.round import Sampling

PAGE_SIZE = 16
TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@pytest.fixture(scope="module")
def served():
    """An untied float32 model and its programs, compiled once."""
    model = tiny.tiny_model()
    return SimpleNamespace(model=model, programs=Programs(model, tiny.tiny_shapes(64)))


def contiguous(token_ids, *, first_page, room=0):
    pages = np.arange(-(-(len(token_ids) + room) // PAGE_SIZE), dtype=np.int32) + first_page
    return LanePlan.contiguous(token_ids, pages, computed_from=0, page_size=PAGE_SIZE)


def leaves(state):
    """Returns the arrays of a state by path."""
    paths, _ = jax.tree.flatten_with_path(state)
    return {
        ".".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path): leaf
        for path, leaf in paths
    }


def parameters(state):
    return {path.removesuffix(".value"): leaf for path, leaf in leaves(state).items()}


@TIED
@DTYPES
def test_state_has_the_parameters_of_the_published_files(tied, dtype):
    config = tiny.tiny_model(tie_word_embeddings=tied).config
    _, state = abstract_parameters(config, dtype)
    found = parameters(state)
    assert {path: leaf.shape for path, leaf in found.items()} == parameter_shapes(config)
    for path, leaf in found.items():
        assert leaf.dtype == (jnp.dtype(dtype) if len(leaf.shape) == 2 else jnp.float32), path


def test_parameters_are_taken_without_a_copy_and_by_name():
    config = tiny.tiny_model().config
    params = random_parameters(config, jnp.float32)
    _, state = state_from_parameters(config, params, jnp.float32)
    assert all(leaf is params[path] for path, leaf in parameters(state).items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.weight": None}, r"paths differ from the model's: \['norm.weight'\]"),
        ({"extra": np.zeros(1)}, r"paths differ from the model's: \['extra'\]"),
        ({"norm.weight": np.zeros(3, np.float32)}, r"norm.weight is float32\[3\].*float32\[64\]"),
        ({"norm.weight": np.zeros(64, np.float16)}, "norm.weight is float16"),
    ],
)
def test_wrong_parameters_are_named(change, message):
    config = tiny.tiny_model().config
    params = random_parameters(config, jnp.float32) | change
    params = {path: jnp.asarray(x) for path, x in params.items() if x is not None}
    with pytest.raises(ValueError, match=message):
        state_from_parameters(config, params, jnp.float32)


def textbook(config, params, token_ids):
    """Computes the last token's logits with a plain float64 transformer over one dense sequence."""
    p = {path: np.asarray(x).astype(np.float64) for path, x in params.items()}
    heads, kv_heads, width = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    count = len(token_ids)
    # Frequencies are tested by themselves.
    turn = np.arange(count)[:, None] * config.rope.frequencies(width)
    turn = np.exp(1j * turn)[:, None, :]
    if config.rope.yarn is not None:
        turn *= 0.1 * np.log(config.rope.yarn.factor) + 1  # of queries and of keys

    def norm(x, weight):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config.rms_norm_eps) * weight

    def rotate(x):
        z = (x[..., : width // 2] + 1j * x[..., width // 2 :]) * turn
        return np.concatenate([z.real, z.imag], axis=-1)

    x = p["embed_tokens.weight"][token_ids]
    for index in range(config.num_hidden_layers):
        w = {
            path.removeprefix(f"layers.{index}."): array
            for path, array in p.items()
            if path.startswith(f"layers.{index}.")
        }
        y = norm(x, w["input_layernorm.weight"])
        q, k, v = (
            (y @ w[f"self_attn.{n}_proj.weight"].T + w.get(f"self_attn.{n}_proj.bias", 0)).reshape(
                count, -1, width
            )
            for n in "qkv"
        )
        if config.qk_norm:
            q, k = norm(q, w["self_attn.q_norm.weight"]), norm(k, w["self_attn.k_norm.weight"])
        q, k, v = rotate(q), *(np.repeat(a, heads // kv_heads, axis=1) for a in (rotate(k), v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(width)
        scores = np.where(np.tril(np.ones((count, count), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        attended = np.einsum("hqk,khd->qhd", weights, v).reshape(count, -1)
        x = x + attended @ w["self_attn.o_proj.weight"].T
        y = norm(x, w["post_attention_layernorm.weight"])
        gate = y @ w["mlp.gate_proj.weight"].T
        inner = gate / (1 + np.exp(-gate)) * (y @ w["mlp.up_proj.weight"].T)
        x = x + inner @ w["mlp.down_proj.weight"].T
    output = p.get("lm_head.weight", p["embed_tokens.weight"])
    return norm(x[-1], p["norm.weight"]) @ output.T


@pytest.mark.parametrize(
    ("change", "dtype", "error"),
    [
        ({}, "float32", 1e-5),
        ({"tie_word_embeddings": True}, "float32", 1e-5),
        ({"rope": Rope(1e4, Yarn(4.0, 16))}, "float32", 1e-5),
        (tiny.QWEN3, "float32", 1e-5),
        ({}, "bfloat16", 3e-2),
    ],
)
def test_logits_are_those_of_a_float64_transformer(change, dtype, error):
    # bfloat16 rounds the inputs of every product, keys and values by 2**-9, which adds up to about
    # 1 % in the logits.
    model = tiny.tiny_model(dtype, **change)
    programs = Programs(model, tiny.tiny_shapes(64))
    prompts = [tiny.tokens(29, seed=1), tiny.tokens(35, seed=2)]
    lanes = [contiguous(prompts[0], first_page=1), contiguous(prompts[1], first_page=9)]
    runner, hidden = tiny.prefill(programs, lanes)
    logits = runner.run(device.logits, hidden)
    for row, prompt in zip(logits, prompts, strict=False):
        expected = textbook(model.config, parameters(model.state), prompt)
        np.testing.assert_allclose(row, expected, rtol=0, atol=error * np.abs(expected).max())


def test_layer_0_depends_on_the_token_alone(served):
    # The second lane computes the same tokens behind five others, in frame 5.
    common = tiny.tokens(27)
    alone = contiguous(common, first_page=1)
    token_ids = np.concatenate([tiny.tokens(5, seed=1), common])
    behind = LanePlan(
        token_ids=token_ids,
        computed=np.arange(len(token_ids), dtype=np.int32),
        page=np.array([10, 11, 12], np.int32),
        frame=np.array([0, 5, 5], np.int32),
        first=np.zeros(3, np.int32),
        slots=np.array([5, 16, 11], np.int32),
        base=np.zeros(3, np.int32),
    )
    runner, _ = tiny.prefill(served.programs, [alone, behind])

    def rows(pool, layer, lane, start):
        position = np.arange(start, start + len(common), dtype=np.int32)
        slot, canonical = lane.locate(position, PAGE_SIZE)
        np.testing.assert_array_equal(canonical, np.arange(len(common)))
        return np.asarray(pool[layer]).reshape(-1, *pool.shape[3:])[slot]

    for pool in (runner.kv.k, runner.kv.v):
        np.testing.assert_array_equal(rows(pool, 0, alone, 0), rows(pool, 0, behind, 5))
        assert np.abs(rows(pool, 1, alone, 0) - rows(pool, 1, behind, 5)).max() > 0.1


def decode_arguments(programs, lanes, steps, *, temperature=0.0):
    """Returns state, tables, groups, slots and sampling of lanes whose first answer token is 7."""
    shapes = programs.shapes
    seats = shapes.lanes.fit(len(lanes))
    position, live = np.zeros(seats, np.int32), np.zeros(seats, np.bool_)
    slot = np.full((seats, steps), shapes.no_slot, np.int32)
    for seat, lane in enumerate(lanes):
        position[seat], live[seat] = len(lane.token_ids), True
        ahead = position[seat] + np.arange(steps, dtype=np.int32)
        slot[seat], _ = lane.locate(ahead, PAGE_SIZE)
    state = DecodeState(np.full(seats, 7, np.int32), position, live, live.astype(np.int32))
    settings = [
        LaneSampling(Sampling(temperature=temperature), np.array([1, index], np.uint32), 100)
        for index in range(len(lanes))
    ]
    sampling = sampling_arrays(seats, settings)
    groups, tables = group_tables(lanes, shapes)
    return state, tables, groups, slot, sampling


def test_the_same_round_twice_gives_the_same_bits(served):
    lanes = [
        contiguous(tiny.tokens(75), first_page=1, room=8),
        contiguous(tiny.tokens(30, seed=1), first_page=11, room=8),
    ]
    runs = []
    for _ in range(2):
        runner, hidden = tiny.prefill(served.programs, lanes)
        logits = np.asarray(runner.run(device.logits, hidden))
        arguments = decode_arguments(served.programs, lanes, 8, temperature=1.0)
        tokens = runner.run(device.decode, *arguments)
        kv = runner.kv
        assert (np.asarray(tokens)[:2] >= 0).all()
        runs.append([np.asarray(x).tobytes() for x in (kv.k, kv.v, logits, tokens)])
    assert runs[0] == runs[1]


def test_decode_continues_as_prefill_would(served):
    prompt, programs = tiny.tokens(30), served.programs
    lane = contiguous(prompt, first_page=1, room=8)
    runner, _ = tiny.prefill(programs, [lane])
    tokens = runner.run(device.decode, *decode_arguments(programs, [lane], 8))
    generated = np.asarray(tokens)[0]
    # A prefill of the same tokens yields the same greedy tokens and the same K and V.
    whole = np.concatenate([prompt, [7], generated[:-1]]).astype(np.int32)
    for end in range(len(prompt) + 1, len(whole) + 1):
        _, hidden = tiny.prefill(programs, [contiguous(whole[:end], first_page=1, room=8)])
        found = runner.run(device.logits, hidden)[0]
        assert int(np.argmax(found)) == generated[end - len(prompt) - 1]
    dense, _ = tiny.prefill(programs, [contiguous(whole, first_page=1)])
    for one, other in zip((runner.kv.k, runner.kv.v), (dense.kv.k, dense.kv.v), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=0, atol=1e-4)


@DTYPES
@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_programs_work_in_the_donated_pool(program, dtype):
    """Temporaries stay below a tenth of the pool, which is large compared with the batch."""
    model = tiny.tiny_model(dtype)
    size = 128 << 20
    pages = size // model.kv_spec(pages=1, page_size=PAGE_SIZE).page_bytes
    programs = Programs(model, dataclasses.replace(tiny.tiny_shapes(64), pages=pages))
    shapes, kv = programs.shapes, model.kv_spec(pages=pages, page_size=PAGE_SIZE).abstract()
    lane = contiguous(tiny.tokens(40), first_page=1, room=8)
    if program == "prefill":
        hidden = jax.ShapeDtypeStruct((4, model.config.hidden_size), jnp.float32)
        arguments = hidden, pack([lane], shapes)[0]
        donated = size + 4 * 4 * model.config.hidden_size
    else:
        arguments = decode_arguments(programs, [lane], 8)
        donated = size
    lowered = programs.lower(getattr(device, program), kv, *arguments)
    needs = lowered.compile().memory_analysis()
    assert needs is not None
    assert needs.alias_size_in_bytes == donated
    assert needs.temp_size_in_bytes < size / 10


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_rolled_layers_give_the_bits_of_unrolled_ones(dtype):
    model, shapes = tiny.tiny_model(dtype), tiny.tiny_shapes(64)
    lanes = [
        contiguous(tiny.tokens(75), first_page=1, room=8),
        contiguous(tiny.tokens(30, seed=1), first_page=11, room=8),
    ]
    runs = []
    for rolled in (True, False):
        programs = Programs(model, shapes)
        assert programs.build.rolled  # tests run on a CPU
        programs.build = dataclasses.replace(programs.build, rolled=rolled)
        runner, hidden = tiny.prefill(programs, lanes)
        prefilled = [np.asarray(x).tobytes() for x in (runner.kv.k, runner.kv.v, hidden)]
        tokens = runner.run(device.decode, *decode_arguments(programs, lanes, 8))
        kv = runner.kv
        runs.append([*prefilled, *(np.asarray(x).tobytes() for x in (kv.k, kv.v, tokens))])
    assert runs[0] == runs[1]


@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_attention_is_compiled_once_for_all_layers(program):
    def loops(layers):
        config = dataclasses.replace(tiny.tiny_model().config, num_hidden_layers=layers)
        graph, state = abstract_parameters(config, jnp.float32)
        model = dataclasses.replace(tiny.tiny_model(), config=config, graph=graph, state=state)
        programs = Programs(model, tiny.tiny_shapes(64))
        lane = contiguous(tiny.tokens(40), first_page=1, room=8)
        if program == "prefill":
            hidden = jax.ShapeDtypeStruct((4, config.hidden_size), jnp.float32)
            arguments = hidden, pack([lane], programs.shapes)[0]
        else:
            arguments = decode_arguments(programs, [lane], 8)
        kv = model.kv_spec(pages=programs.shapes.pages, page_size=PAGE_SIZE).abstract()
        lowered = programs.lower(getattr(device, program), kv, *arguments)
        return lowered.as_text().count("stablehlo.while")

    assert loops(2) == loops(5) > 2


def test_no_layers_leave_the_embeddings(served):
    model = nnx.merge(served.model.graph, served.model.state)
    kv = served.model.kv_spec(pages=1, page_size=PAGE_SIZE).zeros()
    token = jnp.asarray(tiny.tokens(3))
    rows = Rows(token, *[jnp.zeros_like(token)] * 3)
    x, _ = model.hidden(rows, kv, lambda q, kv, layer: q, layers=range(0), rolled=True)
    np.testing.assert_array_equal(x, model.embed_tokens(token))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_random_parameters_are_a_function_of_the_seed(dtype):
    config = tiny.tiny_model().config
    first, again = random_parameters(config, dtype), random_parameters(config, dtype)
    other = random_parameters(config, dtype, seed=1)
    for path, array in first.items():
        bits = np.asarray(array).tobytes()
        assert np.asarray(again[path]).tobytes() == bits
        assert array.ndim == 1 or array.dtype == dtype
        if not path.endswith("norm.weight"):
            assert np.asarray(other[path]).tobytes() != bits
    rounded = {path: np.asarray(x).astype(ml_dtypes.bfloat16) for path, x in first.items()}
    coarse = random_parameters(config, jnp.bfloat16)
    assert all((rounded[p] == np.asarray(x)).all() for p, x in coarse.items() if x.ndim == 2)
