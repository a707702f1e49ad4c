"""Rewrites of graphs, nodes and references that several passes share."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from atd.errors import BadInput, nearest
from atd.ir.graph import Block, Graph, Node, WeightRef
from atd.ir.notes import UNIT_GAIN, without
from atd.ir.ops import INT8
from atd.weights import DTYPES, Dense, DenseType


def map_nodes(graph: Graph, function: Callable[[Block, Node], Node]) -> Graph:
    """Returns the graph with every node replaced by what function(its block, it) makes of it."""
    return graph.with_units(
        tuple(
            replace(unit, nodes=tuple(function(unit, node) for node in unit.nodes))
            for unit in graph.units
        )
    )


def with_weight(node: Node, ref: WeightRef, slot: str = "weight") -> Node:
    """Returns the node with this weight in the slot."""
    return replace(node, weights=node.weights | {slot: ref})


def joined_parts(unit: Block, node: Node) -> list[Node]:
    """Returns the slices that take the output of a joined linear apart; none for any other node."""
    return [part for part in unit.readers(node.name) if part.op == "slice"]


def map_array(
    ref: WeightRef, dtype: str, function: Callable[[np.ndarray], np.ndarray], source: str = ""
) -> WeightRef:
    """Returns a reference to function(W), a dense weight of `dtype` in the shape of W, computed
    when it is loaded.

    Args:
      ref: the weight W; the function is given its data as float32.
      dtype: "f32", "f16" or "bf16".
      source: identity of the result for the resume key; by default that of W, for functions whose
        parameters stand in the text of a pass.

    Loading it raises BadInput where a value overflows f16.
    """

    def load() -> Dense:
        with np.errstate(over="ignore"):
            array = np.asarray(function(ref.dense())).astype(DTYPES[dtype], copy=False)
        if dtype == "f16" and not np.isfinite(array).all():
            raise BadInput(
                f"{ref.tensor}: what a pass makes of it does not fit f16; give the pass dtype = "
                "'f32' or 'bf16'"
            )
        return Dense(array)

    type = DenseType(ref.type.shape, dtype)
    return replace(ref, type=type, load=load, source=source or ref.source)


def unit_gain(norm: Node) -> Node:
    """Returns the norm with a gain of ones, and marks it so by the attr `unit_gain`."""
    ref = norm.weights["weight"]
    ones = replace(ref, load=lambda: Dense(np.ones(ref.type.shape, DTYPES[ref.type.dtype])))
    return replace(norm, weights={"weight": ones}, attrs=norm.attrs | {UNIT_GAIN: True})


def own_gain(norm: Node, gain: WeightRef) -> Node:
    """Returns the norm with this gain, and not marked as one whose gains are ones."""
    return replace(norm, weights={"weight": gain}, attrs=without(norm.attrs, UNIT_GAIN))


def slices(value: str, widths: Mapping[str, int]) -> list[Node]:
    """Returns the nodes that cut a value into features side by side, by name and width."""
    nodes, start = [], 0
    for name, width in widths.items():
        nodes.append(Node(name, "slice", (value,), attrs={"start": start, "stop": start + width}))
        start += width
    return nodes


def with_activations(graph: Graph, activations: str) -> Graph:
    """Returns the graph whose linears read their inputs in this way.

    Args:
      activations: "model", as the graph says; "float", as they are; "int8", rounded to 8 bits per
        token.

    Raises BadInput for another word.
    """
    ways = {"model": lambda unit: unit, "float": float_inputs, "int8": int8_inputs}
    if activations not in ways:
        raise BadInput(f"unknown activations {activations!r}{nearest(activations, ways)}")
    return graph.with_units(tuple(map(ways[activations], graph.units)))


def float_inputs(unit: Block) -> Block:
    """Returns the unit whose linears take their inputs as they are, not rounded to 8 bits."""
    nodes = (replace(node, attrs=without(node.attrs, "activations")) for node in unit.nodes)
    return replace(unit, nodes=tuple(nodes))


def int8_inputs(unit: Block) -> Block:
    """Returns the unit whose linears round their inputs to 8 bits per token."""
    nodes = (
        replace(node, attrs=node.attrs | {"activations": INT8}) if node.op == "linear" else node
        for node in unit.nodes
    )
    return replace(unit, nodes=tuple(nodes))


def int8_kv(graph: Graph) -> Graph:
    """Returns the graph whose attentions round keys and values to 8 bits, and cache them so."""

    def rounds(unit: Block, node: Node) -> Node:
        kv = {"kv": INT8} if node.op == "attention" else {}
        return replace(node, attrs=node.attrs | kv)

    return map_nodes(graph, rounds)
