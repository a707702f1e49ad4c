"""rotate: orthogonal, the same function to rounding, fewer outliers, the same bytes for the same
seed.
"""

from dataclasses import replace

import jax
import numpy as np
import pytest

from atd.calibration.moments import dense_moments
from atd.decomposition.rotations import sylvester
from atd.errors import BadInput
from atd.exports.absorb import absorb
from atd.exports.hf import export_hf
from atd.ir import Node, in_memory
from atd.ir.rewrite import map_nodes
from atd.models import frontend
from atd.models.model import load
from atd.passes.decompose import Decompose
from atd.passes.fold_norms import FoldNorms
from atd.passes.fuse import Fuse
from atd.passes.rotate import Rotate
from atd.pipeline import Context, Pipeline
from atd.pipeline.convert import convert
from atd.pipeline.recipe import Recipe
from atd.weights import Dense
from tests.golden.write_gguf import GOLDEN
from tests.models.test_golden import FOLDERS, TOLERANCE, distance
from tests.models.tiny import tiny_graph
from tests.passes.test_fold_norms import (
    TIED,
    array,
    assert_same_function,
    golden,
    logits,
    unreadable,
)


def quiet(line: str) -> None:
    pass


def rotated(graph, untie: bool = False, recipe_seed: int = 0, **options):
    return Pipeline([FoldNorms(untie=untie), Rotate(**options)])(graph, Context(seed=recipe_seed))


# --- the function stays ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
def test_every_family_keeps_its_function(name):
    graph = frontend.open(GOLDEN / name)
    after = rotated(graph)
    assert ("rotate_in" in str(after)) == (name in TIED)
    for before, block in zip(graph.blocks, after.blocks, strict=True):
        for node in (node for node in before.nodes if node.op == "linear"):
            assert np.abs(array(block.node(node.name)) - array(node)).max() > 0.05
        for node in (node for node in before.nodes if "bias" in node.weights):
            moved = node.name.split(".")[1] in ("v_proj", "o_proj", "down_proj")
            assert (
                np.array_equal(array(block.node(node.name), "bias"), array(node, "bias"))
                is not moved
            )
    assert distance(after, golden(name)) < TOLERANCE


@pytest.mark.parametrize("name", TIED)
def test_untied_and_absorbed_heads_keep_the_function(name):
    graph = frontend.open(GOLDEN / name)
    for after in (rotated(graph, untie=True), absorb(rotated(graph))):
        assert [node.name for node in after.prologue.nodes] == ["embed_tokens"]
        assert [node.name for node in after.epilogue.nodes] == ["model.norm", "lm_head"]
        assert "tied_to" not in str(after)
        assert not after.config["tie_word_embeddings"]
        assert distance(after, golden(name)) < TOLERANCE


@pytest.mark.parametrize("name", TIED)
def test_a_rotated_tied_embedding_keeps_the_function(name):
    graph = frontend.open(GOLDEN / name)
    after = rotated(graph, embedding=True)
    assert [node.name for node in after.prologue.nodes] == ["embed_tokens"]
    assert [node.name for node in after.epilogue.nodes] == [
        "rotate_out",
        "model.norm",
        "rotate_head",
        "lm_head",
    ]
    assert np.abs(array(after.prologue.nodes[0]) - array(graph.prologue.nodes[0])).max() > 0.05
    assert distance(after, golden(name)) < TOLERANCE
    alone = absorb(after)
    assert "rotate_" not in str(alone)
    assert distance(alone, golden(name)) < TOLERANCE
    with pytest.raises(BadInput, match="rotated already"):
        Rotate()(after)


@pytest.mark.parametrize("name", FOLDERS)
def test_every_family_keeps_its_function_with_rotated_inputs_of_down(name):
    graph = frontend.open(GOLDEN / name)
    after = rotated(graph, r3=True)
    for before, block in zip(graph.blocks, after.blocks, strict=True):
        assert block.node("mlp.down_proj").inputs == ("mlp.hadamard",)
        assert block.node("mlp.hadamard").inputs == ("mlp.silu_mul",)
        for node in (node for node in before.nodes if "bias" in node.weights):
            moved = node.name.split(".")[1] in ("v_proj", "o_proj", "up_proj", "down_proj")
            same = np.array_equal(array(block.node(node.name), "bias"), array(node, "bias"))
            assert same is not moved
    assert distance(after, golden(name)) < TOLERANCE
    alone = absorb(after)
    assert "hadamard" not in str(alone)
    assert distance(alone, golden(name)) < TOLERANCE


