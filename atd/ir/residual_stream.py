"""Finds what reads the residual stream of a unit and what is added to it, by data flow.

The stream enters a unit as its input `x`; each addition makes the next value of it. Norms and
additions alone read it, or linears where a family has no norm in front of them (OLMo 2).
"""

from dataclasses import dataclass

from atd.errors import BadInput
from atd.ir.graph import Block, Node
from atd.ir.notes import UNIT_GAIN


@dataclass(frozen=True)
class StreamLinears:
    """The linears next to the residual stream of a unit."""

    readers: tuple[Node, ...]  # read a norm of the stream
    writers: tuple[Node, ...]  # are added to it
    ends: bool  # whether the unit's output is the stream


def stream_linears(unit: Block) -> StreamLinears:
    """Returns the linears next to the stream, where it could be written in another basis.

    Raises:
        BadInput: a norm on the stream has a gain; a norm is added to the stream; something else
            than norms and additions reads it, or something else than linears reads its norms.
    """
    if norm := norm_on_stream(unit):
        raise BadInput(
            f"{norm} is added to the residual stream, and the gain of a norm does not commute with "
            "a rotation; use r1 = false"
        )
    stream, normed, readers, writers = {"x"}, set(), [], []
    for node in unit.nodes:
        name = unit.full_name(node)
        if not normed.isdisjoint(node.inputs):
            if node.op != "linear":
                raise BadInput(
                    f"{name} ({node.op}) reads a norm of the residual stream, "
                    "which linears alone may"
                )
            readers.append(node)
        if stream.isdisjoint(node.inputs):
            continue
        if _is_norm(node):
            if not node.attrs.get(UNIT_GAIN):
                raise BadInput(
                    f"the norm {name} has a gain, which does not commute with a rotation; "
                    "put fold_norms before rotate"
                )
            normed.add(node.name)
        elif node.op == "add":
            for value in set(node.inputs) - stream:
                writer = unit.node(value)
                if writer.op != "linear" or unit.readers(value) != [node]:
                    raise BadInput(
                        f"{unit.full_name(writer)} is added to the residual stream, "
                        "but is no linear of its own"
                    )
                writers.append(writer)
            stream.add(node.name)
        else:
            raise BadInput(
                f"{name} ({node.op}) reads the residual stream, which norms and additions alone may"
            )
    return StreamLinears(tuple(readers), tuple(writers), unit.nodes[-1].name in stream)


def norm_on_stream(block: Block) -> str | None:
    """Returns the full name of a norm whose value is added to the stream; None without one."""
    written = {value for node in block.nodes if node.op == "add" for value in node.inputs}
    norms = (node for node in block.nodes if node.op == "rms_norm" and node.name in written)
    return next((block.full_name(node) for node in norms), None)


def values_for_linears(block: Block) -> dict[str, Node | None]:
    """Returns the values of the stream, or norms of them, that linears read, in the block's order,
    each with its norm; None where the stream itself is read.
    """
    values: dict[str, Node | None] = {"x": None}
    for node in block.nodes:
        stream = [value for value in node.inputs if value in values and values[value] is None]
        if stream and (node.op == "add" or _is_norm(node)):
            values[node.name] = node if _is_norm(node) else None
    return {
        value: norm
        for value, norm in values.items()
        if any(reader.op == "linear" for reader in block.readers(value))
    }


def _is_norm(node: Node) -> bool:
    """Whether it is a norm over all features, not over those of each head."""
    return node.op == "rms_norm" and "head_dim" not in node.attrs
