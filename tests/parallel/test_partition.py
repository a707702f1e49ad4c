"""Partitions: what each of several devices runs, and what cannot be cut.

Devices are the places of a vmapped axis here, on which `psum` and `all_gather` do what they do
between devices; so these tests need one device.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atd.errors import BadInput
from atd.ir import Block, Graph, InvalidGraph, Node, verify
from atd.models import execute, frontend
from atd.models.random_model import SHAPES, random_graph
from atd.parallel.cuts import shares
from atd.parallel.partition import partition
from atd.passes.fold_norms import FoldNorms
from atd.passes.fuse import Fuse
from atd.passes.rotate import Rotate
from atd.pipeline import Pipeline
from tests.golden.write_gguf import GOLDEN
from tests.models.tiny import tiny_graph


def stacked(ref, cut, count: int):
    """A weight of a device per place of the first axis; all the same where it is not cut."""
    whole = ref.load()
    parts = [whole] * count if cut is None else shares(whole, cut, count)
    return jax.tree.map(lambda *a: jnp.stack(list(map(jnp.asarray, a))), *parts)


def logits(graph: Graph, tokens, count: int) -> np.ndarray:
    """Logits [B, T, V] of the model on `count` devices."""
    cut = partition(graph, count, "model")
    x, embedding = jnp.asarray(tokens), None
    for unit, local, cuts in zip(graph.units, cut.graph.units, cut.cuts, strict=True):
        weights = {
            node.name: {
                slot: stacked(ref, cuts.get(node.name), count) for slot, ref in node.weights.items()
            }
            for node in unit.nodes
        }
        if embedding is None:
            embedding = weights["embed_tokens"]["weight"]

        @jax.jit
        @partial(jax.vmap, in_axes=(0, None, 0), axis_name="model", axis_size=count)
        def run(weights, x, embedding, local=local):
            return execute.output(local, weights, x, embedding=embedding)

        every = run(weights, x, embedding)
        x = every[0]
        np.testing.assert_array_equal(every, jnp.broadcast_to(x, every.shape))
    return np.asarray(x)


FAMILIES = (
    "llama_bias",
    "qwen3_tied",
    pytest.param("gemma3", marks=pytest.mark.slow),  # windows, norms behind o and down
    pytest.param("olmo2", marks=pytest.mark.slow),  # wide norms of q and k
    "bitnet_norms",  # activations rounded over all features, norms in front of o and down
)


def small(name: str) -> Graph:
    """The last layer of a model in tests/golden, between its embedding and its head."""
    graph = frontend.open(GOLDEN / name)
    return replace(graph, blocks=graph.blocks[-1:])


@pytest.mark.parametrize("name", FAMILIES)
def test_devices_make_the_logits_of_one(name):
    graph = small(name)
    tokens = np.random.default_rng(0).integers(0, graph.vocabulary, (2, 6))
    one, two = logits(graph, tokens, 1), logits(graph, tokens, 2)
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-5 * np.abs(one).max())


def test_joined_and_rotated_matrices_are_cut_part_by_part():
    graph = Pipeline([FoldNorms(), Rotate(r3=True), Fuse()])(small("llama_gqa"))
    local = {node.name: node for node in partition(graph, 2, "model").graph.blocks[0].nodes}
    assert local["mlp.hadamard"].inputs == ("mlp.hadamard.all_gather",)
    assert local["mlp.down_proj"].inputs == ("mlp.hadamard.share",)
    tokens = np.arange(12).reshape(2, 6)
    one, two = logits(graph, tokens, 1), logits(graph, tokens, 2)
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-5 * np.abs(one).max())


def test_the_text_of_a_device_shows_what_is_exchanged():
    graph = partition(tiny_graph(tied=True), 2, "model").graph
    assert str(graph.prologue) == (
        "  %embed_tokens = embed(%x) over=model {weight: dense f32[20,32]}\n"
        "  %embed_tokens.all_sum = all_sum(%embed_tokens) over=model"
    )
    lines = {node.name: str(node) for node in graph.blocks[0].nodes}
    assert lines["self_attn.q_proj"].endswith("{weight: dense f32[16,32]}")
    assert "heads=2 kv_heads=1" in lines["self_attn.attention"]
    assert lines["self_attn.o_proj"].endswith("{weight: dense f32[32,16]}")
    assert lines["self_attn.residual"].endswith("add(%x, %self_attn.o_proj.all_sum)")
    assert lines["mlp.down_proj.all_sum"] == (
        "%mlp.down_proj.all_sum = all_sum(%mlp.down_proj) over=model"
    )
    assert str(graph.epilogue.nodes[-1]) == "%lm_head.all_gather = all_gather(%lm_head) over=model"


def test_one_device_runs_the_graph_as_it_is():
    graph = tiny_graph()
    assert partition(graph, 1, "model").graph is graph


def test_a_graph_of_one_of_several_devices_is_in_no_file():
    with pytest.raises(InvalidGraph, match="'over' cannot be 'model'"):
        verify(partition(tiny_graph(), 2, "model").graph)


@pytest.mark.parametrize(
    ("config", "options", "count", "said"),
    [
        (
            SHAPES["smollm2-135m"],
            {},
            2,
            "9 query heads, 3 KV heads: cannot be cut for 2 devices; --tensor-parallel 1 or 3",
        ),
        (SHAPES["llama3-8b"], {"bases": 2}, 16, "8 KV heads: .* --tensor-parallel 1, 2, 4 or 8"),
        (
            SHAPES["tiny"] | {"intermediate_size": 80},
            {"bases": 2, "layout": "tiles"},
            2,
            "80 rows of mlp.gate_up_proj in units of 16: .*--tensor-parallel 1 would",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_those_that_do(config, options, count, said):
    with pytest.raises(BadInput, match=said):
        partition(random_graph(config, **options), count, "model")


def test_smollm2_is_cut_for_three():
    graph = partition(random_graph(SHAPES["smollm2-135m"], bases=2), 3, "model").graph
    types = {n.name: str(n.weights["weight"].type) for n in graph.blocks[0].nodes if n.weights}
    assert types["self_attn.qkv_proj"].endswith("[320,576]")
    assert types["self_attn.o_proj"].endswith("[576,192]")
    assert types["mlp.gate_up_proj"].endswith("[1024,576]")
    assert types["mlp.down_proj"].endswith("[576,512]")


def test_hadamard_blocks_of_a_device_need_no_other():
    wide = tiny_graph(hidden=48, heads=3, kv_heads=3, mlp=96, vocabulary=48)
    graph = Pipeline([FoldNorms(), Rotate(r3=True)])(wide)
    (node,) = [n for n in graph.blocks[0].nodes if n.op == "hadamard"]
    assert node.attrs["block"] == 32
    assert partition(graph, 3, "model").graph.blocks[0].node(node.name) == node


def test_groups_stay_whole():
    wide = tiny_graph(hidden=64, heads=4, kv_heads=4, mlp=96, vocabulary=48)
    graph = Pipeline(["decompose{group=32}"])(wide)
    with pytest.raises(BadInput) as refused:
        partition(graph, 4, "model")
    assert "96 inputs of mlp.down_proj in units of 32" in str(refused.value)
    assert "64 inputs of self_attn.o_proj in units of 32" in str(refused.value)
    assert "--tensor-parallel 1 would do" in str(refused.value)


def test_what_no_linear_writes_is_refused():
    graph = tiny_graph()
    block = graph.blocks[0]
    added = Node("mlp.twice", "add", ("mlp.up_proj", "mlp.up_proj"))
    nodes = []
    for node in block.nodes:
        if node.name == "mlp.silu_mul":
            nodes.append(added)
            node = replace(node, inputs=("mlp.gate_proj", "mlp.twice"))
        nodes.append(node)
    other = graph.with_units(
        (graph.prologue, Block(block.name, tuple(nodes)), *graph.blocks[1:], graph.epilogue)
    )
    with pytest.raises(BadInput, match=r"%mlp.twice is no linear's"):
        partition(other, 2, "model")