def test_inputs_of_down_are_rotated_by_signs_and_a_transform():
    graph = tiny_graph(layers=1, mlp=48)  # 48 = 3 * 16
    (before,), (after,) = graph.blocks, Rotate(r1=False, r2=False, r3=True)(graph).blocks
    assert after.node("mlp.hadamard").attrs == {"block": 16}
    signs = np.sign(array(after.node("mlp.up_proj")) / array(before.node("mlp.up_proj")))[:, 0]
    assert len(set(signs)) == 2
    matrix = np.diag(signs) @ np.kron(np.eye(3), sylvester(16)) / 4
    expected = array(before.node("mlp.down_proj")) @ matrix
    np.testing.assert_allclose(array(after.node("mlp.down_proj")), expected, atol=1e-6)
    for name in ("mlp.gate_proj", "self_attn.v_proj", "self_attn.o_proj"):
        np.testing.assert_array_equal(array(after.node(name)), array(before.node(name)))


def test_second_moments_of_the_inputs_of_down_are_rotated():
    graph, name = tiny_graph(layers=1, mlp=48), "model.layers.0.mlp.down_proj"
    after = Rotate(r1=False, r2=False, r3=True)(graph)
    windows = np.random.default_rng(0).integers(0, 40, (4, 16)).astype(np.int32)
    _, plain, _ = dense_moments(graph, windows, [name])
    _, turned, _ = dense_moments(after, windows, [name])
    up = "mlp.up_proj"
    signs = np.sign(array(after.blocks[0].node(up)) / array(graph.blocks[0].node(up)))[:, 0]
    matrix = np.diag(signs) @ np.kron(np.eye(3), sylvester(16)) / 4
    expected = matrix.T @ plain.moments["mlp.silu_mul"] @ matrix
    np.testing.assert_allclose(turned.moments["mlp.hadamard"], expected, atol=1e-5)


@pytest.mark.parametrize("name", [*FOLDERS, "olmo2", "gemma2", "gemma3"])
def test_every_family_keeps_its_function_with_rotated_inputs_of_linears(name):
    graph = frontend.open(GOLDEN / name)
    after = rotated(graph, r1=False, r3=True, r4=True)
    for before, block in zip(graph.blocks, after.blocks, strict=True):
        for linear in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            assert block.node(linear).inputs == ("self_attn.input_hadamard",)
            assert np.abs(array(block.node(linear)) - array(before.node(linear))).max() > 0.01
        for linear in ("mlp.gate_proj", "mlp.up_proj"):
            assert block.node(linear).inputs == ("mlp.input_hadamard",)
        assert block.node("mlp.down_proj").inputs == ("mlp.hadamard",)
    assert distance(after, golden(name)) < TOLERANCE
    alone = absorb(after)
    assert "hadamard" not in str(alone)
    assert distance(alone, golden(name)) < TOLERANCE


def test_inputs_of_linears_are_rotated_by_gains_and_a_transform():
    graph = FoldNorms()(tiny_graph(layers=1, hidden=48, heads=2, kv_heads=1))  # 48 = 3 * 16
    (before,), (after,) = graph.blocks, Rotate(r1=False, r2=False, r4=True)(graph).blocks
    assert after.node("mlp.input_hadamard").attrs == {"block": 16}
    assert after.node("self_attn.input_hadamard").inputs == ("input_layernorm",)
    signs = array(after.node("input_layernorm"))
    assert set(signs) == {-1.0, 1.0}
    assert "unit_gain" not in after.node("input_layernorm").attrs
    matrix = np.diag(signs) @ np.kron(np.eye(3), sylvester(16)) / 4
    expected = array(before.node("self_attn.k_proj")) @ matrix
    np.testing.assert_allclose(array(after.node("self_attn.k_proj")), expected, atol=1e-6)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        np.testing.assert_array_equal(array(after.node(name)), array(before.node(name)))


