"""rotate: puts the residual stream, each head's values and inputs of linears into a rotated basis.

The function stays the same, and the weights lose their outliers, which is what error feedback over
whole rows wants. R = diag(signs) H / sqrt(n) is orthogonal, with signs drawn at random and H a
Hadamard matrix (`atd.decomposition.rotations`).

R1, one for the model, on the residual stream, x -> x R1. RMS norms without a gain commute with it:
    W -> W R1                   for what reads the stream (q, k, v, gate, up)
    W -> R1^T W, b -> R1^T b    for what writes to it (o, down)
R2, one for each key-value head of each block, on the values between v and o:
    W -> R2^T W, b -> R2^T b    for v
    W -> W R2                   for o; with grouped queries each query head's columns take the
                                rotation of their key-value head. Softmax mixes positions, not
                                features.
R3, one for each block, on the inputs of down (`r3 = true`). Silu does not commute with a rotation,
so that one half of it runs with the model: a node `hadamard` between silu_mul (or another of
`atd.ir.GATED`) and down, which multiplies each run of 2^k features by H / sqrt(2^k), the largest of
at most 2048 that divide them.
    W -> D W, b -> D b          for up, D = diag(signs): silu(gate) * up is linear in up
    W -> W D H / sqrt(2^k)      for down

R4, one for each value of the stream that linears read, a norm of it as a rule, on the inputs of q,
k, v, gate and up (`r4 = true`): for families that have no R1. A `hadamard` node runs with the model
here too, and the signs go into the gain of the norm; without a norm there are none.
    g -> g D                    for the norm
    W -> W D H / sqrt(2^k)      for q, k, v, gate, up

1. Needs dense weights, gain-free norms on the stream (fold_norms) and, for R2, v that is not joined
   with q and k. What the stream touches is found by data flow, so it works for any family; what
   does not fit is refused: R1, where what is added to the stream comes from a norm with a gain, as
   in Gemma and OLMo 2. `atd.convert` turns `r1` off and `r4` on for such models, and says so,
   unless `--set rotate.r1=true` asks for it.
2. A head with a matrix of its own: E -> E R1 and W -> W R1; the graph stays as it is.
3. A tied head: its norm's gain g lies between x and E, and E diag(g) R1 is not E R1, so no rotated
   matrix can serve as both. Embedding, final norm and head stay as they are, and the blocks alone
   run in the rotated basis: a node `rotate_in` follows the embedding and `rotate_out` goes before
   the final norm. As entries +-1/sqrt(n) they are ternary matrices of one base and one scale:
   exact, 1.6 bits per weight when packed (66 kB each for a width of 576, against 57 MB for a second
   f16 matrix of SmolLM2), and a token pays two multiplications by [D, D].
4. `embedding = true`, for recipes that quantize a tied embedding: E -> E R1, no `rotate_in`, and a
   node `rotate_head` between the final norm and the head, x g R1 (E R1)^T = x g E^T. Rounded to
   N = 3, SmolLM2's embedding costs a KL of 0.25 as it is and 0.04 rotated.
   `fold_norms{untie = true}` before it gives case 2 instead; `atd.exports.absorb.absorb` does so
   afterwards, for formats without such nodes.
5. Seeds: the recipe's together with `seed`. Equal seeds, equal bytes.
6. Importances of single features (`Context.feature_weights`) must have been measured on the rotated
   model.

Sources: QuaRot (2404.00456), SpinQuant (2405.16406).
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from atd.calibration.work import Text, Work, rotation_work
from atd.decomposition.rotations import Rotation, block_rotation, by_rows, random_rotation
from atd.errors import BadInput
from atd.ir import GATED, ROTATIONS, Block, Graph, Node, WeightRef
from atd.ir.residual_stream import norm_on_stream, stream_linears, values_for_linears
from atd.ir.rewrite import map_array, map_nodes, own_gain, with_weight
from atd.pipeline import Context, Pass, checks
from atd.weights import DTYPES, Dense, DenseType, Ternary, TernaryType

IN, OUT, HEAD = ROTATIONS
LARGEST = 2048  # run of features that a `hadamard` node mixes


@dataclass(frozen=True)
class Sides:
    """What a node's weights are rotated by: W -> outputs^T W inputs, b -> outputs^T b."""

    inputs: Rotation | None = None
    outputs: Rotation | None = None


