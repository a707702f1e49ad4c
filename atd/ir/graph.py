"""Graphs, blocks, nodes and references to weights, and their stored form."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from atd.errors import AtdError
from atd.ir.notes import SecondMoments
from atd.weights import DenseType, Weight, WeightType, parse_type

Attr = Any  # a JSON value: str, int, float, bool or a tuple of such; or `SecondMoments`


class InvalidGraph(AtdError):
    """A rule of the IR is broken, by a pass or a file; the message names the node and the rule."""


@dataclass(frozen=True)
class WeightRef:
    """A reference to a weight: its name and type are known, its data is loaded on demand."""

    tensor: str  # "model.layers.0.self_attn.q_proj.weight"
    type: WeightType
    load: Callable[[], Weight] = field(compare=False, repr=False)  # the only reader of the data
    # What bytes are behind it (digest of the file, place), for keys of what is kept; empty for a
    # weight made in memory, and for one of a file whose digest was not asked for.
    source: str = field(default="", compare=False, repr=False)

    def dense(self) -> np.ndarray:
        """Loads the weight and returns it dequantized: float32, in the shape of its type."""
        return np.asarray(self.load().dequantize(np.float32))


def in_memory(tensor: str, weight: Weight) -> WeightRef:
    """Returns a reference to a weight that is in memory already."""
    return WeightRef(tensor, weight.type, lambda: weight)


@dataclass(frozen=True)
class Node:
    """One operation."""

    name: str  # relative to its block: "self_attn.q_proj"
    op: str  # one of `atd.ir.OPS`
    inputs: tuple[str, ...]  # names of earlier nodes of the block, or "x", the block's input
    weights: dict[str, WeightRef] = field(default_factory=dict)  # slot -> weight
    attrs: dict[str, Attr] = field(default_factory=dict)

    @property
    def is_dense_matrix(self) -> bool:
        """Whether it is a linear or an embedding with a dense weight of its own."""
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
    """An attr in the text of a graph."""
    if isinstance(value, tuple):
        return f"[{','.join(_text(item) for item in value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Block:
    """Nodes in order of execution."""

    name: str  # the module path in front of the nodes' names: "model.layers.3", or ""
    nodes: tuple[Node, ...]

    def full_name(self, node: Node) -> str:
        """Returns the Hugging Face module path of a node: "model.layers.3.self_attn.q_proj"."""
        return f"{self.name}.{node.name}" if self.name else node.name

    def node(self, name: str) -> Node:
        """Returns the node of this name (relative to the block). Raises StopIteration where there
        is none.
        """
        return next(node for node in self.nodes if node.name == name)

    @property
    def output(self) -> str:
        """The name of the block's value, which is its last node's."""
        return self.nodes[-1].name

    def readers(self, value: str) -> list[Node]:
        """Returns the nodes that have this value among their inputs, in order."""
        return [node for node in self.nodes if value in node.inputs]

    def replace_node(self, new: Node) -> "Block":
        """Returns the block with `new` in place of the node of its name."""
        return replace(
            self, nodes=tuple(new if node.name == new.name else node for node in self.nodes)
        )

    def map_weights(self, function: Callable[[WeightRef], WeightRef]) -> "Block":
        """Returns the block with every weight replaced by what the function makes of it."""

        def mapped(node: Node) -> Node:
            return replace(
                node, weights={slot: function(ref) for slot, ref in node.weights.items()}
            )

        return replace(self, nodes=tuple(mapped(node) for node in self.nodes))

    def __str__(self) -> str:
        return "\n".join(f"  {node}" for node in self.nodes)


@dataclass(frozen=True)
class Graph:
    """A model."""

    # The Hugging Face config.json it came with; nodes do not need it to run.
    config: dict = field(repr=False)
    prologue: Block  # token ids -> residual stream
    blocks: tuple[Block, ...]  # the decoder layers
    epilogue: Block  # residual stream -> logits

    @property
    def units(self) -> tuple[Block, ...]:
        """Prologue, blocks, epilogue: what is converted and run one at a time."""
        return (self.prologue, *self.blocks, self.epilogue)

    @property
    def vocabulary(self) -> int:
        """V, the number of tokens: 0 <= id < V."""
        embed = next(node for node in self.prologue.nodes if node.op == "embed")
        return embed.weights["weight"].type.shape[0]

    @property
    def max_context(self) -> int | None:
        """How many positions the model was made for: max_position_embeddings of its config.json."""
        return self.config.get("max_position_embeddings")

    @property
    def is_tied(self) -> bool:
        """Whether the head takes the embedding's matrix."""
        return any(
            node.op == "linear" and "weight" not in node.weights for node in self.epilogue.nodes
        )

    @property
    def head(self) -> Node:
        """The linear that makes the logits."""
        return next(node for node in reversed(self.epilogue.nodes) if node.op == "linear")

    def with_units(self, units: tuple[Block, ...]) -> "Graph":
        """Returns the graph with other units, in the order of `units`."""
        return replace(self, prologue=units[0], blocks=tuple(units[1:-1]), epilogue=units[-1])

    def nodes(self) -> Iterator[tuple[str, Node]]:
        """Yields (full name, node) for every node."""
        for block in self.units:
            for node in block.nodes:
                yield block.full_name(node), node

    def weights(self) -> Iterator[tuple[str, WeightRef]]:
        """Yields (full name of the node, weight) for every weight."""
        for name, node in self.nodes():
            for _, ref in sorted(node.weights.items()):
                yield name, ref

    def __str__(self) -> str:
        parts = [
            f"graph {self.config.get('model_type', '?')} {{",
            "prologue {",
            str(self.prologue),
            "}",
        ]
        for i, block in enumerate(self.blocks):
            parts += [f"block {i} {block.name} {{", str(block), "}"]
        return "\n".join([*parts, "epilogue {", str(self.epilogue), "}", "}"])

    def to_json(self) -> dict:
        """Returns the stored form: structure, types and tensor names, no data and no config."""
        return {
            "prologue": _block_json(self.prologue),
            "blocks": [_block_json(b) for b in self.blocks],
            "epilogue": _block_json(self.epilogue),
        }