def test_joined_linears_share_a_transform():
    graph = tiny_graph()
    after = Pipeline([FoldNorms(), Rotate(r1=False, r4=True), Fuse()])(graph)
    assert [n.op for n in after.blocks[0].nodes].count("hadamard") == 2
    assert after.blocks[0].node("self_attn.qkv_proj").inputs == ("self_attn.input_hadamard",)
    assert_same_function(after, graph)


def test_transforms_that_no_linear_reads_are_not_exported():
    (block,) = (graph := tiny_graph(layers=1)).blocks
    last = Node("mlp.hadamard", "hadamard", (block.output,), attrs={"block": 8})
    graph = replace(graph, blocks=(replace(block, nodes=(*block.nodes, last)),))
    with pytest.raises(BadInput, match=r"layers\.0\.mlp\.hadamard .* not read by linears alone"):
        absorb(graph)


def test_long_runs_of_inputs_of_down_are_cut():
    graph = tiny_graph(layers=1, mlp=4096)
    after = Rotate(r1=False, r2=False, r3=True)(graph)
    assert "hadamard(%mlp.silu_mul) block=2048" in str(after)
    assert_same_function(after, graph)


@pytest.mark.parametrize("options", [{"r1": False}, {"r2": False}, {"r1": False, "r3": True}])
def test_either_rotation_alone_keeps_the_function(options):
    graph = tiny_graph(tied=True)
    assert_same_function(rotated(graph, **options), graph)


def test_r2_alone_needs_no_folded_norms():
    graph = tiny_graph()
    assert_same_function(Rotate(r1=False)(graph), graph)


def test_widths_without_a_hadamard_matrix_keep_the_function():
    graph = tiny_graph(hidden=92, heads=2, kv_heads=1, tied=True)  # head_dim 46
    after = rotated(graph)
    assert str(after.prologue.node("rotate_in").weights["weight"].type) == "dense f32[92,92]"
    assert_same_function(after, graph)


def test_r3_alone_needs_no_folded_norms():
    graph = tiny_graph()
    assert_same_function(Rotate(r1=False, r2=False, r3=True)(graph), graph)


def test_r1_works_on_joined_linears():
    graph = tiny_graph()
    assert_same_function(Pipeline([FoldNorms(), Fuse(), Rotate(r2=False)])(graph), graph)


# --- a real model ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trained", [pytest.param("stories15M", marks=pytest.mark.slow)], indirect=True
)
def test_a_real_model_keeps_its_function_and_loses_its_outliers(trained):
    folded = FoldNorms()(frontend.open(trained.folder))
    after = Rotate()(folded)
    assert distance(after, trained.golden()) < TOLERANCE
    before, now = kurtosis(folded), kurtosis(after)
    assert np.mean(list(before.values())) > 0.18
    assert np.mean(list(now.values())) < 0.05
    assert (
        now["model.layers.0.self_attn.k_proj"]
        < 0.05
        < 1
        < before["model.layers.0.self_attn.k_proj"]
    )
    # whose inputs and outputs are both rotated: no column stands out any more either
    name = "self_attn.o_proj"
    assert largest(folded.blocks[0].node(name)) > 20
    assert largest(after.blocks[0].node(name)) < 6


def test_outliers_of_a_small_model_are_spread(packaged):
    """A feature of the residual stream and single weights of o_proj, many times as large as it has
    them.
    """

    def spiked(node):
        if node.op != "linear" or node.name == "mlp.down_proj":
            return node
        weight = array(node).copy()
        if node.name == "self_attn.o_proj":
            weight[5, 3] = 40 * weight.std()
        else:
            weight[:, 5] *= 10
        ref = in_memory(node.weights["weight"].tensor, Dense(weight))
        return replace(node, weights=node.weights | {"weight": ref})

    folded = FoldNorms()(frontend.open(packaged.folder))
    blocks = [replace(block, nodes=tuple(map(spiked, block.nodes))) for block in folded.blocks]
    folded = folded.with_units((folded.prologue, *blocks, folded.epilogue))
    after = Rotate()(folded)
    assert_same_function(after, folded)
    before, now = kurtosis(folded), kurtosis(after)
    assert np.mean(list(before.values())) > 10
    assert np.mean(list(now.values())) < 0.15
    for one, other in zip(folded.blocks, after.blocks, strict=True):
        assert largest(one.node("self_attn.o_proj")) > 20
        assert largest(other.node("self_attn.o_proj")) < 6


