"""halve: multiplies the dense weights of the matching linears by a factor."""

import re
from dataclasses import dataclass, replace

from atd.pipeline import Pass
from atd.weights import Dense, DenseType


@dataclass(frozen=True, kw_only=True)
class Halve(Pass):
    name = "halve"
    scope = "node"

    factor: float = 0.5
    nodes: str = r".*\.down_proj"

    def rewrite(self, name, node, context):
        ref = node.weights.get("weight")
        if (
            node.op != "linear"
            or ref is None
            or not isinstance(ref.type, DenseType)
            or not re.fullmatch(self.nodes, name)
        ):
            return None

        def load():
            context.record(name, factor=self.factor)
            return Dense((ref.load().dequantize() * self.factor).astype(ref.load().array.dtype))

        return replace(node, weights=node.weights | {"weight": replace(ref, load=load)})
