"""Compares a stored graph with the one that its config.json stands for, which other libraries run.

Passes join linears (`fuse`), turn the residual stream into another basis and back, and put Hadamard
transforms in front of linears (`rotate`). `plain` undoes these in the structure of a graph; weights
stay as they are.
"""

import dataclasses

from atd.ir import OPS, ROTATIONS, Block, Graph, Node, WeightRef
from atd.ir.rewrite import joined_parts
from atd.models.config import GEMMA2, GEMMA3, GRANITE, PHI3, parse_config
from atd.models.llama import llama_graph
from atd.weights import DenseType

# What graphs of a family have in place of the weights of its checkpoints.
OTHER_WEIGHTS = {
    GEMMA2: "model.norm: a gain of 1 + w in place of w (`atd.models.gemma`)",
    GEMMA3: "model.norm: a gain of 1 + w in place of w (`atd.models.gemma`)",
    GRANITE: "model.norm: multipliers in the weights (`atd.models.granite`)",
    PHI3: "self_attn.q_proj: a linear of its own in place of rows of qkv_proj (`atd.models.phi3`)",
}
Described = tuple[str, str, tuple[str, ...], dict]  # name, op, inputs, attrs


def difference(graph: Graph, origin: object) -> str | None:
    """Returns the first node in which a graph differs from that of its config.json, apart from
    joined linears, rotations and Hadamard transforms; None where there is none.

    Args:
        graph: the graph.
        origin: what errors of the config name.

    Raises:
        BadInput: the config is none of a family that `atd` knows.
    """

    def reference(tensor: str, *shape: int) -> WeightRef:
        def load():
            raise AssertionError(f"{tensor} is known by its shape alone")

        return WeightRef(tensor, DenseType(shape, "f32"), load)

    config = parse_config(graph.config, origin)
    if config.model_type in OTHER_WEIGHTS:
        return OTHER_WEIGHTS[config.model_type]
    expected = llama_graph(graph.config, config, reference)
    mine, theirs = _described(plain(graph)), _described(expected)
    for (unit, own), (_, other) in zip(mine, theirs, strict=False):
        if own != other:
            return f"{unit or 'epilogue'}: {_shown(own)} in place of {_shown(other)}"
    return None if len(mine) == len(theirs) else f"{len(mine)} nodes in place of {len(theirs)}"


def plain(graph: Graph) -> Graph:
    """Returns the graph with joined linears apart, each with the weight of them all, and without
    rotations of the stream and Hadamard transforms.
    """
    return graph.with_units(tuple(map(_plain_unit, graph.units)))


def _plain_unit(unit: Block) -> Block:
    value = {}  # what stands for the value of a node that is left out
    nodes: list[Node] = []
    joined = {node.name: node for node in unit.nodes if joined_parts(unit, node)}
    for node in unit.nodes:
        inputs = tuple(value.get(name, name) for name in node.inputs)
        if node.op == "hadamard" or node.name in ROTATIONS:
            value[node.name] = inputs[0]
        elif node.op == "slice" and node.inputs[0] in joined:
            whole = joined[node.inputs[0]]
            sources = tuple(value.get(name, name) for name in whole.inputs)
            nodes.append(Node(node.name, "linear", sources, whole.weights, whole.attrs))
        elif node.name not in joined:
            nodes.append(dataclasses.replace(node, inputs=inputs))
    return Block(unit.name, tuple(nodes))


def _described(graph: Graph) -> list[tuple[str, Described]]:
    """(name of the unit, what a node computes) for each node."""
    found = []
    for unit in graph.units:
        for node in unit.nodes:
            op = OPS[node.op]
            names = (*op.attrs, *op.optional_attrs, "tied_to")
            attrs = {key: node.attrs[key] for key in names if key in node.attrs}
            found.append((unit.name, (node.name, node.op, node.inputs, attrs)))
    return found


def _shown(node: Described) -> str:
    name, op, inputs, attrs = node
    options = "".join(f" {key}={value}" for key, value in sorted(attrs.items()))
    return f"{name} = {op}({', '.join(inputs)}){options}"
