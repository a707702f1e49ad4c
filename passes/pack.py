"""pack: stores the trits of a ternary weight in a layout of `atd.weights.layouts`.

1. Takes every ternary weight (or those whose node's full name matches `nodes`). Values do not
   change.
2. A packed weight is packed anew where its layout is another one.
"""

import re
from dataclasses import dataclass

from atd.errors import BadInput
from atd.ir import Graph, Node, WeightRef
from atd.ir.rewrite import with_weight
from atd.pipeline import Context, Pass, checks
from atd.weights import Dense, Packed, PackedType, ternary_of
from atd.weights.layouts import DEFAULT_LAYOUT, LAYOUTS


@dataclass(frozen=True, kw_only=True)
class Pack(Pass):
    """Options: the layout's name (`atd.weights.layouts.LAYOUTS`) and which nodes."""

    name = "pack"
    scope = "node"

    layout: str = DEFAULT_LAYOUT
    nodes: str = ".*"

    def __post_init__(self):
        checks.check_known("pack.layout", self.layout, LAYOUTS)
        checks.check_pattern("pack.nodes", self.nodes)

    def requires(self, graph: Graph) -> str | None:
        if any(
            ternary_of(ref.type) and re.fullmatch(self.nodes, name) for name, ref in graph.weights()
        ):
            return None
        return f"there is no ternary weight among the nodes {self.nodes!r}; put decompose before it"

    def rewrite(self, name: str, node: Node, context: Context) -> Node | None:
        ref = node.weights.get("weight")
        ternary = ref and ternary_of(ref.type)
        if ref is None or not ternary or not re.fullmatch(self.nodes, name):
            return None
        type = PackedType(ternary, self.layout)
        if type == ref.type:
            return None
        layout = LAYOUTS[self.layout]
        if reason := layout.refuses(*ternary.trits_shape):
            raise BadInput(f"pass pack: {name}: {reason}; give it another layout with a rule")

        def load() -> Packed:
            weight = ref.load()
            weight = weight.unpack() if isinstance(weight, Packed) else weight
            assert not isinstance(weight, Dense)
            return Packed(layout.pack(weight.trits), weight.scales, type)

        return with_weight(node, WeightRef(ref.tensor, type, load, ref.source))
