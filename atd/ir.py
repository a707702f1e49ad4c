"""The IR: a model as a prologue, blocks and an epilogue of nodes whose weights have types.

    Graph     config, prologue (embedding), blocks (decoder layers), epilogue (final norm, head). Immutable: a rewrite
              returns a new one.
    Block     a list of nodes in order of execution. `x` is its input (token ids for the prologue, the residual stream
              elsewhere), the last node its output.
    Node      name, op, inputs (names of earlier nodes or `x`), weights by slot, attrs. A node's full name is the
              Hugging Face module path.
    WeightRef a weight's tensor name and type, known without data; `load()` is the only reader.

Every op has a jnp reference in `atd.models.ops`, so a graph runs at every stage. `str(graph)` is stable and is what
golden tests compare. `verify()` checks single assignment, slots, attrs and widths; `Graph.to_json` / `graph_from_json`
are the stored form.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from atd.weights import DenseType, Weight, WeightType, parse_type

Attr = Any  # a JSON value: str, int, float, bool or a tuple of such


class InvalidGraph(ValueError):
    """A rule of the IR is broken; the message names the node and the rule."""


@dataclass(frozen=True)
class WeightRef:
    """A weight that has a name and a type now and data on demand.

    `source` identifies the bytes behind it (file, size, time, place), for the resume key; it is empty for a weight made
    in memory.
    """

    tensor: str  # "model.layers.0.self_attn.q_proj.weight"
    type: WeightType
    load: Callable[[], Weight] = field(compare=False, repr=False)
    source: str = field(default="", compare=False, repr=False)


def in_memory(tensor: str, weight: Weight) -> WeightRef:
    """A reference to a weight that is here already."""
    return WeightRef(tensor, weight.type, lambda: weight)


@dataclass(frozen=True)
class Node:
    """One operation. `name` is relative to its block."""

    name: str
    op: str
    inputs: tuple[str, ...]
    weights: dict[str, WeightRef] = field(default_factory=dict)
    attrs: dict[str, Attr] = field(default_factory=dict)

    @property
    def is_dense_matrix(self) -> bool:
        """A linear or an embedding with a dense weight of its own."""
        return (
            self.op in ("linear", "embed")
            and "weight" in self.weights
            and isinstance(self.weights["weight"].type, DenseType)
        )

    def __str__(self) -> str:
        attrs = "".join(f" {key}={_text(value)}" for key, value in sorted(self.attrs.items()))
        weights = "; ".join(f"{slot}: {ref.type}" for slot, ref in sorted(self.weights.items()))
        inputs = ", ".join(f"%{name}" for name in self.inputs)
        return f"%{self.name} = {self.op}({inputs}){attrs}" + (f" {{{weights}}}" if weights else "")


def _text(value: Attr) -> str:
    if isinstance(value, tuple):
        return f"[{','.join(_text(item) for item in value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Block:
    """Nodes in order of execution; `name` is the module path in front of theirs ("model.layers.3")."""

    name: str
    nodes: tuple[Node, ...]

    def full_name(self, node: Node) -> str:
        return f"{self.name}.{node.name}" if self.name else node.name

    def node(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)

    def replace_node(self, new: Node) -> "Block":
        return replace(self, nodes=tuple(new if node.name == new.name else node for node in self.nodes))

    def map_weights(self, function: Callable[[WeightRef], WeightRef]) -> "Block":
        """The block with every weight replaced by what the function makes of it."""

        def mapped(node: Node) -> Node:
            return replace(node, weights={slot: function(ref) for slot, ref in node.weights.items()})

        return replace(self, nodes=tuple(mapped(node) for node in self.nodes))

    def __str__(self) -> str:
        return "\n".join(f"  {node}" for node in self.nodes)


@dataclass(frozen=True)
class Graph:
    """A model. `config` is the Hugging Face config.json it came with; the nodes' attrs hold all that execution needs."""

    config: dict = field(repr=False)
    prologue: Block
    blocks: tuple[Block, ...]
    epilogue: Block

    @property
    def units(self) -> tuple[Block, ...]:
        """Prologue, blocks, epilogue: what the sweeps carry out one at a time."""
        return (self.prologue, *self.blocks, self.epilogue)

    @property
    def is_tied(self) -> bool:
        """The head takes the embedding's matrix."""
        return any(node.op == "linear" and "weight" not in node.weights for node in self.epilogue.nodes)

    def with_units(self, units: tuple[Block, ...]) -> "Graph":
        return replace(self, prologue=units[0], blocks=tuple(units[1:-1]), epilogue=units[-1])

    def nodes(self) -> Iterator[tuple[str, Node]]:
        """(full name, node) of every node."""
        for block in self.units:
            for node in block.nodes:
                yield block.full_name(node), node

    def weights(self) -> Iterator[tuple[str, WeightRef]]:
        """(full name of the node, weight) of every weight."""
        for name, node in self.nodes():
            for _, ref in sorted(node.weights.items()):
                yield name, ref

    def __str__(self) -> str:
        parts = [f"graph {self.config.get('model_type', '?')} {{", "prologue {", str(self.prologue), "}"]
        for i, block in enumerate(self.blocks):
            parts += [f"block {i} {block.name} {{", str(block), "}"]
        return "\n".join([*parts, "epilogue {", str(self.epilogue), "}", "}"])

    def to_json(self) -> dict:
        """The stored form: structure, types and tensor names, no data and no config."""
        return {
            "prologue": _block_json(self.prologue),
            "blocks": [_block_json(b) for b in self.blocks],
            "epilogue": _block_json(self.epilogue),
        }


