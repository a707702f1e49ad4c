"""fold_norms: the function stays, the gains go, and a tied head is treated as its option says."""

from dataclasses import replace

import numpy as np
import pytest

from atd.errors import BadInput
from atd.models import frontend
from atd.models.model import load
from atd.passes.decompose import Decompose
from atd.passes.fold_norms import FoldNorms
from atd.passes.fuse import Fuse
from atd.pipeline import Pipeline
from tests.golden.write_gguf import GOLDEN
from tests.models.test_golden import FOLDERS, TOLERANCE, distance
from tests.models.tiny import tiny_graph

TIED = ("llama_bias", "qwen2")


def golden(name: str):
    """Tokens and the logits of transformers."""
    return np.load(GOLDEN / name / "logits.npz")


def logits(graph) -> np.ndarray:
    vocabulary = graph.prologue.nodes[0].weights["weight"].type.shape[0]
    tokens = np.random.default_rng(0).integers(0, vocabulary, (2, 24)).astype(np.int32)
    return np.asarray(load(graph, dtype="float32")(tokens))


def assert_same_function(graph, reference) -> None:
    expected = logits(reference)
    np.testing.assert_allclose(
        logits(graph), expected, rtol=0, atol=TOLERANCE * np.abs(expected).max()
    )


def array(node, slot: str = "weight") -> np.ndarray:
    return np.asarray(node.weights[slot].load().dequantize())


def unreadable(graph):
    """The graph whose weights raise when they are loaded."""

    def load():
        raise AssertionError("a weight was read")

    def node(node):
        return replace(
            node, weights={slot: replace(ref, load=load) for slot, ref in node.weights.items()}
        )

    return graph.with_units(
        tuple(replace(unit, nodes=tuple(map(node, unit.nodes))) for unit in graph.units)
    )


@pytest.mark.parametrize("name", FOLDERS)
def test_every_family_keeps_its_function(name):
    graph = frontend.open(GOLDEN / name)
    folded = FoldNorms()(graph)
    for before, after in zip(graph.units, folded.units, strict=True):
        for norm in (node for node in before.nodes if node.op == "rms_norm"):
            assert array(norm).std() > 0.1  # or the test would show nothing
            kept = "head_dim" in norm.attrs or (name in TIED and before is graph.epilogue)
            np.testing.assert_array_equal(array(after.node(norm.name)), array(norm) if kept else 1)
            assert after.node(norm.name).attrs.get("unit_gain", False) is not kept
    assert distance(folded, golden(name)) < TOLERANCE


@pytest.mark.parametrize("name", TIED)
def test_untie_folds_the_final_norm_too(name):
    graph = frontend.open(GOLDEN / name)
    untied = FoldNorms(untie=True)(graph)
    norm, head = untied.epilogue.nodes
    np.testing.assert_array_equal(array(norm), 1)
    assert "tied_to" not in head.attrs
    assert head.weights["weight"].tensor == "lm_head.weight"
    assert not untied.config["tie_word_embeddings"]
    assert distance(untied, golden(name)) < TOLERANCE


def test_a_real_model_keeps_its_function(trained):
    assert distance(FoldNorms()(frontend.open(trained.folder)), trained.golden()) < TOLERANCE


def test_joined_linears_take_the_gain_once():
    graph = tiny_graph()
    assert_same_function(Pipeline([Fuse(), FoldNorms()])(graph), graph)


def test_types_change_at_once_and_nothing_is_read():
    types = {
        name: str(ref.type)
        for name, ref in FoldNorms(dtype="bf16")(unreadable(tiny_graph())).weights()
    }
    assert types["model.layers.0.self_attn.q_proj"] == "dense bf16[32,32]"
    assert types["lm_head"] == "dense bf16[40,32]"
    assert types["model.layers.0.self_attn.o_proj"] == "dense f32[32,32]"
    assert types["model.layers.0.input_layernorm"] == "dense f32[32]"


def test_untie_changes_nothing_where_the_head_has_its_own():
    graph = tiny_graph()
    assert str(FoldNorms(untie=True)(graph)) == str(FoldNorms()(graph))


def test_what_cannot_work_is_refused():
    with pytest.raises(BadInput, match=r"q_proj is ternary .* put fold_norms first"):
        Pipeline([Decompose(group=32), FoldNorms()])(tiny_graph())
    with pytest.raises(BadInput, match="no norm whose gain can be folded"):
        Pipeline([FoldNorms(), FoldNorms()])(tiny_graph())
    with pytest.raises(BadInput, match=r"lm_head is ternary"):
        Pipeline([Decompose(nodes=r"model\.embed_tokens", group=32), FoldNorms(untie=True)])(
            tiny_graph(tied=True)
        )
    with pytest.raises(BadInput, match="dtype 'f23'"):
        FoldNorms(dtype="f23")
