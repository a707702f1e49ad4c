"""Which nodes of a block run together, on kernels that compute them on the way (`kernels.matmul.fused` and `attend`).

    rms_norm, linear            the norm is computed where activations are prepared; each linear that reads it does so anew
    linear, slice, slice, silu_mul      SwiGLU is computed where results are written, where gate and up are halves of one matrix
    linear, add                 likewise the residual stream is added
    slice, slice, slice, rope, rope, attention      of one token to a cache; without slices likewise

A token's products are so short that every other kernel counts: of a block's MLP four launches of eight are left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from atd.ir import Block, Node


@dataclass(frozen=True)
class Product:
    """A linear and what is computed with it. Its value is that of the last node."""

    nodes: tuple[Node, ...]  # in order; run one by one they give the same
    linear: Node
    source: str  # the value that it begins with
    norm: Node | None = None
    gated: bool = False  # SwiGLU of its halves
    residual: str | None = None  # the value that is added


@dataclass(frozen=True)
class Attention:
    """An attention and what makes its q, k and v. Its value is that of the last node."""

    nodes: tuple[Node, ...]  # in order; run one by one they give the same
    attention: Node
    rope: Node  # of q; that of k is alike
    parts: tuple[
        tuple[str, int], ...
    ]  # q, k, v before rope: the value and the feature that they begin with


def plan(block: Block, weights: Mapping[str, Mapping]) -> list[Node | Product | Attention]:
    """The nodes in order, linears as products, attentions with their ropes. weights: by node and slot, of which only what
    slots there are counts."""
    nodes = {node.name: node for node in block.nodes}
    products: dict[str, Product | Attention] = {}
    absorbed: set[str] = set()

    def feeds_linears(name: str) -> bool:
        readers = block.readers(name)
        return bool(readers) and all(node.op == "linear" for node in readers)

    def before(linear: Node) -> tuple[Node, ...]:
        """What makes the linear's input and is read by linears alone."""
        made = nodes.get(linear.inputs[0])
        normed = made is not None and made.op == "rms_norm" and "head_dim" not in made.attrs
        return (made,) if made is not None and normed and feeds_linears(made.name) else ()

    def after(linear: Node) -> tuple[Node, ...]:
        """The sum that alone reads the linear, where no other product has it; or what makes SwiGLU of its halves."""
        reads, mine = block.readers(linear.name), weights.get(linear.name, {})
        if "bias" in mine:
            return ()
        match [node.op for node in reads]:
            case ["add"] if len(set(reads[0].inputs)) == 2 and reads[0].name not in products:
                return (reads[0],)
            case ["slice", "slice"]:
                made = block.readers(reads[0].name)
                if (
                    len(made) == 1
                    and made[0].op == "silu_mul"
                    and block.readers(reads[1].name) == made
                ):
                    gate, up = (nodes[value] for value in made[0].inputs)
                    width = gate.attrs["stop"]
                    halved = [gate.attrs["start"], up.attrs["start"], up.attrs["stop"]] == [
                        0,
                        width,
                        2 * width,
                    ]
                    if halved and "weight" in mine and mine["weight"].type.shape[0] == 2 * width:
                        return (gate, up, made[0])
        return ()

    def attended(attention: Node) -> Attention | None:
        """With its two ropes, which it alone reads, and the slices that are read by these and by it alone."""
        made = [nodes.get(value) for value in attention.inputs[:2]]
        ropes = [
            node
            for node in made
            if node and node.op == "rope" and block.readers(node.name) == [attention]
        ]
        alike = len(ropes) == 2 and ropes[0].attrs == ropes[1].attrs
        if not alike or ropes[0].attrs["head_dim"] != attention.attrs["head_dim"]:
            return None
        together, parts = [*ropes, attention], []
        for reader, value in [
            *((rope, rope.inputs[0]) for rope in ropes),
            (attention, attention.inputs[2]),
        ]:
            made = nodes.get(value)
            if made and made.op == "slice" and block.readers(value) == [reader]:
                together.append(made)
                parts.append((made.inputs[0], made.attrs["start"]))
            else:
                parts.append((value, 0))
        in_order = tuple(node for node in block.nodes if node in together)
        return Attention(in_order, attention, ropes[0], tuple(parts))

    for attention in (node for node in block.nodes if node.op == "attention"):
        if found := attended(attention):
            products[attention.name] = found
            absorbed |= {node.name for node in found.nodes[:-1]}
    for linear in (node for node in block.nodes if node.op == "linear"):
        first, last = before(linear), after(linear)
        together = (*first, linear, *last)
        norm, ends_in = first[0] if first else None, together[-1]
        gated = ends_in.op == "silu_mul"
        residual = (
            next(value for value in ends_in.inputs if value != linear.name)
            if ends_in.op == "add"
            else None
        )
        source = together[0].inputs[0]
        products[together[-1].name] = Product(together, linear, source, norm, gated, residual)
        absorbed |= {node.name for node in together[:-1]}
    kept = (node for node in block.nodes if node.name not in absorbed)
    return [products.get(node.name, node) for node in kept]
