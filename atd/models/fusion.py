"""Which nodes of a block kernels compute together (`kernels.matmul.fused` and `attend`).

rms_norm, linear
    The norm is computed where activations are prepared; each linear that reads it does so anew.
linear, slice, slice, silu_mul
    SwiGLU is computed where results are written, if gate and up are halves of one matrix.
linear, add
    Likewise the residual stream is added.
slice, slice, slice, rope, rope, attention
    Of one token per sequence to a cache; without slices likewise.

Products of one token are so short that every other kernel counts: of the eight launches of a
block's MLP four are left out.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass

from atd.ir import Block, Node
from atd.models.rope import rope_factor

_NOT_IN_KERNELS = ("head_dim", "over")  # attrs of a norm


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
    parts: tuple[tuple[str, int], ...]  # q, k, v before rope: their value, and first feature in it


def plan(block: Block, weights: Mapping[str, Mapping]) -> list[Node | Product | Attention]:
    """Returns the nodes in order, linears as products, attentions with their ropes.

    Args:
        block: its nodes may be some of a unit's: values that none of them makes are inputs.
        weights: by node and slot; which slots there are decides, and the types of matrices.
    """
    steps: dict[str, Product | Attention] = {}  # by their last node
    for node in block.nodes:
        if node.op == "attention" and (found := _attention(block, node)):
            steps[node.name] = found
    for node in block.nodes:
        if node.op == "linear":
            product = _product(block, node, weights.get(node.name, {}), steps)
            steps[product.nodes[-1].name] = product
    absorbed = {node.name for step in steps.values() for node in step.nodes[:-1]}
    return [steps.get(n.name, n) for n in block.nodes if n.name not in absorbed]


def _product(block: Block, linear: Node, mine: Mapping, taken: Container[str]) -> Product:
    """The product of a linear. taken: last nodes of other products."""
    norm, after = _norm_before(block, linear), _nodes_after(block, linear, mine, taken)
    nodes = (*([norm] if norm else []), linear, *after)
    last, residual = nodes[-1], None
    if last.op == "add":
        residual = next(value for value in last.inputs if value != linear.name)
    return Product(nodes, linear, nodes[0].inputs[0], norm, last.op == "silu_mul", residual)


def _norm_before(block: Block, linear: Node) -> Node | None:
    """The norm that makes the linear's input and is read by linears alone."""
    made = _maker(block, linear.inputs[0])
    if made is None or made.op != "rms_norm" or not made.attrs.keys().isdisjoint(_NOT_IN_KERNELS):
        return None
    return made if all(node.op == "linear" for node in block.readers(made.name)) else None


def _nodes_after(
    block: Block, linear: Node, mine: Mapping, taken: Container[str]
) -> tuple[Node, ...]:
    """The sum that alone reads the linear, or what makes SwiGLU of its halves."""
    readers = block.readers(linear.name)
    if "bias" in mine:
        return ()
    match [node.op for node in readers]:
        case ["add"] if len(set(readers[0].inputs)) == 2 and readers[0].name not in taken:
            return (readers[0],)
        case ["slice", "slice"]:
            made = block.readers(readers[0].name)
            alone = made == block.readers(readers[1].name) and len(made) == 1
            if alone and made[0].op == "silu_mul":
                gate, up = (block.node(value) for value in made[0].inputs)
                width = gate.attrs["stop"]
                bounds = gate.attrs["start"], up.attrs["start"], up.attrs["stop"]
                halves = bounds == (0, width, 2 * width)
                if halves and "weight" in mine and mine["weight"].type.shape[0] == 2 * width:
                    return gate, up, made[0]
    return ()


def _attention(block: Block, attention: Node) -> Attention | None:
    """The attention with two ropes that it alone reads, and the slices that are read here alone."""
    made = [_maker(block, value) for value in attention.inputs[:2]]
    ropes = [node for node in made if node and node.op == "rope"]
    ropes = [rope for rope in ropes if block.readers(rope.name) == [attention]]
    if len(ropes) < 2 or ropes[0].attrs != ropes[1].attrs:
        return None
    if ropes[0].attrs["head_dim"] != attention.attrs["head_dim"]:
        return None
    if not _in_kernels(ropes[0], attention):
        return None
    together, parts = [*ropes, attention], []
    values = [*(rope.inputs[0] for rope in ropes), attention.inputs[2]]
    for reader, value in zip([*together], values, strict=True):
        source = _maker(block, value)
        if source and source.op == "slice" and block.readers(value) == [reader]:
            together.append(source)
            parts.append((source.inputs[0], source.attrs["start"]))
        else:
            parts.append((value, 0))
    nodes = tuple(node for node in block.nodes if node in together)
    return Attention(nodes, attention, ropes[0], tuple(parts))


def _in_kernels(rope: Node, attention: Node) -> bool:
    """Whether `kernels.attend` computes these: all features are rotated, by frequencies that do not
    depend on the length, cos and sin have no factor, and scores are q k' / sqrt(head_dim).
    """
    if not attention.attrs.keys().isdisjoint(("scale", "softcap")):
        return False
    scaling = rope.attrs["scaling"]
    depends = bool(scaling) and scaling[0] == "longrope"
    return "rotary" not in rope.attrs and not depends and rope_factor(scaling) == 1.0


def _maker(block: Block, value: str) -> Node | None:
    """The node whose value it is; None for an input."""
    return next((node for node in block.nodes if node.name == value), None)
