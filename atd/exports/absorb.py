"""Takes the rotations out of a graph: other tools do not know the nodes of a rotated model."""

from dataclasses import replace

import numpy as np

from atd.decomposition.rotations import block_rotation, by_rows
from atd.errors import BadInput
from atd.ir import ROTATIONS, Block, Graph
from atd.ir.notes import without
from atd.ir.rewrite import map_array, unit_gain, with_weight
from atd.weights import DTYPES

IN, OUT, HEAD = ROTATIONS


def absorb(graph: Graph) -> Graph:
    """Returns a graph of the same function without the nodes of `rotate`.

    Those of the stream are multiplied into a rotated embedding E R and a head E diag(g) R of its
    own, R the rotation of the stream and g the gain of the final norm; Hadamard transforms into the
    linears that read them. All of these become dense f32.
    """
    return _absorb_stream(graph.with_units(tuple(map(_absorb_transforms, graph.units))))


def _absorb_transforms(block: Block) -> Block:
    """The block without Hadamard transforms: W (H x) = (W H) x."""
    for node in [node for node in block.nodes if node.op == "hadamard"]:
        readers = block.readers(node.name)
        if not readers or any(n.op != "linear" or "weight" not in n.weights for n in readers):
            raise BadInput(
                f"{block.full_name(node)} is a Hadamard transform that is not read by linears "
                "alone, and dense checkpoints have no such op"
            )
        for reader in readers:
            matrix = reader.weights["weight"]
            rotation = block_rotation(np.ones(matrix.type.shape[1]), node.attrs["block"])

            def turned(array: np.ndarray, rotation=rotation) -> np.ndarray:
                return by_rows(rotation.apply, array, DTYPES["f32"])

            inputs = tuple(node.inputs[0] if v == node.name else v for v in reader.inputs)
            reader = replace(reader, inputs=inputs)
            block = block.replace_node(with_weight(reader, map_array(matrix, "f32", turned)))
        block = _without_nodes(block, node.name)
    return block


def _absorb_stream(graph: Graph) -> Graph:
    """The graph without the nodes that turn the stream into another basis and back."""
    prologue, epilogue = graph.prologue, graph.epilogue
    if not any(node.name == OUT for node in epilogue.nodes):
        return graph
    embed, into, out = prologue.nodes[0], prologue.nodes[-1], epilogue.node(OUT)
    rotated = into.name != IN  # the embedding already
    (norm,) = epilogue.readers(OUT)
    (head,) = epilogue.readers(HEAD if rotated else norm.name)
    embedding, gain = embed.weights["weight"], norm.weights["weight"]

    def rotated_table(table: np.ndarray) -> np.ndarray:
        return table if rotated else _times(table, into.weights["weight"].dense().T)

    def head_matrix(table: np.ndarray) -> np.ndarray:
        rotation = out.weights["weight"].dense()  # R: x W^T = x R^T
        matrix = gain.dense()[:, None] * rotation
        return _times(table, rotation.T @ matrix if rotated else matrix)

    own = replace(
        map_array(embedding, "f32", head_matrix), tensor=f"{epilogue.full_name(head)}.weight"
    )
    head = replace(head, inputs=(norm.name,), attrs=without(head.attrs, "tied_to"))
    embed = with_weight(embed, map_array(embedding, "f32", rotated_table))
    norm = replace(unit_gain(norm), inputs=("x",))
    epilogue = epilogue.replace_node(with_weight(head, own)).replace_node(norm)
    return replace(
        graph,
        config=graph.config | {"tie_word_embeddings": False},
        prologue=_without_nodes(prologue.replace_node(embed), IN),
        epilogue=_without_nodes(epilogue, OUT, HEAD),
    )


def _times(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """rows @ matrix, some rows at a time."""
    return by_rows(lambda part: part @ matrix, rows, DTYPES["f32"])


def _without_nodes(unit: Block, *names: str) -> Block:
    """The unit but for the nodes of these names."""
    return replace(unit, nodes=tuple(node for node in unit.nodes if node.name not in names))
