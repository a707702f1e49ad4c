"""Buffers that are counted without being made: those of a model that is loaded, chunk by chunk."""

import json

import jax
import jax.numpy as jnp
import pytest

from atd.errors import BadInput
from atd.models.model import load
from atd.models.random_model import SHAPES, named_graph, random_graph
from atd.runtime.memory import Memory, count, memory_table
from tests.models.tiny import tiny_graph


@pytest.mark.parametrize(
    "backend", ["xla", *(pytest.param(b, marks=pytest.mark.slow) for b in ("auto", "xla-unpacked"))]
)
def test_shapes_weigh_what_the_model_weighs(backend):
    graph = random_graph(SHAPES["tiny"] | {"num_hidden_layers": 1}, 2)
    shapes = load(graph, backend=backend, dtype="bfloat16", shapes=True)
    model = load(graph, backend=backend, dtype="bfloat16")
    assert shapes.weights_nbytes == model.weights_nbytes
    assert jax.tree.map(jnp.shape, shapes.units) == jax.tree.map(jnp.shape, model.units)


def test_caches_and_activations_are_counted():
    model = load(tiny_graph(layers=1), shapes=True)
    few, many = (count(model, 64, chunk) for chunk in (8, 64))
    heads, dim, hidden = 2, 8, 32
    assert few.cache == 64 * 2 * heads * dim * 4
    assert many.prefill > 2 * few.prefill
    assert few.step > 2 * hidden * 4  # the residual stream, twice
    assert few.total == few.weights + few.cache + max(few.prefill, few.step)
    for context, chunk, words in ((0, 8, "at least 1"), (129, 8, "beyond the 128 of the model")):
        with pytest.raises(BadInput, match=words):
            count(model, context, chunk)


def test_the_table_says_what_is_left():
    memory = Memory(3 * 10**9, 5 * 10**8, 10**8, 10**6)
    lines = [line.split() for line in memory_table(memory, 512, 4 * 10**9).splitlines()]
    assert lines[-1] == ["left", "0.400", "of", "4.000"]
    assert lines[-4][:3] == ["prefill", "0.100", "512"]
    last = memory_table(memory, 512, 3 * 10**9).splitlines()[-1]
    assert last.split() == ["left", "-0.600", "beyond", "3.000"]


def test_the_command_counts(atd, tmp_path):
    file = tmp_path / "memory.json"
    sizes = ("--random", "tiny", "--context", 64, "--kv", "int8", "--chunk", 16)
    code, out, err = atd("bench", *sizes, "--json", file, "--backend", "xla-unpacked")
    assert code == 0, err
    assert out.startswith("tiny, 64 tokens, float32, kv int8, cpu")
    figures = json.loads(file.read_text())
    assert figures["cache"] == 2 * 64 * 2 * 2 * (16 + 4)
    assert figures["total"] == figures["weights"] + figures["cache"] + figures["prefill"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("tny",), "no shapes of 'tny'; did you mean 'tiny'?"),
        (("tiny", "--context", 0), "--context must be at least 1, not 0"),
        (("tiny", "--context", 999), "beyond the 256 of the model"),
        (("tiny", "--context", 8, "--one-jit"), "--one-jit: not with --context"),
        (("tiny", "--context", 8, "--budget", "x"), "'x' is no size"),
    ],
)
def test_the_command_refuses(atd, options, words):
    code, _, err = atd("bench", "--random", *options)
    assert (code, words in err) == (2, True), err


@pytest.mark.slow
def test_llama_of_4k_tokens_fits_in_4_gb():
    """Keys and values of 32 blocks, 8 heads of 128 features and their scales, in 0.277 GB."""
    model = load(named_graph("llama3-8b"), dtype="bfloat16", kv="int8", shapes=True)
    memory = count(model, 4096, 512)
    assert memory.cache == 32 * 8 * 4096 * 2 * (128 + 4)
    assert memory.total < 4e9