def kurtosis(graph) -> dict[str, float]:
    """Excess kurtosis of the weights over their row's standard deviation, of each linear of the
    blocks; Gaussian: 0.
    """
    found = {}
    for name, node in graph.nodes():
        if node.op == "linear" and name.startswith("model.layers"):
            weight = array(node).astype(np.float64)
            found[name] = float(((weight / weight.std(axis=1, keepdims=True)) ** 4).mean()) - 3
    return found


def largest(node) -> float:
    """The largest weight in standard deviations; about 4.5 among as many Gaussian ones."""
    return float(np.abs(array(node)).max() / array(node).std())


@pytest.mark.exact
def test_converted_checkpoints_load_from_disk(stories260k, tmp_path):
    """With the lazy graph's text, and its logits to the bit."""
    passes = ["fold_norms", "rotate", "decompose{bases = 1, group = 64}", "fuse", "pack"]
    recipe = Recipe(Pipeline(passes), seed=5)
    lazy = recipe.pipeline(frontend.open(stories260k), Context(seed=5))
    stored = frontend.open(convert(stories260k, tmp_path / "out", recipe, say=quiet))
    assert str(stored) == str(lazy)
    assert "%rotate_in = linear(%embed_tokens) {weight: packed n=1 g=tensor" in str(stored)
    np.testing.assert_array_equal(logits(stored), logits(lazy))
    assert_same_function(absorb(stored), stored)


def test_converted_checkpoints_export(stories260k, tmp_path):
    passes = [
        "fold_norms{untie = true}",
        "rotate",
        "decompose{bases = 1, group = 64}",
        "fuse",
        "pack",
    ]
    folder = convert(stories260k, tmp_path / "out", Pipeline(passes), say=quiet)
    exported = frontend.open(export_hf(folder, tmp_path / "dense", say=quiet))
    assert "tied_to" not in str(exported)
    assert_same_function(exported, frontend.open(folder))


def test_conversions_with_rotated_inputs_of_down(stories260k, small, tmp_path):
    """All passes work on them; results load from disk, decode as they read whole sequences, and are
    exported without the op.
    """
    passes = [
        "fold_norms{untie = true}",
        "rotate{r3 = true}",
        "allocate{bits = 3.6, bases = [2]}",
        "decompose{method = 'hessian'}",
        "pack",
        "calibrate{steps = 2, checks = 1}",
        "fuse",
        "verify",
    ]
    text = {"calibration": (str(small.calibration),), "calibration_context": 64}
    recipe = Recipe(Pipeline(passes), seed=5, calibration_tokens=1024, **text)
    folder = convert(stories260k, tmp_path / "out", recipe, say=quiet)
    stored = frontend.open(folder)
    assert "%mlp.hadamard = hadamard(%mlp.silu_mul) block=4" in str(stored)
    model, tokens = load(folder), np.arange(1, 13, dtype=np.int32)[None]
    _, cache = model.prefill(tokens[:, :-1], model.new_cache(batch=1, length=16))
    decoded, _ = model.decode(tokens[:, -1], cache)
    np.testing.assert_allclose(decoded[0], model(tokens)[0, -1], atol=1e-4)
    exported = frontend.open(export_hf(folder, tmp_path / "dense", say=quiet))
    assert "hadamard" not in str(exported)
    assert_same_function(exported, stored)


# --- seeds and refusals ---------------------------------------------------------------------------


@pytest.mark.exact
def test_equal_seeds_give_equal_bytes_and_others_do_not():
    def weights(recipe_seed: int, seed: int) -> list[bytes]:
        graph = rotated(tiny_graph(tied=True), recipe_seed=recipe_seed, seed=seed)
        return [
            np.asarray(leaf).tobytes()
            for _, ref in graph.weights()
            for leaf in jax.tree.leaves(ref.load())
        ]

    assert weights(3, 4) == weights(3, 4)
    for other in (weights(4, 4), weights(3, 5)):
        assert (
            sum(a != b for a, b in zip(other, weights(3, 4), strict=True)) == 2 * 7 + 2
        )  # linears, rotate_in and _out


