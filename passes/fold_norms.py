"""fold_norms: the gains of RMS norms move into the linears behind them, W (g * n) = (W diag(g)) n.

1. Takes every norm that linears alone read: in front of q/k/v, of gate/up, and the final one in
   front of the head. Its gain becomes a weight of ones, so the graph stays as it is, and its node
   gets the attr `unit_gain`: passes that need gain-free norms (rotate) see it without data. A pass
   that changes such a gain must take the attr away. Norms of q and k (Qwen3) are read by rope and
   stay.
2. Tied head: the final norm stays as it is. Its gain would have to go into a matrix that is the
   embedding too, and rotate does not need it (it turns the stream back in front of that norm).
   `untie = true` gives the head a matrix of its own, E diag(g), and folds that norm as well: at the
   price of a second matrix as large as the embedding.
3. Needs dense weights. Their type becomes `dtype`; f32 keeps the function to rounding."""

from dataclasses import dataclass, replace

from atd.errors import BadInput, nearest
from atd.ir import Block, Graph, Node, WeightRef
from atd.ir.rewrite import unit_gain
from atd.pipeline import Context, Pass
from atd.weights import DTYPES, Dense, DenseType

_DTYPES = ("f32", "f16", "bf16")


@dataclass(frozen=True, kw_only=True)
class FoldNorms(Pass):
    """Options: see the fields."""

    name = "fold_norms"
    scope = "graph"

    untie: bool = False  # a tied head gets a matrix of its own; nothing changes where it has one
    dtype: str = "f32"  # of the folded weights

    def __post_init__(self):
        if self.dtype not in _DTYPES:
            raise BadInput(
                f"fold_norms.dtype {self.dtype!r} is unknown{nearest(self.dtype, _DTYPES)}"
            )

    def requires(self, graph: Graph) -> str | None:
        graph = _untied(graph) if self.untie else graph
        readers = [
            (unit.full_name(node), node)
            for unit in graph.units
            for norm in _folds(unit)
            for node in norm[1]
        ]
        if not readers:
            return "there is no norm whose gain can be folded (is it done already?)"
        for name, node in readers:
            if not isinstance(type := node.weights["weight"].type, DenseType):
                return f"{name} is {type}, and a gain can be folded into a dense matrix alone; put fold_norms first"
        return None

    def rewrite(self, graph: Graph, context: Context) -> Graph | None:
        graph = _untied(graph) if self.untie else graph
        return graph.with_units(tuple(self._folded(unit) for unit in graph.units))

    def _folded(self, unit: Block) -> Block:
        for norm, readers in _folds(unit):
            gain = norm.weights["weight"]
            for node in readers:
                weight = _scaled(node.weights["weight"], gain, self.dtype)
                unit = unit.replace_node(replace(node, weights=node.weights | {"weight": weight}))
            unit = unit.replace_node(unit_gain(norm))
        return unit


def _folds(unit: Block) -> list[tuple[Node, list[Node]]]:
    """(norm, the linears that read it) for each norm that has a gain and no other reader."""
    folds = []
    for norm in unit.nodes[:-1]:
        if (
            norm.op == "rms_norm"
            and "head_dim" not in norm.attrs
            and not norm.attrs.get("unit_gain")
        ):
            readers = [node for node in unit.nodes if norm.name in node.inputs]
            if readers and all(
                node.op == "linear" and "weight" in node.weights for node in readers
            ):
                folds.append((norm, readers))
    return folds


def _scaled(ref: WeightRef, gain: WeightRef, dtype: str) -> WeightRef:
    """W diag(g)."""

    def load() -> Dense:
        return Dense((ref.dense() * gain.dense()).astype(DTYPES[dtype]))

    return WeightRef(
        ref.tensor, DenseType(ref.type.shape, dtype), load, f"{ref.source} * {gain.source}"
    )


def _untied(graph: Graph) -> Graph:
    """The graph whose head has a weight of its own, with the embedding's values; the same graph
    where it has one.
    """
    matrices = {name: node.weights.get("weight") for name, node in graph.nodes()}
    epilogue = graph.epilogue
    for node in epilogue.nodes:
        embedding = matrices.get(node.attrs.get("tied_to", ""))
        if embedding is not None:
            attrs = {key: value for key, value in node.attrs.items() if key != "tied_to"}
            own = replace(embedding, tensor=f"{epilogue.full_name(node)}.weight")
            epilogue = epilogue.replace_node(
                replace(node, weights=node.weights | {"weight": own}, attrs=attrs)
            )
    if epilogue is graph.epilogue:
        return graph
    return replace(graph, epilogue=epilogue, config=graph.config | {"tie_word_embeddings": False})
