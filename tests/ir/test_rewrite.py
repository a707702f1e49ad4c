"""Rewrites of graphs: what linears read."""

import pytest

from atd.errors import BadInput
from atd.ir import INT8
from atd.ir.rewrite import with_activations
from atd.models.random_model import SHAPES, random_graph


def read_by_linears(graph) -> set:
    """What the linears say of their inputs."""
    return {node.attrs.get("activations") for _, node in graph.nodes() if node.op == "linear"}


def test_linears_read_what_they_are_told_to():
    graph = random_graph(SHAPES["tiny"])
    rounded = with_activations(graph, "int8")
    assert with_activations(graph, "model") == graph
    assert read_by_linears(graph) == {None}
    assert read_by_linears(rounded) == {INT8}
    assert str(with_activations(rounded, "float")) == str(graph)
    assert all("activations" not in n.attrs for _, n in rounded.nodes() if n.op != "linear")


def test_an_unknown_way_is_refused_with_the_nearest():
    with pytest.raises(BadInput, match=r"unknown activations 'int9'.*int8"):
        with_activations(random_graph(SHAPES["tiny"]), "int9")