def test_blocks_and_heads_have_rotations_of_their_own():
    """Values that are equal in all blocks and heads are not so any more."""

    def equal(block):
        node = block.node("self_attn.v_proj")
        ref = node.weights["weight"]
        ones = replace(ref, load=lambda: Dense(np.ones(ref.type.shape, np.float32)))
        return block.replace_node(replace(node, weights={"weight": ones}))

    graph = tiny_graph()  # two blocks of two key-value heads of 8 features
    graph = Rotate(r1=False)(
        graph.with_units((graph.prologue, *map(equal, graph.blocks), graph.epilogue))
    )
    heads = [
        head
        for block in graph.blocks
        for head in array(block.node("self_attn.v_proj")).reshape(2, 8, 32)
    ]
    assert len({head.tobytes() for head in heads}) == 4


def without_gates(graph):
    """The graph with a sum in place of silu(gate) * up."""
    return map_nodes(graph, lambda _, n: replace(n, op="add") if n.op == "silu_mul" else n)


def test_types_change_at_once_and_nothing_is_read():
    types = {
        name: str(ref.type)
        for name, ref in rotated(unreadable(tiny_graph()), dtype="bf16").weights()
    }
    assert types["model.embed_tokens"] == "dense bf16[40,32]"
    assert types["model.layers.0.self_attn.o_proj"] == "dense bf16[32,32]"
    assert types["model.norm"] == "dense f32[32]"


def test_what_cannot_work_is_refused():
    with pytest.raises(
        BadInput, match=r"model\.layers\.0\.input_layernorm has a gain.*put fold_norms before"
    ):
        Rotate()(tiny_graph())
    with pytest.raises(BadInput, match=r"o_proj is ternary .*put rotate before decompose"):
        Pipeline([FoldNorms(), Decompose(group=32, nodes=".*o_proj"), Rotate()])(tiny_graph())
    with pytest.raises(BadInput, match="put rotate before fuse"):
        Pipeline([FoldNorms(), Fuse(), Rotate()])(tiny_graph())
    with pytest.raises(BadInput, match="rotated already"):
        Pipeline([FoldNorms(), Rotate(), Rotate()])(tiny_graph(tied=True))
    with pytest.raises(BadInput, match="does nothing"):
        Rotate(r1=False, r2=False)
    r3 = Rotate(r1=False, r2=False, r3=True)
    with pytest.raises(BadInput, match=r"silu_mul does not come from a linear of its own.*fuse"):
        Pipeline([Fuse(), r3])(tiny_graph())
    with pytest.raises(BadInput, match=r"output of model\.layers\.0\.mlp\.silu_mul is rotated"):
        Pipeline([r3, r3])(tiny_graph())
    with pytest.raises(BadInput, match=r"silu_mul has an odd width; use r3 = false"):
        r3(tiny_graph(mlp=45))
    with pytest.raises(BadInput, match=r"down_proj is ternary .*put rotate before decompose"):
        Pipeline([Decompose(group=32, nodes=".*down_proj"), r3])(tiny_graph())
    with pytest.raises(BadInput, match=r"model\.layers\.0 has no silu_mul"):
        r3(without_gates(tiny_graph()))
    r4 = Rotate(r1=False, r2=False, r4=True)
    with pytest.raises(BadInput, match="r4 rotates what r1 has rotated already; set r1 = false"):
        Rotate(r4=True)
    with pytest.raises(BadInput, match=r"no linear of model\.layers\.0 reads.*use r4 = false"):
        Pipeline([r4, r4])(tiny_graph())
    with pytest.raises(BadInput, match=r"input_layernorm has an odd width; use r4 = false"):
        r4(tiny_graph(hidden=45, heads=3, kv_heads=1))
    with pytest.raises(BadInput, match="seed must be"):
        Rotate(seed=-1)