def _block_json(block: Block) -> dict:
    nodes = [
        {
            "name": node.name,
            "op": node.op,
            "inputs": list(node.inputs),
            "attrs": node.attrs,
            "weights": {
                slot: {"tensor": ref.tensor, "type": str(ref.type)} for slot, ref in sorted(node.weights.items())
            },
        }
        for node in block.nodes
    ]
    return {"name": block.name, "nodes": nodes}


def graph_from_json(data: dict, config: dict, reference: Callable[[str, WeightType], WeightRef]) -> Graph:
    """The graph whose `to_json` this is; `reference(tensor, type)` says where a weight's data lies.

    Raises ValueError, KeyError or TypeError for other data.
    """

    def block(data: dict) -> Block:
        return Block(data["name"], tuple(node(item) for item in data["nodes"]))

    def node(data: dict) -> Node:
        weights = {slot: reference(ref["tensor"], parse_type(ref["type"])) for slot, ref in data["weights"].items()}
        return Node(
            data["name"], data["op"], tuple(data["inputs"]), weights, {k: _tuples(v) for k, v in data["attrs"].items()}
        )

    return Graph(
        config, block(data["prologue"]), tuple(block(item) for item in data["blocks"]), block(data["epilogue"])
    )


def _tuples(value):
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


# --- rules ------------------------------------------------------------------------------------------------------------


# Names of the linears by which `rotate` turns the residual stream into another basis and back.
ROTATIONS = ("rotate_in", "rotate_out", "rotate_head")


@dataclass(frozen=True)
class Op:
    """What a node of this op must have. Widths are numbers of features on the last axis."""

    inputs: int
    slots: tuple[str, ...] = ()  # required
    optional: tuple[str, ...] = ()
    attrs: tuple[str, ...] = ()  # required
    optional_attrs: tuple[str, ...] = ()  # that change what it computes; any others are notes of passes to passes


OPS = {
    "embed": Op(1, ("weight",)),  # token ids -> rows of the table
    "rms_norm": Op(
        1, ("weight",), attrs=("eps",), optional_attrs=("head_dim",)
    ),  # over the last axis, or each run of `head_dim` features of it
    "linear": Op(
        1, (), ("weight", "bias")
    ),  # x @ weight.T + bias; no weight but attrs tied_to="model.embed_tokens": the embedding's
    "rope": Op(1, attrs=("head_dim", "theta", "scaling")),
    "attention": Op(3, attrs=("heads", "kv_heads", "head_dim", "window")),  # causal; window 0: all of the past
    "silu_mul": Op(2),  # silu(a) * b
    "add": Op(2),
    "slice": Op(1, attrs=("start", "stop")),  # features [start, stop)
}


def verify(graph: Graph) -> None:
    """Raises InvalidGraph, naming node and rule, unless every block is well formed and the widths of all values agree."""
    vocabulary, hidden = _embedding_shape(graph)
    tensors: dict[str, str] = {}
    for block in graph.units:
        inputs = 1 if block is graph.prologue else hidden
        output = _verify_block(block, inputs, embedding=(vocabulary, hidden))
        expected = vocabulary if block is graph.epilogue else hidden
        if output != expected:
            raise InvalidGraph(
                f"{block.name or 'epilogue'}: its last node has {output} features, {expected} are expected"
            )
        for node in block.nodes:
            for ref in node.weights.values():
                if ref.tensor in tensors:
                    raise InvalidGraph(
                        f"{block.full_name(node)}: tensor {ref.tensor} is {tensors[ref.tensor]}'s already (tie with attrs tied_to)"
                    )
                tensors[ref.tensor] = block.full_name(node)


def _embedding_shape(graph: Graph) -> tuple[int, int]:
    for node in graph.prologue.nodes:
        if node.op == "embed" and "weight" in node.weights:
            vocabulary, hidden = node.weights["weight"].type.shape
            return vocabulary, hidden
    raise InvalidGraph("the prologue has no embed node with a weight")


def _verify_block(block: Block, inputs: int, embedding: tuple[int, int]) -> int:
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
        try:
            widths[node.name] = _width(node, [widths[value] for value in node.inputs], embedding)
        except InvalidGraph as error:
            raise broken(str(error)) from None
    if len(widths) == 1:
        raise InvalidGraph(f"{block.name or 'epilogue'}: a block needs at least one node")
    return widths[block.nodes[-1].name]


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
            expect("the length of the gain", node.weights["weight"].type.shape[0], attrs.get("head_dim", inputs[0]))
            return inputs[0]
        case "linear":
            if "weight" not in node.weights and "tied_to" not in attrs:
                raise InvalidGraph("linear needs a weight in slot 'weight' or the attr 'tied_to'")
            out, width = node.weights["weight"].type.shape if "weight" in node.weights else embedding
            expect("the number of input features", inputs[0], width)
            if "bias" in node.weights:
                expect("the length of the bias", node.weights["bias"].type.shape[0], out)
            return out
        case "rope":
            expect("the remainder of features by head_dim", inputs[0] % attrs["head_dim"], 0)
            return inputs[0]
        case "attention":
            for i, heads in enumerate((attrs["heads"], attrs["kv_heads"], attrs["kv_heads"])):
                expect(f"the width of input {i} (heads x head_dim)", inputs[i], heads * attrs["head_dim"])
            expect("the remainder of heads by kv_heads", attrs["heads"] % attrs["kv_heads"], 0)
            return inputs[0]
        case "slice":
            if not 0 <= attrs["start"] < attrs["stop"] <= inputs[0]:
                raise InvalidGraph(f"slice [{attrs['start']}, {attrs['stop']}) does not lie in {inputs[0]} features")
            return attrs["stop"] - attrs["start"]
        case _:  # silu_mul, add
            expect("the width of the second input", inputs[1], inputs[0])
            return inputs[0]
