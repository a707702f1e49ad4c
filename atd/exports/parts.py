"""Gives the weights of a graph under the names that other tools know: joined matrices apart."""

from collections.abc import Iterator

from atd.ir import Block, Node, WeightRef
from atd.ir.rewrite import joined_parts


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
