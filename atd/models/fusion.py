"""Which nodes of a block run together, on kernels that compute them on the way (`kernels.matmul.fused` and `attend`).

    rms_norm, linear            the norm is computed where activations are prepared; each linear that reads it does so anew
    slice, slice, silu_mul, linear      likewise, where gate and up are the halves of one value
    linear, add                 the residual stream is added where results are written
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
    gated: bool = False
    residual: str | None = None  # the value that is added


@dataclass(frozen=True)
class Attention:
    """An attention and what makes its q, k and v. Its value is that of the last node."""

    nodes: tuple[Node, ...]  # in order; run one by one they give the same
    attention: Node
    rope: Node  # of q; that of k is alike
    parts: tuple[tuple[str, int], ...]  # q, k, v before rope: the value and the feature that they begin with


def plan(block: Block, weights: Mapping[str, Mapping]) -> list[Node | Product | Attention]:
    """The nodes in order, linears as products, attentions with their ropes. weights: by node and slot, of which only what
    slots there are counts."""
    nodes = {node.name: node for node in block.nodes}
    readers: dict[str, list[Node]] = {name: [] for name in ("x", *nodes)}
    for node in block.nodes:
        for value in node.inputs:
            readers[value].append(node)

    products: dict[str, Product | Attention] = {}
    absorbed: set[str] = set()

    def feeds_linears(name: str) -> bool:
        return bool(readers[name]) and all(node.op == "linear" for node in readers[name])

    def before(linear: Node) -> tuple[Node, ...]:
        """What makes the linear's input and is read by linears alone."""
        made = nodes.get(linear.inputs[0])
        if made is None or not feeds_linears(made.name):
            return ()
        if made.op == "rms_norm" and "head_dim" not in made.attrs:
            return (made,)
        if made.op == "silu_mul":
            halves = [nodes.get(value) for value in made.inputs]
            if all(half and half.op == "slice" and readers[half.name] == [made] for half in halves):
                gate, up = (half for half in halves if half)
                width = gate.attrs["stop"]
                halved = [gate.attrs["start"], up.attrs["start"], up.attrs["stop"]] == [0, width, 2 * width]
                if gate.inputs == up.inputs and halved and _width(nodes.get(gate.inputs[0]), weights) == 2 * width:
                    return (gate, up, made)
        return ()

    def after(linear: Node) -> tuple[Node, ...]:
        """The sum that alone reads the linear, where no other product has it."""
        (only,) = readers[linear.name] if len(readers[linear.name]) == 1 else (None,)
        takes = only is not None and only.op == "add" and len(set(only.inputs)) == 2 and only.name not in products
        return (only,) if only and takes and "bias" not in weights.get(linear.name, {}) else ()

    def attended(attention: Node) -> Attention | None:
        """With its two ropes, which it alone reads, and the slices that are read by these and by it alone."""
        made = [nodes.get(value) for value in attention.inputs[:2]]
        ropes = [node for node in made if node and node.op == "rope" and readers[node.name] == [attention]]
        alike = len(ropes) == 2 and ropes[0].attrs == ropes[1].attrs
        if not alike or ropes[0].attrs["head_dim"] != attention.attrs["head_dim"]:
            return None
        together, parts = [*ropes, attention], []
        for reader, value in [*((rope, rope.inputs[0]) for rope in ropes), (attention, attention.inputs[2])]:
            made = nodes.get(value)
            if made and made.op == "slice" and readers[value] == [reader]:
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
        norm = first[0] if len(first) == 1 else None
        residual = next((value for add in last for value in add.inputs if value != linear.name), None)
        source = together[0].inputs[0]
        products[together[-1].name] = Product(together, linear, source, norm, len(first) == 3, residual)
        absorbed |= {node.name for node in together[:-1]}
    kept = (node for node in block.nodes if node.name not in absorbed)
    return [products.get(node.name, node) for node in kept]


def _width(linear: Node | None, weights: Mapping[str, Mapping]) -> int | None:
    """Features that a linear puts out."""
    weight = weights.get(linear.name, {}).get("weight") if linear is not None and linear.op == "linear" else None
    return None if weight is None else weight.type.shape[0]
