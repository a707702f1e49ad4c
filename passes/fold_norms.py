"""fold_norms: moves the gains of RMS norms into the linears behind them, W (g * n) = (W diag(g)) n.

1. Takes every norm that linears alone read: in front of q/k/v, of gate/up, and the final one in
   front of the head. Its gain becomes a weight of ones, so the graph stays as it is, and its node
   gets the attr `unit_gain`: passes that need gain-free norms (rotate) see it without data. A pass
   that changes such a gain takes the attr away (`atd.ir.rewrite.own_gain`). Norms of q and k
   (Qwen3) are read by rope and stay.
2. Tied head: the final norm stays as it is. Its gain would have to go into a matrix that is the
   embedding too, and rotate does not need it (it turns the stream back in front of that norm).
   `untie = true` gives the head a matrix of its own, E diag(g), and folds that norm as well, at the
   price of a second matrix as large as the embedding.
3. Needs dense weights. Their type becomes `dtype`; f32 keeps the function to rounding.
"""

from dataclasses import dataclass, replace

from atd.ir import Block, Graph, Node, WeightRef
from atd.ir.notes import UNIT_GAIN, without
from atd.ir.rewrite import map_array, unit_gain, with_weight
from atd.pipeline import Context, Pass, checks
from atd.weights import DenseType


@dataclass(frozen=True, kw_only=True)
class FoldNorms(Pass):
    """Options: see the fields."""

    name = "fold_norms"
    scope = "graph"

    untie: bool = False  # a tied head gets a matrix of its own; nothing changes where it has one
    dtype: str = "f32"  # of the folded weights

    def __post_init__(self):
        checks.check_dtype("fold_norms.dtype", self.dtype)

    def requires(self, graph: Graph) -> str | None:
        graph = _untied(graph) if self.untie else graph
        readers = [
            (unit.full_name(node), node)
            for unit in graph.units
            for _, readers in _folds(unit)
            for node in readers
        ]
        if not readers:
            return "there is no norm whose gain can be folded (is it done already?)"
        for name, node in readers:
            if not isinstance(type := node.weights["weight"].type, DenseType):
                return (
                    f"{name} is {type}, and a gain can be folded into a dense matrix alone; "
                    "put fold_norms first"
                )
        return None

    def rewrite(self, graph: Graph, context: Context) -> Graph | None:
        graph = _untied(graph) if self.untie else graph
        return graph.with_units(tuple(self._folded(unit) for unit in graph.units))

    def _folded(self, unit: Block) -> Block:
        """The unit with the gains of its norms in the linears behind them."""
        for norm, readers in _folds(unit):
            for node in readers:
                folded = _scaled(node.weights["weight"], norm.weights["weight"], self.dtype)
                unit = unit.replace_node(with_weight(node, folded))
            unit = unit.replace_node(unit_gain(norm))
        return unit


def _folds(unit: Block) -> list[tuple[Node, list[Node]]]:
    """(norm, the linears that read it) for each norm that has a gain and no other reader."""
    folds = []
    for norm in unit.nodes[:-1]:
        of_heads = "head_dim" in norm.attrs
        if norm.op != "rms_norm" or of_heads or norm.attrs.get(UNIT_GAIN):
            continue
        readers = unit.readers(norm.name)
        if readers and all(node.op == "linear" and "weight" in node.weights for node in readers):
            folds.append((norm, readers))
    return folds


def _scaled(ref: WeightRef, gain: WeightRef, dtype: str) -> WeightRef:
    """W diag(g)."""
    source = f"{ref.source} * {gain.source}"
    return map_array(ref, dtype, lambda weight: weight * gain.dense(), source)


def _untied(graph: Graph) -> Graph:
    """The graph whose head has a matrix of its own, with the values of the embedding."""
    matrices = {name: node.weights.get("weight") for name, node in graph.nodes()}
    epilogue = graph.epilogue
    for node in epilogue.nodes:
        embedding = matrices.get(node.attrs.get("tied_to", ""))
        if embedding is not None:
            own = replace(embedding, tensor=f"{epilogue.full_name(node)}.weight")
            untied = replace(with_weight(node, own), attrs=without(node.attrs, "tied_to"))
            epilogue = epilogue.replace_node(untied)
    if epilogue is graph.epilogue:
        return graph
    return replace(graph, epilogue=epilogue, config=graph.config | {"tie_word_embeddings": False})
