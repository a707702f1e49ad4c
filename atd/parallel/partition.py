"""Turns a graph into what each of n devices runs: tensor parallelism as a rewrite.

    q, k, v, gate, up   cut by rows: a device has its share of the heads, and of the MLP's features
    o, down             cut by inputs: a device makes its share of each sum, and `all_sum` adds
                        those of all
    embedding, head     cut by rows: tokens of other devices' rows are zeros until `all_sum`, and
                        `all_gather` puts the logits side by side
    hadamard            of a device's own features where its blocks lie within them; else of all
                        features, put side by side by `all_gather`, of which `share` takes its own
    all else            whole, on every device

Nodes are found by what reads them, and not by their names: linears that attention reads, past ropes
and norms, or one of the gated products. All others follow from those in front of them: a norm over
features that lie on several devices takes its mean over all of them. The text of the new graph
shows where devices exchange values.

Source: M. Shoeybi et al., Megatron-LM, arXiv:1909.08053.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from atd.errors import BadInput
from atd.ir import GATED, INT8, Attr, Block, Graph, Node
from atd.ir.notes import without
from atd.parallel.cuts import BY_INPUTS, Cut, input_unit, row_unit, share_type, shares

Parts = tuple[int, ...]  # widths of what lies side by side in a value that is cut; (): it is whole
WHOLE: Parts = ()


@dataclass(frozen=True)
class Partition:
    """What each device runs.

    Attributes:
        graph: its nodes, with the types of a device's share of the weights; they load that of the
            first device.
        cuts: by unit and node, how weights are cut; nodes that are not there have theirs whole.
    """

    graph: Graph
    cuts: tuple[dict[str, Cut], ...]


def partition(graph: Graph, count: int, axis: str) -> Partition:
    """Cuts a graph for `count` devices.

    Args:
        graph: of one device.
        axis: name of the mesh's axis that the devices form.

    Raises:
        BadInput: sizes do not divide; says which, and which numbers of devices would do.
    """
    if count == 1:
        return Partition(graph, tuple({} for _ in graph.units))
    cutters = [_Cutter(unit, graph) for unit in graph.units]
    check_sizes({what: n for cutter in cutters for what, n in cutter.sizes()}, count)
    units = tuple(cutter.local(count, axis) for cutter in cutters)
    return Partition(graph.with_units(units), tuple(cutter.cuts for cutter in cutters))


def check_sizes(sizes: dict[str, int], count: int) -> None:
    """Raises BadInput where a size is not divided by the number of devices.

    Args:
        sizes: by what they count, as the message names it.
    """
    wrong = [what for what, size in sizes.items() if size % count]
    if wrong:
        most = math.gcd(*sizes.values())
        fit = [str(n) for n in range(1, most + 1) if most % n == 0]
        listed = " or ".join(filter(None, [", ".join(fit[:-1]), fit[-1]]))
        raise BadInput(
            f"{', '.join(wrong)}: cannot be cut for {count} devices; "
            f"--tensor-parallel {listed} would do"
        )


class _Cutter:
    """Cuts a unit."""

    def __init__(self, block: Block, graph: Graph):
        self.block = block
        self.head = graph.head.name if block is graph.epilogue else None
        self.embedding = next(n for n in graph.prologue.nodes if n.op == "embed").weights["weight"]
        self.cuts: dict[str, Cut] = {}
        for node in block.nodes:
            if node.op == "attention" or node.op in GATED:
                for value in node.inputs:
                    self._cut_by_rows(self._writer(node, value))
            if node.op == "embed" or node.name == self.head:
                self.cuts[node.name] = Cut((self.embedding.type.shape[0],))
        self.parts: dict[str, Parts] = {"x": WHOLE}  # of each value
        for node in block.nodes:
            self.parts[node.name] = self._value(node)

    def _writer(self, reader: Node, value: str) -> Node:
        """The linear that writes a value, past what changes neither its heads nor their order."""
        name = value
        while name != "x":
            node = self.block.node(name)
            if node.op == "linear":
                return node
            if node.op not in ("rope", "rms_norm", "slice", "hadamard"):
                break
            (name,) = node.inputs
        raise BadInput(
            f"{self.block.full_name(reader)}: its input %{value} is no linear's, and cannot be "
            "cut for several devices"
        )

    def _cut_by_rows(self, linear: Node) -> None:
        """Has a linear cut by rows; of several that were joined, each by itself."""
        out = linear.weights["weight"].type.shape[0]
        bounds = sorted(
            (node.attrs["start"], node.attrs["stop"])
            for node in self.block.readers(linear.name)
            if node.op == "slice"
        )
        bounds = sorted(set(bounds)) or [(0, out)]
        ends = [0, *(stop for _, stop in bounds)]
        if [start for start, _ in bounds] != ends[:-1] or ends[-1] != out:
            raise BadInput(
                f"{self.block.full_name(linear)}: what its slices take does not lie side by side, "
                "and cannot be cut for several devices"
            )
        self.cuts[linear.name] = Cut(tuple(stop - start for start, stop in bounds))

    def _value(self, node: Node) -> Parts:
        """The parts of a node's value, after all have exchanged theirs. Notes further cuts."""
        given = [self.parts[value] for value in node.inputs]
        match node.op:
            case "linear" if given[0]:
                if node.name in self.cuts:
                    raise self._refusal(node)
                self.cuts[node.name] = BY_INPUTS
                return WHOLE
            case "linear":
                whole = node.name not in self.cuts or node.name == self.head
                return WHOLE if whole else self.cuts[node.name].parts
            case "embed":
                return WHOLE
            case "attention":
                return (node.attrs["heads"] * node.attrs["head_dim"],)
            case "slice" if given[0]:
                return (node.attrs["stop"] - node.attrs["start"],)
            case "slice":
                return WHOLE
            case "rms_norm" if given[0] and "head_dim" not in node.attrs:
                self.cuts[node.name] = Cut(given[0])
        if len(set(given)) > 1:
            raise self._refusal(node)
        return given[0]

    def _refusal(self, node: Node) -> BadInput:
        return BadInput(
            f"{self.block.full_name(node)}: it would need values of other devices, and cannot be "
            "cut for several"
        )

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Yields (what, number) of all that the number of devices has to divide."""
        for node in self.block.nodes:
            attrs = node.attrs
            if node.op == "attention":
                yield f"{attrs['heads']} query heads", attrs["heads"]
                yield f"{attrs['kv_heads']} KV heads", attrs["kv_heads"]
            if cut := self.cuts.get(node.name):
                type = node.weights.get("weight", self.embedding).type
                if cut.parts:
                    yield from _in_units(node, "rows", cut.parts, row_unit(type))
                else:
                    yield from _in_units(node, "inputs", (type.shape[1],), input_unit(type))

    def local(self, count: int, axis: str) -> Block:
        """Returns the nodes that each of `count` devices runs."""
        nodes: list[Node] = []
        renamed: dict[str, str] = {}
        for node in self.block.nodes:
            weights = {slot: self._share(node, ref, count) for slot, ref in node.weights.items()}
            inputs = tuple(renamed.get(value, value) for value in node.inputs)
            attrs = node.attrs | self._local_attrs(node, count, axis)
            before, behind = self._exchanges(node, count)
            attrs = without(attrs, "activations") if before == "rounded" else attrs
            if before:
                (value,), inputs = inputs, (f"{node.name}.{before}",)
                nodes.append(Node(*inputs, before, (value,), attrs={"over": axis}))
            nodes.append(replace(node, inputs=inputs, weights=weights, attrs=attrs))
            if behind:
                name = renamed[node.name] = f"{node.name}.{behind}"
                nodes.append(Node(name, behind, (node.name,), attrs={"over": axis}))
        return replace(self.block, nodes=tuple(nodes))

    def _share(self, node: Node, ref, count: int):
        """The reference to a device's share of a weight."""
        if (cut := self.cuts.get(node.name)) is None:
            return ref
        type = share_type(ref.type, cut, count)
        return replace(ref, type=type, load=lambda: shares(ref.load(), cut, count)[0])

    def _exchanges(self, node: Node, count: int) -> tuple[str, str]:
        """The ops that make what a node reads, and what it gives, of those of all devices; "" where
        there are none.
        """
        if node.name == self.head:
            return "", "all_gather"
        if node.op == "embed" or self.cuts.get(node.name) == BY_INPUTS:
            return "rounded" if node.attrs.get("activations") == INT8 else "", "all_sum"
        if node.op == "hadamard" and self.parts[node.name]:
            width = sum(self.parts[node.name]) // count
            return ("all_gather", "share") if width % node.attrs["block"] else ("", "")
        return "", ""

    def _local_attrs(self, node: Node, count: int, axis: str) -> dict[str, Attr]:
        """What is different in the attrs of a device's node."""
        attrs, given = node.attrs, self.parts[node.inputs[0]]
        match node.op:
            case "embed":
                return {"over": axis}
            case "attention":
                return {name: attrs[name] // count for name in ("heads", "kv_heads")}
            case "slice" if given:
                start, width = attrs["start"] // count, attrs["stop"] - attrs["start"]
                return {"start": start, "stop": start + width // count}
            case "rms_norm" if node.name in self.cuts:
                return {"over": axis}
        return {}


def _in_units(node: Node, what: str, parts: Parts, unit: int) -> Iterator[tuple[str, int]]:
    """(what, number of units) of each part of a weight or value; 1 where a part is not whole."""
    start = 0
    for part in parts:
        whole = start % unit == 0 and part % unit == 0
        units = f" in units of {unit:,}" if unit > 1 else ""
        yield f"{part:,} {what} of {node.name}{units}", part // unit if whole else 1
        start += part