@dataclass(frozen=True, kw_only=True)
class Rotate(Pass):
    """Options: see the fields."""

    name = "rotate"
    scope = "graph"

    seed: int = 0
    r1: bool = True  # the residual stream
    r2: bool = True  # the values of each head
    r3: bool = False  # the inputs of down; a Hadamard transform runs with the model
    r4: bool = False  # those of q, k, v, gate and up, where r1 cannot be; two transforms per block
    embedding: bool = False  # a tied embedding too; one with a head beside it is rotated anyway
    dtype: str = "f32"  # of the rotated weights; f32 keeps the function to rounding

    def __post_init__(self):
        if self.seed < 0:
            raise BadInput(f"rotate.seed must be 0 or more, not {self.seed}")
        if not (self.r1 or self.r2 or self.r3 or self.r4):
            raise BadInput("rotate with r1, r2, r3 and r4 = false does nothing; leave it out")
        if self.r1 and self.r4:
            raise BadInput(
                "rotate.r4 rotates what r1 has rotated already; set r1 = false beside r4 = true"
            )
        checks.check_dtype("rotate.dtype", self.dtype)

    def suited(self, graph: Graph, given: Collection[str]) -> tuple[Pass | None, str]:
        norm = next(filter(None, map(norm_on_stream, graph.blocks)), None)
        if not self.r1 or "r1" in given or norm is None:
            return self, ""
        what = (
            f"rotate: r1 is off, since {norm} is added to the residual stream, and the gain of a "
            "norm does not commute with a rotation"
        )
        if "r4" in given:
            left = self.r2 or self.r3 or self.r4
            return (replace(self, r1=False) if left else None), what
        return replace(self, r1=False, r4=True), (
            f"{what}; r4 rotates the inputs of linears instead, by Hadamard transforms that run "
            "with the model"
        )

    def requires(self, graph: Graph) -> str | None:
        try:
            self._plan(graph, 0)
        except BadInput as error:
            return str(error)
        return None

    def work(self, before: Graph, after: Graph, text: Text) -> Work:
        _, plan = self._plan(before, 0)
        weights = sum(
            math.prod(node.weights["weight"].type.shape)
            * sum(side is not None for side in (plan[name].inputs, plan[name].outputs))
            for name, node in before.nodes()
            if name in plan
        )
        return rotation_work(weights, text)

    def rewrite(self, graph: Graph, context: Context) -> Graph | None:
        stream, plan = self._plan(graph, context.seed)

        def rotated(unit: Block, node: Node) -> Node:
            return _rotated(node, plan.get(unit.full_name(node), Sides()), self.dtype)

        if stream is not None and graph.is_tied:
            graph = _rotate_around(graph, stream, self.embedding)
        graph = map_nodes(graph, rotated)
        return replace(graph, blocks=tuple(map(self._with_transforms, graph.blocks)))

    def _with_transforms(self, block: Block) -> Block:
        """The block with the Hadamard transforms of R3 and R4."""
        values = [node.name for node in block.nodes if self.r3 and node.op in GATED]
        for value in [*values, *(values_for_linears(block) if self.r4 else ())]:
            block = _with_transform(block, value)
        return block

    def _plan(self, graph: Graph, seed: int) -> tuple[Rotation | None, dict[str, Sides]]:
        """(R1, full name of a node -> what its weights are rotated by). Raises BadInput for a graph
        that does not fit.
        """
        plan: dict[str, Sides] = {}
        stream = None
        if self.r1:
            stream = _stream_rotation(graph, np.random.default_rng((seed, self.seed, 0)))
            units = graph.blocks
            if self.embedding or not graph.is_tied:
                _give(plan, graph.prologue, graph.prologue.nodes[-1], inputs=stream)
            if not graph.is_tied:
                units = (*units, graph.epilogue)
            for unit in units:
                linears = stream_linears(unit)
                for node in linears.readers:
                    _give(plan, unit, node, inputs=stream)
                for node in linears.writers:
                    _give(plan, unit, node, outputs=stream)
                if linears.ends != (unit is not graph.epilogue):
                    raise BadInput(
                        f"{unit.name or 'epilogue'} does not end where the residual stream is "
                        "expected to"
                    )
        if self.r2:
            for i, block in enumerate(graph.blocks):
                _plan_values(plan, block, np.random.default_rng((seed, self.seed, 1 + i)))
        if self.r3:
            for i, block in enumerate(graph.blocks):
                _plan_hidden(plan, block, np.random.default_rng((seed, self.seed, 1 + i, 3)))
        if self.r4:
            for i, block in enumerate(graph.blocks):
                _plan_inputs(plan, block, np.random.default_rng((seed, self.seed, 1 + i, 4)))
        return stream, plan


# --- the plan -------------------------------------------------------------------------------------


