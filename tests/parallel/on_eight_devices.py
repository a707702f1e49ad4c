"""Models on meshes of eight devices, run by `test_devices.py` in a process that has them.

By hand with XLA_FLAGS=--xla_force_host_platform_device_count=8.
"""

import math
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from atd.errors import BadInput
from atd.ir import Graph
from atd.models.cache import Cache
from atd.models.model import Model, load
from atd.models.random_model import random_graph
from atd.parallel.devices import DATA, MODEL, make_mesh
from atd.runtime.evaluate import evaluate
from atd.runtime.generate import generate

D, F, V, LAYERS = 64, 128, 128, 1
CONFIG = {
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
FIGURES = ("perplexity", "against_perplexity", "kl_mean", "kl_median", "kl_99", "top1_agreement")
MESHES = ((1, 8), (2, 4), (8, 1))
PROMPTS = [[3 * i + 7 * j + 1 for j in range(5)] for i in range(8)]


def mesh_of(data: int, model: int) -> Mesh:
    return Mesh(np.asarray(jax.devices()[: data * model]).reshape(data, model), (DATA, MODEL))


def packed() -> Graph:
    return random_graph(CONFIG, 2, layout="aligned")


def read(model: Model) -> tuple[np.ndarray, list[list[int]]]:
    """Logits [8, V] behind the prompts, and greedy texts."""
    logits, _ = model.prefill(np.asarray(PROMPTS), model.new_cache(8, 16))
    return np.asarray(logits), generate(model, PROMPTS, max_new_tokens=4)


@pytest.fixture(scope="module", autouse=True)
def kernels_of_the_outer_process(own_cache):
    """Compiling the kernels of backend cpu takes longer than all else here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATD_CACHE", os.environ.get("ATD_OUTER_CACHE", os.environ["ATD_CACHE"]))
        yield


@pytest.fixture(scope="module")
def one() -> tuple[np.ndarray, list[list[int]]]:
    return read(load(packed()))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_logits_and_texts_are_those_of_one_device(mesh, one):
    logits, texts = read(load(packed(), mesh=mesh_of(*mesh)))
    np.testing.assert_allclose(logits, one[0], rtol=0, atol=2e-5 * np.abs(one[0]).max())
    assert texts == one[1]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("backend", ["xla", "xla-unpacked", "triton-interpret"])
def test_every_backend_runs_on_every_mesh(backend, mesh, one):
    logits, texts = read(load(packed(), backend=backend, mesh=mesh_of(*mesh)))
    close = 0.02 if backend.startswith("triton") else 2e-5  # which rounds activations to 16 bits
    np.testing.assert_allclose(logits, one[0], rtol=0, atol=close * np.abs(one[0]).max())
    assert texts == one[1]


@pytest.mark.slow
def test_a_conversation_goes_on_in_a_longer_cache():
    model, alone = (load(packed(), mesh=m) for m in (mesh_of(1, 2), None))
    found = []
    for each in (model, alone):
        _, cache = each.prefill(np.asarray(PROMPTS[:1]), each.new_cache(1, 8))
        logits, _ = each.prefill(np.asarray([[1, 2]]), cache.back_to(4).longer(32))
        found.append(np.asarray(logits))
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=2e-5 * np.abs(found[1]).max())


def exchanged(text: str) -> list[tuple[str, int]]:
    """(op, bytes of its result) of what devices exchange in a compiled program."""
    found = re.findall(r"= (\w+)\[([\d,]*)\]\S* (all-reduce|all-gather|all-to-all)\(", text)
    size = {"f32": 4, "bf16": 2, "s32": 4}
    return [
        (op, size[dtype] * math.prod(int(n) for n in dims.split(",") if n))
        for dtype, dims, op in found
    ]


def test_bytes_exchanged_for_a_token_are_those_of_the_formula():
    graph = packed()
    graph = graph.with_units((graph.prologue, *graph.blocks * 2, graph.epilogue))
    model = load(graph, mesh=mesh_of(1, 4))
    cache = model.new_cache(1, 16)

    def step(model, token, positions, blocks):
        return model.decode(token, Cache(blocks, positions, 0, 16))[0]

    token = jnp.zeros(1, jnp.int32)
    lowered = jax.jit(step).lower(model, token, cache.positions, cache.blocks)
    found = exchanged(lowered.compile().as_text() or "")
    sums = 2 * len(graph.blocks) + 1  # of o and down, and of the embedding
    assert sum(size for op, size in found if op == "all-reduce") == 4 * D * sums
    assert [size for op, size in found if op == "all-gather"] == [4 * V]


@pytest.mark.parametrize("mesh", [(8, 1), pytest.param((2, 4), marks=pytest.mark.slow)], ids=str)
def test_evaluation_is_that_of_one_device(mesh):
    tokens = np.random.default_rng(0).integers(0, V, 32 * 19)

    def figures(mesh: Mesh | None):
        model, dense = (
            load(packed(), mesh=mesh),
            load(random_graph(CONFIG), mesh=mesh),
        )
        found = evaluate(model, tokens, context=32, against=dense, batch=2, positions=24).to_json()
        return [found[name] for name in FIGURES]

    alone, many = figures(None), figures(mesh_of(*mesh))
    if mesh[1] == 1:  # each device does what one does alone
        assert many == alone
    else:
        np.testing.assert_allclose(many, alone, rtol=1e-5)


def test_more_devices_than_there_are_is_refused():
    mesh = make_mesh(4, 8)
    assert mesh is not None
    assert mesh.shape == {DATA: 2, MODEL: 4}
    with pytest.raises(BadInput, match="16 devices were asked for, and this process has 8"):
        make_mesh(16)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("stories15M", 2), ("SmolLM2", 3)])
def test_greedy_texts_of_real_models(name, count, request):
    found: Path = request.getfixturevalue("smollm2" if name == "SmolLM2" else "stories15m")
    prompt = [[1, 403, 407, 261, 378]]
    one = generate(load(found), prompt, max_new_tokens=24)
    assert generate(load(found, mesh=mesh_of(1, count)), prompt, max_new_tokens=24) == one
