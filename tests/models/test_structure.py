"""Stored graphs against those of their config.json."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from atd.errors import BadInput
from atd.ir import Graph
from atd.models import frontend
from atd.models.structure import difference, plain
from atd.pipeline import Pipeline
from tests.golden.make_hf_golden import MODELS, OUT

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("source", ["llama_gqa", "llama_bias", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "passes",
    [
        (),
        ("fuse",),
        ("fold_norms{untie = true}", "rotate{r3 = true}", "fuse"),
        ("fold_norms", "rotate{embedding = true}"),
    ],
)
def test_passes_leave_the_structure_of_the_config(source, passes):
    graph = Pipeline(list(passes))(frontend.open(GOLDEN / source))
    assert difference(graph, source) is None


@pytest.mark.parametrize("name", MODELS)
def test_stored_graphs_have_it_too(name):
    graph = frontend.open(OUT / name)
    assert difference(graph, name) is None
    assert not [node for _, node in plain(graph).nodes() if node.op in ("hadamard", "slice")]


def without_last_block(graph: Graph) -> Graph:
    return replace(graph, blocks=graph.blocks[:-1])


def with_another_eps(graph: Graph) -> Graph:
    block = graph.blocks[1]
    norm = block.node("input_layernorm")
    block = block.replace_node(replace(norm, attrs=norm.attrs | {"eps": 0.5}))
    return replace(graph, blocks=(graph.blocks[0], block))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (with_another_eps, r"model\.layers\.1: input_layernorm = rms_norm\(x\) eps=0\.5 in place"),
        (without_last_block, r"epilogue: model\.norm = .* in place of input_layernorm"),
    ],
)
def test_another_function_is_told_by_its_first_node(change, found):
    graph = change(frontend.open(GOLDEN / "llama_gqa"))
    text = difference(graph, "here")
    assert text is not None
    assert re.search(found, text)


def test_a_family_that_is_not_known_is_refused():
    graph = frontend.open(GOLDEN / "llama_gqa")
    with pytest.raises(BadInput, match="architecture 'other'"):
        difference(replace(graph, config=graph.config | {"model_type": "other"}), "here")