def _stream_rotation(graph: Graph, rng: np.random.Generator) -> Rotation:
    """R1, as wide as the embedding."""
    embed = graph.prologue.nodes[-1]
    if embed.op != "embed" or any(node.name == OUT for node in graph.epilogue.nodes):
        raise BadInput(
            f"{graph.prologue.full_name(embed)} stands between the embedding and the blocks; "
            "is the model rotated already?"
        )
    return random_rotation(rng, embed.weights["weight"].type.shape[1])


def _give(plan: dict[str, Sides], unit: Block, node: Node, **sides: Rotation) -> None:
    """Adds to what the node's weights are rotated by."""
    name = unit.full_name(node)
    for ref in node.weights.values():
        if not isinstance(ref.type, DenseType):
            raise BadInput(
                f"{name} is {ref.type}, and only dense weights can be rotated; "
                "put rotate before decompose"
            )
    plan[name] = replace(plan.get(name, Sides()), **sides)


def _plan_values(plan: dict[str, Sides], block: Block, rng: np.random.Generator) -> None:
    """Gives R2 to the linear that makes the values of an attention and to those that read its
    output.
    """
    for node in block.nodes:
        if node.op != "attention":
            continue
        heads, kv_heads, head_dim = (node.attrs[key] for key in ("heads", "kv_heads", "head_dim"))
        name, value, readers = block.full_name(node), node.inputs[2], block.readers(node.name)
        writer = next((node for node in block.nodes if node.name == value), None)
        if writer is None or writer.op != "linear" or block.readers(value) != [node]:
            raise BadInput(
                f"the values of {name} do not come from a linear of their own; "
                "put rotate before fuse"
            )
        if not readers or any(reader.op != "linear" for reader in readers):
            raise BadInput(f"the output of {name} must go to a linear alone; use r2 = false")
        rotation = random_rotation(rng, head_dim, kv_heads)
        _give(plan, block, writer, outputs=rotation)
        signs = rotation.signs.reshape(kv_heads, 1, head_dim)
        signs = signs.repeat(heads // kv_heads, axis=1)  # query head by query head
        for reader in readers:
            _give(plan, block, reader, inputs=replace(rotation, signs=signs.reshape(-1)))


def _plan_hidden(plan: dict[str, Sides], block: Block, rng: np.random.Generator) -> None:
    """Gives R3 to the linears that read silu(gate) * up, and its signs to the one that makes up."""
    products = [node for node in block.nodes if node.op in GATED]
    if not products:
        raise BadInput(
            f"{block.name} has no {', '.join(GATED)} whose output could be rotated; use r3 = false"
        )
    for node in products:
        name, value, readers = block.full_name(node), node.inputs[1], block.readers(node.name)
        writer = next((node for node in block.nodes if node.name == value), None)
        alone = block.readers(value) == [node] and node.inputs[0] != value
        if writer is None or writer.op != "linear" or not alone:
            raise BadInput(
                f"the second input of {name} does not come from a linear of its own; "
                "put rotate before fuse, or use r3 = false"
            )
        if any(reader.op == "hadamard" for reader in readers):
            raise BadInput(f"the output of {name} is rotated already; use r3 = false")
        if not readers or any(reader.op != "linear" for reader in readers):
            raise BadInput(f"the output of {name} must go to a linear alone; use r3 = false")
        run = _run(block, node.name, "r3")
        signs = rng.choice([-1.0, 1.0], _width(block, node.name))
        _give(plan, block, writer, outputs=block_rotation(signs, 1))
        for reader in readers:
            _give(plan, block, reader, inputs=block_rotation(signs, run))


def _plan_inputs(plan: dict[str, Sides], block: Block, rng: np.random.Generator) -> None:
    """Gives R4 to the linears that read the stream or a norm of it, and its signs to the norm."""
    values = values_for_linears(block)
    if not values:
        raise BadInput(
            f"no linear of {block.name} reads the residual stream or a norm of it "
            "(is it rotated already?); use r4 = false"
        )
    for value, norm in values.items():
        readers = [node for node in block.readers(value) if node.op == "linear"]
        run, signs = _run(block, value, "r4"), np.ones(_width(block, value))
        if norm is not None:
            if len(readers) < len(block.readers(value)):
                raise BadInput(
                    f"the output of {block.full_name(norm)} must go to linears alone; "
                    "use r4 = false"
                )
            signs = rng.choice([-1.0, 1.0], len(signs))
            _give(plan, block, norm, inputs=block_rotation(signs, 1))
        for reader in readers:
            _give(plan, block, reader, inputs=block_rotation(signs, run))


def _width(block: Block, value: str) -> int:
    """The features of a value that linears read."""
    reader = next(node for node in block.readers(value) if node.op == "linear")
    return reader.weights["weight"].type.shape[1]


def _run(block: Block, value: str, option: str = "") -> int:
    """How many of its features a Hadamard transform mixes: the largest power of two that fits.

    Raises:
        BadInput: their number is odd.
    """
    width = _width(block, value)
    if width % 2:
        raise BadInput(f"the output of {block.name}.{value} has an odd width; use {option} = false")
    return min(width & -width, LARGEST)


# --- rewriting ------------------------------------------------------------------------------------


def _rotated(node: Node, sides: Sides, dtype: str) -> Node:
    """The node with rotated weights."""
    if node.op == "rms_norm" and sides.inputs:
        return own_gain(node, _rotated_ref(node.weights["weight"], sides, "f32"))
    if sides.inputs or sides.outputs:
        node = with_weight(node, _rotated_ref(node.weights["weight"], sides, dtype))
    if sides.outputs and "bias" in node.weights:
        as_row = Sides(inputs=sides.outputs)  # R^T b is the row b R
        node = with_weight(node, _rotated_ref(node.weights["bias"], as_row, dtype), "bias")
    return node


def _rotated_ref(ref: WeightRef, sides: Sides, dtype: str) -> WeightRef:
    """outputs^T W inputs; between the two products in float64."""

    def rotated(array: np.ndarray) -> np.ndarray:
        if sides.inputs is not None:
            between = np.dtype(np.float64) if sides.outputs else DTYPES[dtype]
            array = by_rows(sides.inputs.apply, array, between)
        if sides.outputs is not None:
            array = by_rows(sides.outputs.apply, array.T, DTYPES[dtype]).T
        return np.ascontiguousarray(array)

    return map_array(ref, dtype, rotated)


def _rotate_around(graph: Graph, rotation: Rotation, embedding: bool) -> Graph:
    """The graph with a node that rotates what the prologue gives, and one that turns what the
    epilogue gets back; where the embedding itself is rotated, with one in front of the head instead
    of the first.
    """

    def linear(unit: Block, name: str, value: str, transpose: bool) -> Node:
        tensor = f"{unit.full_name(Node(name, 'linear', ()))}.weight"
        return Node(name, "linear", (value,), {"weight": _matrix(tensor, rotation, transpose)})

    prologue, epilogue = graph.prologue, graph.epilogue
    into = linear(prologue, IN, prologue.nodes[-1].name, transpose=True)  # x W^T = x R
    out = linear(epilogue, OUT, "x", transpose=False)  # x W^T = x R^T
    nodes = [
        replace(n, inputs=tuple(OUT if value == "x" else value for value in n.inputs))
        for n in epilogue.nodes
    ]
    if embedding:
        at = epilogue.nodes.index(graph.head)
        back = linear(epilogue, HEAD, nodes[at].inputs[0], transpose=True)
        nodes[at : at + 1] = [back, replace(nodes[at], inputs=(HEAD,))]
    return replace(
        graph,
        prologue=prologue if embedding else replace(prologue, nodes=(*prologue.nodes, into)),
        epilogue=replace(epilogue, nodes=(out, *nodes)),
    )


def _with_transform(block: Block, value: str) -> Block:
    """The block with a Hadamard transform between a value and the linears that read it."""
    readers = [node for node in block.readers(value) if node.op == "linear"]
    gated = any(node.name == value and node.op in GATED for node in block.nodes)
    module, dot, _ = readers[0].name.rpartition(".")
    name = f"{module}{dot}{'hadamard' if gated else 'input_hadamard'}"
    transform = Node(name, "hadamard", (value,), attrs={"block": _run(block, value)})
    nodes: list[Node] = []
    for node in block.nodes:
        if node in readers:
            if transform not in nodes:
                nodes.append(transform)
            node = replace(node, inputs=tuple(name if v == value else v for v in node.inputs))
        nodes.append(node)
    return replace(block, nodes=tuple(nodes))


def _matrix(tensor: str, rotation: Rotation, transpose: bool) -> WeightRef:
    """R, or R^T, as a weight: one ternary base where all entries are +-1/sqrt(n)."""
    n = len(rotation.signs)
    type = DenseType((n, n), "f32")
    if rotation.is_hadamard:
        type = TernaryType((n, n), 1, "tensor", False, "f32")

    def load() -> Dense | Ternary:
        matrix = rotation.apply(np.eye(n))
        matrix = np.ascontiguousarray(matrix.T if transpose else matrix)
        if isinstance(type, DenseType):
            return Dense(matrix.astype(np.float32))
        trits = np.sign(matrix).astype(np.int8)[..., None]
        return Ternary(trits, np.full((1, 1, 1), n**-0.5, np.float32), type)

    return WeightRef(tensor, type, load)
