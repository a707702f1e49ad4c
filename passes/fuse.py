"""fuse: joins linears that read the same value, so that q/k/v and gate/up cost one launch each.

1. Linears of a block with the same input and the same type but for the number of rows are joined
   row on row, in their order; q, k and v become `qkv_proj`, gate and up `gate_up_proj`. Those with
   a bias and those without are not joined with one another.
2. Each old name lives on as a `slice` of the joined output, so nothing else in the block changes,
   and export can take the parts apart.
3. Left alone are weights with one scale per tensor, packed layouts whose rows cannot be told
   apart, and weights with a trellis code whose last segment is shorter than the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from atd.ir import Block, Node, WeightRef
from atd.ir.rewrite import slices
from atd.pipeline import Context, Pass
from atd.weights import (
    Dense,
    DenseType,
    Packed,
    PackedType,
    TrellisType,
    Weight,
    WeightType,
    summed,
    ternary_of,
)
from atd.weights.layouts import LAYOUTS


@dataclass(frozen=True, kw_only=True)
class Fuse(Pass):
    """Has no options."""

    name = "fuse"
    scope = "block"

    def rewrite(self, block: Block, context: Context) -> Block | None:
        groups: dict[tuple, list[Node]] = {}
        for node in block.nodes:
            if node.op == "linear" and _is_joinable(node):
                groups.setdefault(_kind(node), []).append(node)
        joined = {part.name: parts for parts in groups.values() if len(parts) > 1 for part in parts}
        if not joined:
            return None
        nodes: list[Node] = []
        for node in block.nodes:
            parts = joined.get(node.name)
            if parts is None:
                nodes.append(node)
            elif node is parts[0]:
                nodes += _join(block, parts)
        return replace(block, nodes=tuple(nodes))


def _kind(node: Node) -> tuple:
    """Equal for linears that can be joined: input, attrs, and types but for the number of rows."""
    types = tuple((slot, _row_type(node.weights[slot].type)) for slot in sorted(node.weights))
    return node.inputs, types, str(sorted(node.attrs.items()))


def _join(block: Block, parts: Sequence[Node]) -> list[Node]:
    """The joined linear, then a slice for each part."""
    name = _joined_name([part.name for part in parts])
    weights = {
        slot: _join_refs(f"{block.name}.{name}.{slot}", [part.weights[slot] for part in parts])
        for slot in parts[0].weights
    }
    widths = {part.name: part.weights["weight"].type.shape[0] for part in parts}
    return [Node(name, "linear", parts[0].inputs, weights, parts[0].attrs), *slices(name, widths)]


def _joined_name(names: Sequence[str]) -> str:
    """self_attn.{q,k,v}_proj -> self_attn.qkv_proj; mlp.{gate,up}_proj -> mlp.gate_up_proj."""
    prefix = names[0].rpartition(".")[0]
    stems = [name.rpartition(".")[2].removesuffix("_proj") for name in names]
    stem = "".join(stems) if all(len(stem) == 1 for stem in stems) else "_".join(stems)
    return f"{prefix}.{stem}_proj" if prefix else f"{stem}_proj"


def _join_refs(tensor: str, refs: Sequence[WeightRef]) -> WeightRef:
    """The weights row on row, as one."""
    type = _with_rows(refs[0].type, sum(ref.type.shape[0] for ref in refs))
    return WeightRef(
        tensor,
        type,
        lambda: _join_rows([ref.load() for ref in refs], type),
        " + ".join(ref.source for ref in refs),
    )


def _is_joinable(node: Node) -> bool:
    """Whether the node has a weight whose rows, or segments of rows, stand for themselves."""
    if "weight" not in node.weights:
        return False
    type = node.weights["weight"].type
    if isinstance(type, PackedType) and not LAYOUTS[type.layout].row_separable:
        return False
    ternary = ternary_of(type)
    if isinstance(ternary, TrellisType):
        return ternary.shape[0] % ternary.segment == 0
    return ternary is None or ternary.group != "tensor"


def _row_type(type: WeightType) -> WeightType:
    """The type of one row, or of one segment of rows: equal for what can be joined."""
    ternary = ternary_of(type)
    return _with_rows(type, ternary.segment if isinstance(ternary, TrellisType) else 1)


def _with_rows(type: WeightType, rows: int) -> WeightType:
    """The type with another number of rows."""
    if isinstance(type, PackedType):
        return replace(type, ternary=_with_rows(type.ternary, rows))
    return replace(type, shape=(rows, *type.shape[1:]))


def _join_rows(weights: Sequence[Weight], type: WeightType) -> Weight:
    """Row on row; every array of a weight has its rows in front."""

    def rows(field: str) -> np.ndarray:
        return np.concatenate([np.asarray(getattr(weight, field)) for weight in weights])

    if isinstance(type, PackedType):
        return Packed(rows("codes"), rows("scales"), type)
    if isinstance(type, DenseType):
        return Dense(rows("array"))
    return summed(rows("trits"), rows("scales"), type)
