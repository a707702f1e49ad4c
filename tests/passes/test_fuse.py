"""fuse: joined linears give the same outputs, to the bit."""

import numpy as np
import pytest

from atd.decomposition.trellis_codes import known_code
from atd.ir import Node
from atd.models import frontend
from atd.models.model import load
from atd.passes.decompose import Decompose
from atd.passes.fuse import Fuse
from atd.passes.pack import Pack
from atd.pipeline import Pipeline, Rule
from atd.weights import Dense
from tests.calibration.converted import coded
from tests.models.tiny import tiny_graph


def linears(graph):
    return {node.name: node for node in graph.blocks[0].nodes if node.op == "linear"}


def logits(graph, tokens=24):
    return np.asarray(load(graph, backend="xla")(np.arange(tokens, dtype=np.int32).reshape(2, -1)))


@pytest.mark.exact
@pytest.mark.parametrize(
    "order", [[Decompose(group=32), Fuse(), Pack()], [Decompose(group=32), Pack(), Fuse()]]
)
def test_outputs_are_identical_to_the_bit(order):
    graph = tiny_graph(hidden=64, mlp=96)
    apart = Pipeline([step for step in order if not isinstance(step, Fuse)])(graph)
    joined = Pipeline(order)(graph)
    assert set(linears(joined)) == {
        "self_attn.qkv_proj",
        "self_attn.o_proj",
        "mlp.gate_up_proj",
        "mlp.down_proj",
    }
    np.testing.assert_array_equal(logits(joined), logits(apart))


@pytest.mark.exact
def test_outputs_of_a_real_model_are_identical_to_the_bit(trained):
    graph = frontend.open(trained.folder)
    apart, joined = (Pipeline(["decompose", *fuse, "pack"])(graph) for fuse in ([], ["fuse"]))
    np.testing.assert_array_equal(logits(joined), logits(apart))


def test_dense_linears_are_joined_as_well():
    """The same weights; XLA's dot sums in an order that depends on the number of rows, so outputs
    agree to rounding alone.
    """
    graph = tiny_graph()
    assert "self_attn.qkv_proj" in linears(Fuse()(graph))
    np.testing.assert_allclose(logits(Fuse()(graph)), logits(graph), atol=2e-5)


def test_weights_are_joined_row_on_row_and_slices_keep_the_names():
    graph = tiny_graph()
    block = Fuse()(graph).blocks[1]

    def array(node: Node) -> np.ndarray:
        weight = node.weights["weight"].load()
        assert isinstance(weight, Dense)
        return np.asarray(weight.array)

    parts = [array(graph.blocks[1].node(f"self_attn.{n}_proj")) for n in "qkv"]
    np.testing.assert_array_equal(array(block.node("self_attn.qkv_proj")), np.concatenate(parts))
    assert [str(block.node(f"self_attn.{n}_proj")) for n in "qkv"] == [
        "%self_attn.q_proj = slice(%self_attn.qkv_proj) start=0 stop=32",
        "%self_attn.k_proj = slice(%self_attn.qkv_proj) start=32 stop=48",
        "%self_attn.v_proj = slice(%self_attn.qkv_proj) start=48 stop=64",
    ]


def test_only_equal_types_are_joined():
    """Rules that give v more bases leave q and k to be joined."""
    more = Rule(r".*\.v_proj", options=(("bases", 3),))
    joined = linears(Pipeline([Decompose(group=32, rules=(more,)), Fuse()])(tiny_graph()))
    assert set(joined) == {
        "self_attn.qk_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_up_proj",
        "mlp.down_proj",
    }


def test_one_scale_a_tensor_and_strided_rows_are_left_alone():
    assert "self_attn.q_proj" in linears(
        Pipeline([Decompose(group="tensor"), Fuse()])(tiny_graph())
    )
    strided = Pipeline([Decompose(group="row", bases=1), Pack(layout="hf-bitnet"), Fuse()])(
        tiny_graph()
    )
    assert "self_attn.q_proj" in linears(strided)


@pytest.mark.parametrize("bases", [pytest.param(2, marks=pytest.mark.slow), 1.5])
def test_trellis_codes_are_joined_segment_on_segment(bases):
    """q has two segments, k and v have one."""
    graph = coded(tiny_graph(hidden=256, mlp=192), known_code(bases))
    apart, joined = (Pipeline([*fuse, Pack()])(graph) for fuse in ([], [Fuse()]))
    qkv = linears(joined)["self_attn.qkv_proj"].weights["weight"]
    parts = [linears(apart)[f"self_attn.{n}_proj"].weights["weight"] for n in "qkv"]
    assert all("segment=128" in str(part.type) for part in parts)
    np.testing.assert_array_equal(
        qkv.load().dequantize(), np.concatenate([part.load().dequantize() for part in parts])
    )
    np.testing.assert_allclose(logits(joined), logits(apart), atol=1e-5)


def test_a_short_last_segment_is_left_alone():
    """149 rows are segments of 128 and 21."""
    joined = linears(Fuse()(coded(tiny_graph(mlp=149), known_code(2), r".*(gate|up)_proj")))
    assert "segment=128" in str(joined["mlp.gate_proj"].weights["weight"].type)
    assert "mlp.gate_up_proj" not in joined
