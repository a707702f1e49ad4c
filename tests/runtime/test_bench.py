"""`atd bench`: the speed of whole models; decoding in one jit writes what decoding step by step
writes.
"""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atd.decomposition.trellis_codes import known_code
from atd.errors import BadInput
from atd.kernels.matmul import PACKED
from atd.models.model import load
from atd.models.random_model import SHAPES, random_graph
from atd.progress import Progress
from atd.runtime import bench
from tests.models.tiny import tiny_graph


@pytest.fixture(scope="module")
def model():
    return load(tiny_graph(layers=1, tied=True))


def test_one_jit_decodes_what_steps_decode(model):
    prompt = np.array([[3, 1, 4, 1]], np.int32)
    _, cache, token = bench.prefill_seconds(model, prompt, 12)
    tokens, _ = bench.decode_steps(model, token, cache.blocks, cache.positions, 12, 4)
    _, cache, token = bench.prefill_seconds(model, prompt, 12)
    for step in range(4):
        logits, cache = model.decode(token, cache)
        token = logits.argmax(axis=-1)
        assert token == tokens[step]


def test_a_model_is_measured(model):
    heard = []
    (row,) = bench.measure(
        {"m": lambda: model}, prompt=4, steps=3, repeats=2, one_jit=False, progress=heard.append
    )
    assert row.weights_bytes == model.weights_nbytes
    assert row.decode_tokens_per_second == pytest.approx(1 / row.decode_seconds)
    assert row.prefill_tokens_per_second == pytest.approx(4 / row.first_token_seconds)
    assert row.host_seconds <= row.decode_seconds
    assert row.one_jit_tokens_per_second is None
    assert heard[0] == Progress("compiling", 0, 1, "models", "m")
    assert [now.done for now in heard if now.task == "measuring"] == [1, 2]
    twice = replace(row, model="twice", decode_tokens_per_second=2 * row.decode_tokens_per_second)
    table = bench.speed_table([row, twice], "m")
    assert table.splitlines()[-1].startswith("twice")
    assert " 2.00 " in table.splitlines()[-1]


def test_peaks_are_what_each_model_adds(model, monkeypatch):
    in_use_and_peak = iter([(10, 12), (40, 50), (40, 50), (90, 120), (90, 120), (95, 120)])
    monkeypatch.setattr(bench, "_memory", lambda: next(in_use_and_peak))
    loaders = {name: lambda: model for name in "abc"}
    rows = bench.measure(loaders, prompt=4, steps=3, repeats=1, one_jit=False)
    assert [row.peak_bytes for row in rows] == [40, 80, None]


@pytest.mark.parametrize(
    ("prompt", "steps", "says"), [(0, 3, "must be at least 1"), (120, 60, "takes 128 tokens")]
)
def test_what_cannot_be_measured(model, prompt, steps, says):
    with pytest.raises(BadInput, match=says):
        bench.measure({"m": lambda: model}, prompt=prompt, steps=steps, repeats=1, one_jit=False)


@pytest.mark.parametrize("name", SHAPES)
def test_random_models_have_the_shapes_of_real_ones(name):
    from atd.ir import verify

    shape = SHAPES[name]
    dense, packed = random_graph(shape), random_graph(shape, 2)
    verify(dense)
    verify(packed)
    weights = sum(np.prod(ref.type.shape) for _, ref in dense.weights())
    assert (
        weights
        == {
            "llama3-8b": 8030261248,
            "llama-3.2-1b": 1235814400,
            "smollm2-135m": 134515008,
            "tiny": 78144,
        }[name]
    )
    if name == "llama3-8b":
        assert sum(ref.type.nbytes for _, ref in packed.weights()) < 3.43e9


def test_random_models_run_packed_and_dense():
    shape = SHAPES["tiny"] | {"num_hidden_layers": 1}
    tokens = jnp.arange(6)[None]
    for graph, backend in ((random_graph(shape), "xla"), (random_graph(shape, 2), "xla")):
        logits = load(graph, backend=backend)(tokens)
        assert 0.1 < jnp.std(logits) < 10
    on_device = load(random_graph(shape), dtype="bfloat16")
    matrices = 2 * 128 * 64 + (64 * 128 + 64 * 64 + 3 * 64 * 96)
    assert on_device.weights_nbytes == pytest.approx(2 * matrices, rel=0.02)


@pytest.mark.parametrize("layout", ["aligned", "tiles"])
def test_random_models_of_trellis_codes(layout):
    graph = random_graph(SHAPES["tiny"], code=known_code(2, "default"), layout=layout)
    _, ref = next(graph.weights())
    assert str(ref.type).startswith("packed trellis n=2 segment=128")
    weight = ref.load()
    assert weight.type == ref.type
    assert jnp.std(weight.dequantize(jnp.float32)) == pytest.approx(64**-0.5, rel=0.1)


def test_the_command_compares_and_writes(atd, stories260k, tmp_path):
    file = tmp_path / "f.json"
    sizes = ("--prompt", 4, "--steps", 2, "--repeats", 1)
    code, out, err = atd("bench", stories260k, "--against", stories260k, *sizes, "--json", file)
    assert code == 0, err
    assert f"prompt 4, 2 tokens, float32, cpu, jax {jax.__version__}" in out
    assert f"{stories260k.name} (dense)" in out
    assert [row["model"] for row in json.loads(file.read_text())] == [
        stories260k.name,
        f"{stories260k.name} (dense)",
    ]


def test_the_command_refuses(atd):
    code, _, err = atd("bench")
    assert (code, err) == (
        2,
        "error: give a MODEL to measure, --random NAME or --tune, one of them\n",
    )
    if reason := PACKED["triton"].device_refuses():
        assert atd("bench", "--tune") == (
            2,
            "",
            f"error: there is nothing to tune here: {reason}\n",
        )
