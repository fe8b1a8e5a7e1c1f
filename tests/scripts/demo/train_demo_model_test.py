"""Training the demo model: data, gradients, steps, resuming, and the exported model."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scripts.demo.data import draw_batch
from scripts.demo.run import Run
from scripts.demo.training import Recipe, Stage, hits, initial_parameters, logits_of, product
from tokendance_jax.demo import demo_chat_template, demo_tokenizer_json
from tokendance_jax.demo.town import probe_round
from tokendance_jax.engine.rounds import RoundEngine
from tokendance_jax.kernels.rope import Rope
from tokendance_jax.model import load_model
from tokendance_jax.models.families.qwen2 import QWEN2
from tokendance_jax.models.product import matmul
from tokendance_jax.prompt import Tokenizer, tokenize_round

ROOT = Path(__file__).resolve().parents[3]
TOKENIZER = Tokenizer(demo_tokenizer_json(), demo_chat_template())
CONFIG = QWEN2.config(
    vocab_size=1024,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    max_position_embeddings=4096,
    rope=Rope(1e6),
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
)
RECIPE = Recipe(
    steps=24,
    learning_rate=1e-2,
    warmup=4,
    weight_decay=0.1,
    text_weight=0.2,
    dtype="float32",
    seed=0,
    stages=(Stage(0.5, 384, 1, 2), Stage(0.5, 384, 1, 3)),
)


def batch(seed=0, length=512):
    return draw_batch(
        TOKENIZER,
        (seed,),
        rows=2,
        length=length,
        agents=(2, 4),
        text_weight=0.1,
        questions=(2, 4),
    )


def test_rows_are_conversations_as_the_template_writes_them():
    drawn = batch()
    again, other = batch(), batch(1)
    assert (drawn.token == again.token).all()
    assert (drawn.token != other.token).any()
    for row in range(2):
        text = TOKENIZER.decode(drawn.token[row].tolist())
        first = text.split("<|endoftext|>")[0]
        turns = first.split("<|im_start|>")[1:]
        roles = [turn.split("\n")[0] for turn in turns]
        assert roles[:3] == ["system", "user", "assistant"]
        assert set(roles[1::2]) == {"user"}
        assert all(turn.endswith("<|im_end|>\n") for turn in turns[:-1])
        starts = np.flatnonzero(np.diff(drawn.conversation[row])) + 1
        assert (drawn.token[row][starts - 1] == TOKENIZER.encode_markup("<|endoftext|>")[0]).all()


def test_answers_are_marked_to_their_end():
    drawn = batch()
    (stop,) = TOKENIZER.encode_markup("<|im_end|>")
    for number, kind in enumerate(drawn.kinds):
        marked = drawn.answer == number
        ids = drawn.token[marked]
        assert (drawn.weight[marked] == 1.0).all()
        assert ids[-1] == stop
        text = TOKENIZER.decode(ids[:-1].tolist())
        assert text.startswith("Then" if kind in ("repeat", "tell") else "So")
    assert np.isclose(drawn.weight[drawn.weight != 1.0], 0.1).all()


def test_drills_ask_for_what_was_said_before():
    drawn = draw_batch(TOKENIZER, (0,), rows=12, length=256, agents=(2, 0), text_weight=0.1)
    assert not drawn.kinds
    for token, weight in zip(drawn.token.tolist(), drawn.weight, strict=True):
        asked = np.flatnonzero(weight).tolist()
        right = 0
        for at in asked:
            # The longest suffix that occurred before predicts the next token.
            lengths = [
                next(
                    n
                    for n in range(at + 1)
                    if n == before or token[before - 1 - n] != token[at - 1 - n]
                )
                for before in range(1, at)
            ]
            best = max(lengths)
            follows = {token[i + 1] for i, n in enumerate(lengths) if n == best}
            right += token[at] in follows
        # Where an echo starts over, nothing predicts its first tokens.
        assert right > 0.9 * len(asked) > 0


def test_what_training_starts_from_looks_things_up():
    drawn = draw_batch(TOKENIZER, (0,), rows=4, length=256, agents=(2, 0), text_weight=0.1)
    config = dataclasses.replace(
        CONFIG, hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64
    )
    params = initial_parameters(dataclasses.replace(config, num_hidden_layers=3), 0)
    found = hits(
        params,
        *(jnp.asarray(drawn.token), jnp.asarray(drawn.conversation)),
        config=dataclasses.replace(config, num_hidden_layers=3),
        dtype="float32",
    )
    asked = drawn.weight[:, 1:] == 1.0
    assert np.asarray(found)[asked].mean() > 0.3


def test_answers_are_right_where_all_of_their_tokens_are():
    drawn = batch()
    hit = np.ones((2, 512), bool)
    assert all(right == total for right, total in drawn.correct(hit).values())
    row, column = np.argwhere(drawn.answer[:, 1:] == 0)[1]
    hit[row, column] = False
    counts = drawn.correct(hit)
    assert {kind for kind, (right, total) in counts.items() if right < total} == {drawn.kinds[0]}


def test_gradients_of_products():
    generator = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(generator.standard_normal(shape, np.float32))

    def gradients(f, *arguments):
        return jax.grad(lambda *a: jnp.sum(f(*a) ** 2), argnums=(0, 1))(*arguments)

    def close(found, expected, atol):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(np.asarray(one, np.float32), other, atol=atol)

    x, weight = draw(5, 8), draw(6, 8)
    expected = gradients(lambda x, w: x @ w.T, x, weight)
    close(gradients(matmul, x, weight), expected, 1e-4)
    # In bfloat16 the gradients are rounded like their inputs.
    found = gradients(matmul, x, weight.astype(jnp.bfloat16))
    assert [array.dtype for array in found] == [jnp.float32, jnp.bfloat16]
    close(found, expected, 1.0)
    q, k, spec = draw(2, 3, 2, 2, 4), draw(2, 5, 2, 4), "bqkgh,bskh->bkgqs"
    expected = gradients(lambda q, k: jnp.einsum(spec, q, k), q, k)
    close(gradients(lambda q, k: product(spec, q, k), q, k), expected, 1e-4)


def test_conversations_of_a_row_do_not_see_each_other():
    params = initial_parameters(CONFIG, 0)
    token = jnp.asarray(batch(length=128).token[:1, :100])
    apart = jnp.asarray([[0] * 60 + [1] * 40], jnp.int32)
    changed = token.at[0, :60].set(7)
    one, other = (
        logits_of(CONFIG, params, ids, apart, dtype="float32") for ids in (token, changed)
    )
    np.testing.assert_allclose(one[0, 60:], other[0, 60:], atol=1e-5)
    alone = logits_of(CONFIG, params, token[:, 60:], apart[:, 60:], dtype="float32")
    np.testing.assert_allclose(one[0, 60:], alone[0], atol=1e-3)


@pytest.mark.slow
def test_trains_resumes_to_the_bit_and_serves(tmp_path):
    def train(name, *, until=None):
        run = Run(tmp_path / name, CONFIG, RECIPE, demo_tokenizer_json())
        (tmp_path / name).mkdir(exist_ok=True)
        with jax.numpy_dtype_promotion("standard"):  # optax counts in int32
            return run, run.train(save_minutes=60, eval_steps=12, until=until)

    run, whole = train("whole")
    train("parts", until=10)
    _, parts = train("parts")
    assert whole.keys() == parts.keys()
    for path, array in whole.items():
        assert (array == parts[path]).all(), path
    logs = []
    for name in ("whole", "parts"):
        entries = map(json.loads, (tmp_path / name / "loss.jsonl").read_text().splitlines())
        logs.append([(entry["step"], entry["answers"], entry["text"]) for entry in entries])
    assert logs[0] == logs[1]
    assert [step for step, _, _ in logs[0]] == [10, 20, 24]
    assert 0 < logs[0][-1][1] < logs[0][0][1] - 0.5

    model = load_model(run.export(whole), dtype="float32")
    assert model.config == CONFIG
    engine = RoundEngine(model, policy="dense", kv_memory=32 << 20)
    round_, _ = probe_round(0, 2)
    result = engine.serve(round_)
    rounded = {
        path: array.astype(jnp.bfloat16).astype(jnp.float32) for path, array in whole.items()
    }
    (stop,) = TOKENIZER.encode_markup("<|im_end|>")
    prompts = tokenize_round(round_, model.tokenizer, chat=True)
    for prompt, answer in zip(prompts, result.agents, strict=True):
        ids = jnp.asarray(prompt.token_ids)[None]
        logits = logits_of(CONFIG, rounded, ids, jnp.zeros_like(ids), dtype="float32")
        assert int(jnp.argmax(logits[0, -1])) == (*answer.token_ids, stop)[0]


@pytest.mark.slow
def test_the_script(tmp_path):
    command = [
        *(sys.executable, "-m", "scripts.demo.train_demo_model", f"--out={tmp_path / 'run'}"),
        *("--steps=4", "--warmup=1", "--layers=1", "--inner=64", "--draws=1"),
        *("--stage=1.0:128:2:2", "--dtype=float32", "--setting=5 agents"),
    ]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    for extra, status in (([], 0), ([], 0), (["--noresume"], 1)):
        done = subprocess.run(
            [*command, *extra], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == status, done.stderr
    assert "holds a run" in done.stderr
    found = json.loads((tmp_path / "run" / "probes.json").read_text())
    (row,) = found["policies"]
    assert row["setting"] == "5 agents"
    assert set(row["probes"]) == {"retrieve", "combine", "recall", "abstain", "repeat"}
    files = {file.name for file in (tmp_path / "run" / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= files
