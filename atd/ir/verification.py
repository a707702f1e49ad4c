"""Verifies that a graph is well formed: single assignment, slots, attrs and widths."""

import math
from collections.abc import Callable
from typing import Any

from atd.ir.graph import Block, Graph, InvalidGraph, Node
from atd.ir.ops import INT8, OPS


def _is_count(value) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _is_index(value) -> bool:
    return (value == 0 and type(value) is int) or _is_count(value)


def _is_positive(value) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _is_block(value) -> bool:
    """Whether it is a power of two, 2 or more."""
    return _is_count(value) and value > 1 and not value & (value - 1)


def _is_scaling(value) -> bool:
    """Whether `atd.models.rope.rope_frequencies` takes it."""
    match value:
        case ():
            return True
        case ("linear", factor):
            return _is_positive(factor)
        case ("llama3", factor, low, high, original):
            return all(map(_is_positive, (factor, low, high, original))) and low < high
        case ("yarn", factor, original, fast, slow, truncate, attention):
            numbers = (factor, original, fast, slow, attention)
            return all(map(_is_positive, numbers)) and slow < fast and type(truncate) is bool
        case ("longrope", original, tuple(short), tuple(long), attention):
            return all(map(_is_positive, (original, *short, *long, attention)))
    return False


# What values the attrs may have that ops read.
_VALID: dict[str, Callable[[Any], bool]] = {
    "eps": lambda value: value == 0 or _is_positive(value),
    "theta": _is_positive,
    "scaling": _is_scaling,
    "head_dim": _is_count,
    "rotary": lambda value: _is_count(value) and value % 2 == 0,
    "heads": _is_count,
    "kv_heads": _is_count,
    "window": _is_index,
    "scale": _is_positive,
    "softcap": _is_positive,
    "cap": _is_positive,
    "block": _is_block,
    "activations": lambda value: value == INT8,
    "kv": lambda value: value == INT8,
    "start": _is_index,
    "stop": _is_count,
    "over": lambda value: False,  # in graphs of one of several devices alone, and in no file
}


def verify(graph: Graph) -> None:
    """Checks that blocks are well formed, that widths agree and that no tensor is used twice.

    Raises:
        InvalidGraph: a rule is broken; the message names the node and the rule.
    """
    vocabulary, hidden = _embedding_shape(graph)
    tensors: dict[str, str] = {}
    for block in graph.units:
        inputs = 1 if block is graph.prologue else hidden
        output = _verify_block(block, inputs, (vocabulary, hidden), graph.prologue)
        expected = vocabulary if block is graph.epilogue else hidden
        if output != expected:
            raise InvalidGraph(
                f"{block.name or 'epilogue'}: its last node has {output} features, "
                f"{expected} are expected"
            )
        for node in block.nodes:
            for ref in node.weights.values():
                if ref.tensor in tensors:
                    raise InvalidGraph(
                        f"{block.full_name(node)}: tensor {ref.tensor} is "
                        f"{tensors[ref.tensor]}'s already (tie with attrs tied_to)"
                    )
                tensors[ref.tensor] = block.full_name(node)


def _embedding_shape(graph: Graph) -> tuple[int, int]:
    """(vocabulary, hidden) of the prologue's embedding."""
    for node in graph.prologue.nodes:
        if node.op == "embed" and "weight" in node.weights:
            vocabulary, hidden = node.weights["weight"].type.shape
            return vocabulary, hidden
    raise InvalidGraph("the prologue has no embed node with a weight")


