"""equalize: the function stays, outlying inputs get finer weights, and what cannot be scaled is
refused.
"""

import re
from dataclasses import replace

import numpy as np
import pytest

from atd.calibration.streams import Calibration
from atd.errors import BadInput
from atd.ir import in_memory
from atd.models import frontend
from atd.passes.decompose import Decompose
from atd.passes.equalize import Equalize, scales_of, sites
from atd.passes.fold_norms import FoldNorms
from atd.passes.fuse import Fuse
from atd.passes.rotate import Rotate
from atd.pipeline import Context, Figures, Pipeline, parse_pass
from atd.weights import Dense, DenseType
from tests.golden.write_gguf import GOLDEN
from tests.models.tiny import tiny_graph
from tests.passes.test_fold_norms import array, assert_same_function, unreadable


def context_of(graph, windows: int = 2, length: int = 32, **sinks) -> Context:
    vocabulary = graph.prologue.nodes[0].weights["weight"].type.shape[0]
    tokens = np.random.default_rng(1).integers(0, vocabulary, (windows, length)).astype(np.int32)
    return Context(calibration=Calibration(tokens), **{"say": lambda line: None, **sinks})


def with_outliers(graph, factor: float = 30.0):
    """Every norm of the blocks has three features with a gain `factor` times as large."""

    def node(n):
        if n.op != "rms_norm":
            return n
        gain = array(n).copy()
        gain[[3, 11, 20]] *= factor
        return replace(n, weights={"weight": in_memory(n.weights["weight"].tensor, Dense(gain))})

    blocks = (replace(block, nodes=tuple(node(n) for n in block.nodes)) for block in graph.blocks)
    return replace(graph, blocks=tuple(blocks))


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])  # biases; norms of q and k
def test_every_family_keeps_its_function(name):
    graph, figures = frontend.open(GOLDEN / name), Figures()
    after = Equalize(grid=(0.5,))(graph, context_of(graph, record=figures.record))
    assert_same_function(after, graph)
    scaled = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for before, block in zip(graph.blocks, after.blocks, strict=True):
        assert len(sites(before)) == 4
        for node in (node for node in before.nodes if node.op == "linear"):
            assert node.name.split(".")[-1] in scaled
            assert np.abs(array(block.node(node.name)) / array(node) - 1).max() > 0.05
            assert figures[before.full_name(node)] == {"exponent": 0.5}


def test_a_real_model_keeps_its_function(trained):
    graph = frontend.open(trained.folder)
    graph = replace(graph, blocks=graph.blocks[:2])  # all blocks are alike
    assert_same_function(Equalize(grid=(0.5,))(graph, context_of(graph)), graph)


def test_the_function_stays_behind_rotate():
    graph = Pipeline([FoldNorms(), Rotate()])(tiny_graph())
    after = Equalize(grid=(0.5,))(graph, context_of(graph))
    assert_same_function(after, graph)
    assert np.abs(array(after.blocks[0].node("input_layernorm")) - 1).max() > 0.02
    assert "unit_gain" not in str(after.blocks[0])
    with pytest.raises(BadInput, match="has a gain"):
        Rotate()(Equalize(grid=(0.5,))(FoldNorms()(tiny_graph()), context_of(graph)))


def outputs(graph, tokens: np.ndarray) -> np.ndarray:
    """What the first block's q, k and v make of tokens, [tokens, out], in numpy."""
    block, x = graph.blocks[0], array(graph.prologue.nodes[0])[tokens]
    x = (
        x
        / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + 1e-5)
        * array(block.node("input_layernorm"))
    )
    return np.concatenate(
        [x @ array(block.node(f"self_attn.{part}_proj")).T for part in "qkv"], axis=1
    )


