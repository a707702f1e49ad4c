"""Gives the weights of a graph under the names that other tools know: joined matrices apart."""

from collections.abc import Iterator

from atd.errors import BadInput
from atd.ir import Block, Graph, Node, WeightRef
from atd.ir.rewrite import joined_parts
from atd.progress import Say


def check_inputs(graph: Graph, say: Say) -> None:
    """Says that formats of plain linears leave out the 8-bit inputs of a graph that has them.

    Raises BadInput for linears with a norm of their own, which these formats do not have.
    """
    if own := [name for name, _ in graph.nodes() if name.endswith("_proj.rms_norm")]:
        raise BadInput(
            f"{own[0]} is a norm of one linear, which this format does not have; use --to bitnet"
        )
    if any("activations" in node.attrs for _, node in graph.nodes()):
        say("note: this model rounds the inputs of linears to 8 bits; the exported one does not")


def parts(unit: Block, node: Node) -> Iterator[tuple[str, WeightRef, int, int]]:
    """Yields (tensor name, weight, first row, row behind the last) for the node's weights.

    A linear that `fuse` joined is taken apart by its slices; any other weight is one part.
    """
    slices = joined_parts(unit, node)
    for slot, ref in node.weights.items():
        if not slices:
            yield ref.tensor, ref, 0, ref.type.shape[0]
        for part in slices:
            name = f"{unit.full_name(part)}.{slot}"
            yield name, ref, part.attrs["start"], part.attrs["stop"]