def _verify_block(block: Block, inputs: int, embedding: tuple[int, int], prologue: Block) -> int:
    """Checks each node against its op; returns the width of the last one."""
    widths = {"x": inputs}
    for node in block.nodes:
        name = block.full_name(node)

        def broken(rule: str, name=name):
            return InvalidGraph(f"{name}: {rule}")

        if node.op not in OPS:
            raise broken(f"unknown op {node.op!r}")
        op = OPS[node.op]
        if node.name in widths:
            raise broken("its name is used twice in the block")
        if missing := [value for value in node.inputs if value not in widths]:
            raise broken(f"input %{missing[0]} is not defined before it")
        if len(node.inputs) != op.inputs:
            raise broken(f"{node.op} takes {op.inputs} inputs, not {len(node.inputs)}")
        if missing := [slot for slot in op.slots if slot not in node.weights]:
            raise broken(f"{node.op} needs a weight in slot {missing[0]!r}")
        if extra := [slot for slot in node.weights if slot not in op.slots + op.optional]:
            raise broken(f"{node.op} has no slot {extra[0]!r}")
        if missing := [attr for attr in op.attrs if attr not in node.attrs]:
            raise broken(f"{node.op} needs the attr {missing[0]!r}")
        if (node.op == "embed") != (block is prologue and "x" in node.inputs):
            raise broken("an embed, and nothing else, reads token ids, the prologue's %x")
        read = [attr for attr in (*op.attrs, *op.optional_attrs) if attr in node.attrs]
        if wrong := [attr for attr in read if not _VALID[attr](node.attrs[attr])]:
            raise broken(f"the attr {wrong[0]!r} cannot be {node.attrs[wrong[0]]!r}")
        try:
            widths[node.name] = _width(node, [widths[value] for value in node.inputs], embedding)
        except InvalidGraph as error:
            raise broken(str(error)) from None
    if len(widths) == 1:
        raise InvalidGraph(f"{block.name or 'epilogue'}: a block needs at least one node")
    return widths[block.nodes[-1].name]


def _check_rope(attrs: dict, expect: Callable[[str, int, int], None]) -> None:
    """Raises InvalidGraph where the attrs of a rope do not fit each other."""
    head_dim, scaling = attrs["head_dim"], attrs["scaling"]
    rotary = attrs.get("rotary", head_dim)
    if rotary > head_dim:
        raise InvalidGraph(f"rotary is {rotary}, at most head_dim = {head_dim} is expected")
    if scaling and scaling[0] == "longrope":
        for factors in scaling[2:4]:
            expect("the number of factors of longrope", len(factors), rotary // 2)
    if scaling and scaling[0] == "yarn" and attrs["theta"] <= 1:
        raise InvalidGraph(f"theta is {attrs['theta']}, and yarn needs one above 1")


def _width(node: Node, inputs: list[int], embedding: tuple[int, int]) -> int:
    """The number of features of the node's value; raises InvalidGraph with the broken rule."""

    def expect(what: str, found: int, wanted: int) -> None:
        if found != wanted:
            raise InvalidGraph(f"{what} is {found}, {wanted} is expected")

    attrs = node.attrs
    match node.op:
        case "embed":
            return embedding[1]
        case "rms_norm":
            expect(
                "the length of the gain",
                node.weights["weight"].type.shape[0],
                attrs.get("head_dim", inputs[0]),
            )
            return inputs[0]
        case "linear":
            if "weight" not in node.weights and "tied_to" not in attrs:
                raise InvalidGraph("linear needs a weight in slot 'weight' or the attr 'tied_to'")
            out, width = (
                node.weights["weight"].type.shape if "weight" in node.weights else embedding
            )
            expect("the number of input features", inputs[0], width)
            if "bias" in node.weights:
                expect("the length of the bias", node.weights["bias"].type.shape[0], out)
            return out
        case "rope":
            expect("the remainder of features by head_dim", inputs[0] % attrs["head_dim"], 0)
            _check_rope(attrs, expect)
            return inputs[0]
        case "attention":
            for i, heads in enumerate((attrs["heads"], attrs["kv_heads"], attrs["kv_heads"])):
                expect(
                    f"the width of input {i} (heads x head_dim)",
                    inputs[i],
                    heads * attrs["head_dim"],
                )
            expect("the remainder of heads by kv_heads", attrs["heads"] % attrs["kv_heads"], 0)
            return inputs[0]
        case "hadamard":
            expect("the remainder of features by block", inputs[0] % attrs["block"], 0)
            return inputs[0]
        case "softcap":
            return inputs[0]
        case "slice":
            if not 0 <= attrs["start"] < attrs["stop"] <= inputs[0]:
                raise InvalidGraph(
                    f"slice [{attrs['start']}, {attrs['stop']}) does not lie in "
                    f"{inputs[0]} features"
                )
            return attrs["stop"] - attrs["start"]
        case _:  # silu_mul, relu2_mul, gelu_mul, add
            expect("the width of the second input", inputs[1], inputs[0])
            return inputs[0]