def test_outlying_inputs_are_found_and_their_outputs_come_closer():
    graph = with_outliers(tiny_graph(layers=1))
    lines, figures = [], Figures()
    context = context_of(graph, windows=4, say=lines.append, record=figures.record)
    after = Equalize(group=32, grid=(0.0, 0.5))(graph, context)
    assert figures["model.layers.0.self_attn.q_proj"] == {"exponent": 0.5}
    decompose, tokens = Decompose(group=32), np.arange(40)
    dense, plain, equalized = (
        outputs(g, tokens) for g in (graph, decompose(graph), decompose(after))
    )
    assert np.square(equalized - dense).sum() < 0.8 * np.square(plain - dense).sum()
    assert re.fullmatch(
        r"equalize: exponent .*0\.5 at \d sites; output error of a plain decomposition -\d+\.\d%",
        *lines,
    )


def test_exponent_zero_leaves_the_site_as_it_is():
    graph, lines, figures = tiny_graph(), [], Figures()
    context = context_of(graph, say=lines.append, record=figures.record)
    assert Equalize(grid=(0.0,))(graph, context) == graph
    assert lines == ["equalize: exponent 0 at 8 sites"]
    assert set(figures["model.layers.1.mlp.down_proj"].values()) == {0.0}


def test_scales():
    squares = np.array([1.0, 4.0, 16.0, 64.0], np.float32)
    np.testing.assert_allclose(scales_of(squares, 1.0), np.array([1, 2, 4, 8]) / 8**0.5, rtol=1e-6)
    np.testing.assert_array_equal(scales_of(squares, 0.0), np.ones(4))
    shared = scales_of(squares, 0.5, heads=(2, 1))  # features 0, 2 and 1, 3 are one value each
    np.testing.assert_allclose(shared, (np.array([8.5, 34, 8.5, 34]) / 17) ** 0.25, rtol=1e-6)
    assert np.isfinite(scales_of(np.array([0.0, 1.0]), 0.5)).all()
    np.testing.assert_array_equal(scales_of(np.zeros(2), 0.5), np.ones(2))


def test_calibration_that_others_use_is_left_alone():
    graph = tiny_graph()
    context = context_of(graph)
    assert context.calibration is not None
    Equalize(grid=(0.5,))(graph, context)
    context.calibration.begin(graph.prologue, graph.prologue)  # would fail behind the model
    context.calibration.finish()


def test_preflight_reads_nothing():
    graph = unreadable(tiny_graph())
    after = Pipeline([Equalize(), Decompose(group=32)]).preflight(graph)
    assert "ternary" in str(after)
    types = {
        ref.type.dtype
        for _, ref in Equalize()(graph, Context()).weights()
        if isinstance(ref.type, DenseType)
    }
    assert types == {"f32"}


def test_behind_fuse_norms_alone_are_left():
    graph = Fuse()(tiny_graph())
    assert [site.writer for site in sites(graph.blocks[0])] == [
        "input_layernorm",
        "post_attention_layernorm",
    ]


def test_text_form():
    step = Equalize(bases=3, group="row", grid=(0.0, 0.25))
    assert parse_pass(str(step)) == step


def test_refusals():
    with pytest.raises(BadInput, match=r"o_proj is ternary .*put equalize before decompose"):
        Pipeline([Decompose(group=32, nodes=".*o_proj"), Equalize()])(tiny_graph())
    for options, words in (
        ("grid = []", "grid"),
        ("grid = [0.5, 1.5]", "grid"),
        ("grid = ['a']", "grid"),
        ("bases = 5", "bases"),
        ("scales = 'loose'", "scales"),
        ("tokens = 0", "tokens"),
        ("group = 16", "group"),
    ):
        with pytest.raises(BadInput, match=words):
            parse_pass(f"equalize{{{options}}}")


def test_load_is_lazy_and_repeatable():
    graph = tiny_graph()
    after = Equalize(grid=(0.5,))(graph, context_of(graph))
    node = after.blocks[0].node("mlp.down_proj")
    np.testing.assert_array_equal(array(node), array(node))