def _block_json(block: Block) -> dict:
    """The stored form of a block."""
    nodes = [
        {
            "name": node.name,
            "op": node.op,
            "inputs": list(node.inputs),
            "attrs": {k: v for k, v in node.attrs.items() if not isinstance(v, SecondMoments)},
            "weights": {
                slot: {"tensor": ref.tensor, "type": str(ref.type)}
                for slot, ref in sorted(node.weights.items())
            },
        }
        for node in block.nodes
    ]
    return {"name": block.name, "nodes": nodes}


def graph_from_json(
    data: dict, config: dict, reference: Callable[[str, WeightType], WeightRef]
) -> Graph:
    """Returns the graph whose `to_json` this is.

    Args:
        data: what `Graph.to_json` returned, or json has made of it.
        config: the model's config.json.
        reference: `reference(tensor, type)` returns the weight of this name, wherever its data
            lies.

    Raises:
        ValueError, KeyError, TypeError: `data` is something else.
    """

    def block(data: dict) -> Block:
        return Block(data["name"], tuple(node(item) for item in data["nodes"]))

    def node(data: dict) -> Node:
        weights = {
            slot: reference(ref["tensor"], parse_type(ref["type"]))
            for slot, ref in data["weights"].items()
        }
        return Node(
            data["name"],
            data["op"],
            tuple(data["inputs"]),
            weights,
            {k: _tuples(v) for k, v in data["attrs"].items()},
        )

    return Graph(
        config,
        block(data["prologue"]),
        tuple(block(item) for item in data["blocks"]),
        block(data["epilogue"]),
    )


def _tuples(value):
    """Lists as tuples, which attrs are made of."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
