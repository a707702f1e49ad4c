"""rotate: the residual stream, and each head's values, in a randomly rotated basis. The function stays the same, and
the weights lose their outliers, which is what error feedback over whole rows wants.

R = diag(signs) H / sqrt(n), orthogonal, with signs drawn at random and H a Hadamard matrix.

R1, one for the model, on the residual stream, x -> x R1. RMS norms without a gain commute with it, so
    W -> W R1 for what reads the stream (q, k, v, gate, up),   W -> R1^T W, b -> R1^T b for what writes to it (o, down).
R2, one for each key-value head of each block, between v and o: v -> R2^T W, R2^T b; o -> W R2, where with grouped
    queries each query head's columns take the rotation of their key-value head. Softmax mixes positions, not features.
The hidden features of the MLP are not rotated: silu does not commute with a rotation.

1. Needs dense weights, gain-free norms on the stream (fold_norms) and, for R2, v that is not joined with q and k. What
   the stream touches is found by data flow, so it works for any family; what does not fit is refused.
2. A head with a matrix of its own: E -> E R1 and W -> W R1; the graph stays as it is.
3. A tied head: its norm's gain g lies between x and E, and E diag(g) R1 is not E R1, so no rotated matrix can serve as
   both. Embedding, final norm and head stay as they are, and the blocks alone run in the rotated basis: a node
   `rotate_in` follows the embedding and `rotate_out` goes before the final norm. As entries +-1/sqrt(n) they are
   ternary matrices of one base and one scale: exact, 1.6 bits a weight when packed (66 kB each for a width of 576,
   against 57 MB for a second f16 matrix of SmolLM2), and a token pays two multiplications by [D, D].
   `embedding = true`, for recipes that quantize the embedding: E -> E R1, no `rotate_in`, and a node `rotate_head`
   between the final norm and the head, x g R1 (E R1)^T = x g E^T. Rounded to N = 3, SmolLM2's embedding costs a KL of
   .25 as it is and .04 rotated.
   fold_norms{untie = true} before it gives case 2 instead; `absorb` does so afterwards, for formats without such nodes.
4. Seeds: the recipe's together with `seed`. Equal seeds, equal bytes.
5. Importances of single features (`Context.feature_weights`) must have been measured on the rotated model.

Hadamard matrices for n = 2^k m: one of Paley's, of order m 2^j for the least j that has one (q + 1 or 2 (q + 1) with q
prime: 12, 20, 28, 36, 44, 60, ...), times Sylvester's. That covers the widths of all known models; for others, a random
orthogonal m x m matrix times Sylvester's of order 2^k. QuaRot (2404.00456), SpinQuant (2405.16406).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np

from atd.errors import BadInput, nearest
from atd.ir import ROTATIONS, Block, Graph, Node, WeightRef
from atd.passes.fold_norms import unit_gain
from atd.pipeline import Context, Pass
from atd.weights import DTYPES, Dense, DenseType, Ternary, TernaryType

IN, OUT, HEAD = ROTATIONS
_DTYPES = ("f32", "f16", "bf16")
_SYLVESTER = 64  # largest factor; more factors are fewer operations, and more passes over memory
_CHUNK = 1 << 18  # float64 values that are rotated at a time: what stays in a core's cache


# --- rotations --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rotation:
    """R = diag(signs) (I x F_1 x F_2 x ...) scale, x the Kronecker product: each run of features of the factors' width
    is rotated by itself, each with signs of its own."""

    signs: np.ndarray  # [n]
    factors: tuple[np.ndarray, ...]  # Hadamard matrices of +-1, integers so that sums are exact, or an orthogonal one
    scale: float

    @property
    def is_hadamard(self) -> bool:
        return all(factor.dtype == np.int8 for factor in self.factors)

    def apply(self, rows: np.ndarray) -> np.ndarray:
        """rows @ R in float64, [..., n] -> [..., n]."""
        y, run = rows * self.signs, 1  # run: features that a step of this factor's index moves by
        for factor in reversed(self.factors):
            matrix = factor.astype(np.float64)
            y = y.reshape(-1, len(matrix), run)
            y = matrix.T @ y if run > 1 else (y[:, :, 0] @ matrix)
            run *= len(matrix)
        return y.reshape(rows.shape) * self.scale


def random_rotation(rng: np.random.Generator, width: int, copies: int = 1) -> Rotation:
    """A random Hadamard rotation of `width` features, or `copies` of them side by side that differ in their signs."""
    signs = rng.choice([-1.0, 1.0], copies * width)
    power = width & -width
    base = width // power
    while base <= width:
        if (matrix := hadamard(base)) is not None:
            return Rotation(signs, (matrix, *_sylvester(width // base)), width**-0.5)
        base *= 2
    odd = width // power
    q, r = np.linalg.qr(rng.standard_normal((odd, odd)))
    return Rotation(signs, (q * np.sign(np.diag(r)), *_sylvester(power)), power**-0.5)


def hadamard(order: int) -> np.ndarray | None:
    """H int8 of entries +-1 with H H^T = order I, by one of Paley's constructions; None where neither gives one.

    With the Jacobsthal matrix Q_ij = (i - j | q) of a prime q:
        order = q + 1, q = 3 mod 4:      I + S,  S = [[0, 1], [-1, Q]]
        order = 2 (q + 1), q = 1 mod 4:  C x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]],  C = [[0, 1], [1, Q]]
    """
    if order == 1:
        return np.ones((1, 1), np.int8)
    if order % 4:
        return None
    if _is_prime(order - 1):
        return np.eye(order, dtype=np.int8) + _bordered(order - 1, corner=-1)
    q = order // 2 - 1
    if q % 4 == 1 and _is_prime(q):
        plus, minus = np.array([[1, 1], [1, -1]], np.int8), np.array([[1, -1], [-1, -1]], np.int8)
        return np.kron(_bordered(q, corner=1), plus) + np.kron(np.eye(q + 1, dtype=np.int8), minus)
    return None


def _bordered(q: int, corner: int) -> np.ndarray:
    """[[0, 1], [corner, Q]], int8 [q + 1, q + 1]."""
    legendre = np.full(q, -1, np.int8)
    legendre[np.arange(1, q) ** 2 % q] = 1
    legendre[0] = 0
    i = np.arange(q)
    matrix = np.zeros((q + 1, q + 1), np.int8)
    matrix[0, 1:], matrix[1:, 0] = 1, corner
    matrix[1:, 1:] = legendre[(i[:, None] - i) % q]
    return matrix


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, math.isqrt(n) + 1))


def _sylvester(order: int) -> list[np.ndarray]:
    """Sylvester's Hadamard matrix of a power of two, as Kronecker factors."""
    factors = []
    while order > 1:
        size = min(order, _SYLVESTER)
        factors.append(reduce(np.kron, [np.array([[1, 1], [1, -1]], np.int8)] * (size.bit_length() - 1)))
        order //= size
    return factors


# --- the pass ---------------------------------------------------------------------------------------------------------

Sides = dict[str, Rotation]  # "inputs": W -> W R; "outputs": W -> R^T W, b -> R^T b


@dataclass(frozen=True, kw_only=True)
class Rotate(Pass):
    """Options: see the fields."""

    name = "rotate"
    scope = "graph"

    seed: int = 0
    r1: bool = True  # the residual stream
    r2: bool = True  # the values of each head
    embedding: bool = False  # rotate a tied embedding as well; one with a head beside it is rotated anyway
    dtype: str = "f32"  # of the rotated weights; f32 keeps the function to rounding

    def __post_init__(self):
        if self.seed < 0:
            raise BadInput(f"rotate.seed must be 0 or more, not {self.seed}")
        if not (self.r1 or self.r2):
            raise BadInput("rotate with r1 = false and r2 = false does nothing; leave it out")
        if self.dtype not in _DTYPES:
            raise BadInput(f"rotate.dtype {self.dtype!r} is unknown{nearest(self.dtype, _DTYPES)}")

    def requires(self, graph: Graph) -> str | None:
        try:
            self._plan(graph, 0)
        except BadInput as error:
            return str(error)
        return None

    def rewrite(self, graph: Graph, context: Context) -> Graph | None:
        stream, plan = self._plan(graph, context.seed)

        def rotated(unit: Block) -> Block:
            nodes = (_rotated_node(node, plan.get(unit.full_name(node), {}), self.dtype) for node in unit.nodes)
            return replace(unit, nodes=tuple(nodes))

        if stream is not None and graph.is_tied:
            graph = _rotate_around(graph, stream, self.embedding)
        return graph.with_units(tuple(rotated(unit) for unit in graph.units))

    def _plan(self, graph: Graph, seed: int) -> tuple[Rotation | None, dict[str, Sides]]:
        """(R1, full name of a node -> what its weights are rotated by). Raises BadInput for a graph that does not fit."""
        plan: dict[str, Sides] = {}
        stream = None
        if self.r1:
            embed = graph.prologue.nodes[-1]
            name = graph.prologue.full_name(embed)
            if embed.op != "embed" or any(node.name == OUT for node in graph.epilogue.nodes):
                raise BadInput(f"{name} stands between the embedding and the blocks; is the model rotated already?")
            stream = random_rotation(np.random.default_rng((seed, self.seed, 0)), embed.weights["weight"].type.shape[1])
            units = graph.blocks
            if self.embedding or not graph.is_tied:
                _give(plan, graph.prologue, embed, "inputs", stream)
            if not graph.is_tied:
                units = (*units, graph.epilogue)
            for unit in units:
                if _plan_stream(plan, unit, stream) != (unit is not graph.epilogue):
                    raise BadInput(f"{unit.name or 'epilogue'} does not end where the residual stream is expected to")
        if self.r2:
            for i, block in enumerate(graph.blocks):
                _plan_values(plan, block, np.random.default_rng((seed, self.seed, 1 + i)))
        return stream, plan


def _give(plan: dict[str, Sides], unit: Block, node: Node, side: str, rotation: Rotation) -> None:
    name = unit.full_name(node)
    for ref in node.weights.values():
        if not isinstance(ref.type, DenseType):
            raise BadInput(f"{name} is {ref.type}, and only dense weights can be rotated; put rotate before decompose")
    plan.setdefault(name, {})[side] = rotation


def _plan_stream(plan: dict[str, Sides], unit: Block, rotation: Rotation) -> bool:
    """Gives R1 to the linears that read the residual stream through a norm, and to those that are added to it.

    Returns whether the unit's output is the stream.
    """
    stream, normed = {"x"}, set()
    for node in unit.nodes:
        name = unit.full_name(node)
        if not normed.isdisjoint(node.inputs):
            if node.op != "linear":
                raise BadInput(f"{name} ({node.op}) reads a norm of the residual stream, which linears alone may")
            _give(plan, unit, node, "inputs", rotation)
        if stream.isdisjoint(node.inputs):
            continue
        if node.op == "rms_norm" and "head_dim" not in node.attrs:
            if not node.attrs.get("unit_gain"):
                raise BadInput(
                    f"the norm {name} has a gain, which does not commute with a rotation; put fold_norms before rotate"
                )
            normed.add(node.name)
        elif node.op == "add":
            for value in set(node.inputs) - stream:
                writer = unit.node(value)
                if writer.op != "linear" or _readers(unit, value) != [node]:
                    raise BadInput(
                        f"{unit.full_name(writer)} is added to the residual stream, but is no linear of its own"
                    )
                _give(plan, unit, writer, "outputs", rotation)
            stream.add(node.name)
        else:
            raise BadInput(f"{name} ({node.op}) reads the residual stream, which norms and additions alone may")
    return unit.nodes[-1].name in stream


def _plan_values(plan: dict[str, Sides], block: Block, rng: np.random.Generator) -> None:
    """Gives R2 to the linear that makes the values of an attention and to those that read its output."""
    for node in block.nodes:
        if node.op != "attention":
            continue
        heads, kv_heads, head_dim = (node.attrs[key] for key in ("heads", "kv_heads", "head_dim"))
        name, value, readers = block.full_name(node), node.inputs[2], _readers(block, node.name)
        writer = next((node for node in block.nodes if node.name == value), None)
        if writer is None or writer.op != "linear" or _readers(block, value) != [node]:
            raise BadInput(f"the values of {name} do not come from a linear of their own; put rotate before fuse")
        if not readers or any(reader.op != "linear" for reader in readers):
            raise BadInput(f"the output of {name} must go to a linear alone; use r2 = false")
        rotation = random_rotation(rng, head_dim, kv_heads)
        _give(plan, block, writer, "outputs", rotation)
        signs = rotation.signs.reshape(kv_heads, 1, head_dim).repeat(
            heads // kv_heads, axis=1
        )  # query head by query head
        for reader in readers:
            _give(plan, block, reader, "inputs", replace(rotation, signs=signs.reshape(-1)))


def _readers(block: Block, value: str) -> list[Node]:
    return [node for node in block.nodes if value in node.inputs]


# --- rewriting --------------------------------------------------------------------------------------------------------


def _rotated_node(node: Node, sides: Sides, dtype: str) -> Node:
    weights = dict(node.weights)
    if sides:
        weights["weight"] = _rotated(node.weights["weight"], sides.get("inputs"), sides.get("outputs"), dtype)
    if "outputs" in sides and "bias" in weights:
        weights["bias"] = _rotated(node.weights["bias"], sides["outputs"], None, dtype)
    return replace(node, weights=weights)


def _rotated(ref: WeightRef, inputs: Rotation | None, outputs: Rotation | None, dtype: str) -> WeightRef:
    """R_outputs^T W R_inputs; a bias [out] is a row, b R."""

    def load() -> Dense:
        array = _array(ref)
        if inputs is not None:
            array = _by_rows(inputs.apply, array, np.dtype(np.float64) if outputs else DTYPES[dtype])
        if outputs is not None:
            array = np.ascontiguousarray(_by_rows(outputs.apply, array.T, DTYPES[dtype]).T)
        return Dense(array)

    return replace(ref, type=DenseType(ref.type.shape, dtype), load=load)


def _array(ref: WeightRef) -> np.ndarray:
    return np.asarray(ref.load().dequantize(np.float32))


def _by_rows(rotate: Callable[[np.ndarray], np.ndarray], array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """rotate(array) as dtype, a chunk of rows at a time."""
    rows = array.reshape(-1, array.shape[-1])
    out = np.empty(rows.shape, dtype)
    step = max(1, _CHUNK // rows.shape[1])
    for start in range(0, len(rows), step):
        out[start : start + step] = rotate(rows[start : start + step])
    return out.reshape(array.shape)


def _rotate_around(graph: Graph, rotation: Rotation, embedding: bool) -> Graph:
    """The graph with a node that rotates what the prologue gives, and one that turns what the epilogue gets back; where
    the embedding itself is rotated, with one in front of the head instead of the first."""

    def linear(unit: Block, name: str, value: str, transpose: bool) -> Node:
        tensor = f"{unit.full_name(Node(name, 'linear', ()))}.weight"
        return Node(name, "linear", (value,), {"weight": _matrix(tensor, rotation, transpose)})

    prologue, epilogue = graph.prologue, graph.epilogue
    into = linear(prologue, IN, prologue.nodes[-1].name, transpose=True)  # x W^T = x R
    out = linear(epilogue, OUT, "x", transpose=False)  # x W^T = x R^T
    nodes = [replace(n, inputs=tuple(OUT if value == "x" else value for value in n.inputs)) for n in epilogue.nodes]
    if embedding:
        back = linear(epilogue, HEAD, nodes[-1].inputs[0], transpose=True)
        nodes[-1:] = [back, replace(nodes[-1], inputs=(HEAD,))]
    return replace(
        graph,
        prologue=prologue if embedding else replace(prologue, nodes=(*prologue.nodes, into)),
        epilogue=replace(epilogue, nodes=(out, *nodes)),
    )


def _matrix(tensor: str, rotation: Rotation, transpose: bool) -> WeightRef:
    """R, or R^T, as a weight: one ternary base where all entries are +-1/sqrt(n), else dense f32."""
    n = len(rotation.signs)
    type = TernaryType((n, n), 1, "tensor", False, "f32") if rotation.is_hadamard else DenseType((n, n), "f32")

    def load() -> Dense | Ternary:
        matrix = rotation.apply(np.eye(n))
        matrix = np.ascontiguousarray(matrix.T if transpose else matrix)
        if isinstance(type, DenseType):
            return Dense(matrix.astype(np.float32))
        return Ternary(np.sign(matrix).astype(np.int8)[..., None], np.full((1, 1, 1), n**-0.5, np.float32), type)

    return WeightRef(tensor, type, load)


def absorb(graph: Graph) -> Graph:
    """The same function without rotate's nodes: multiplied into a rotated embedding E R1 and a head E diag(g) R1 of its
    own, both dense f32. The same graph where it has no such nodes."""
    prologue, epilogue = graph.prologue, graph.epilogue
    if not any(node.name == OUT for node in epilogue.nodes):
        return graph
    embed, into, out = prologue.nodes[0], prologue.nodes[-1], epilogue.node(OUT)
    rotated = into.name != IN  # the embedding already
    norm = next(node for node in epilogue.nodes if node.inputs == (OUT,))
    head = next(node for node in epilogue.nodes if node.inputs == (HEAD if rotated else norm.name,))
    embedding, gain = embed.weights["weight"], norm.weights["weight"]
    type = DenseType(embedding.type.shape, "f32")

    def load_embedding() -> Dense:
        if rotated:
            return Dense(_array(embedding))
        matrix = _array(into.weights["weight"]).T
        return Dense(_by_rows(lambda rows: rows @ matrix, _array(embedding), DTYPES["f32"]))

    def load_head() -> Dense:
        rotation = _array(out.weights["weight"])  # R: x W^T = x R^T
        matrix = _array(gain)[:, None] * rotation
        matrix = rotation.T @ matrix if rotated else matrix
        return Dense(_by_rows(lambda rows: rows @ matrix, _array(embedding), DTYPES["f32"]))

    tensor = f"{epilogue.full_name(head)}.weight"
    attrs = {key: value for key, value in head.attrs.items() if key != "tied_to"}
    embed = replace(embed, weights={"weight": replace(embedding, type=type, load=load_embedding)})
    head_weight = WeightRef(tensor, type, load_head, embedding.source)
    head = replace(head, weights=head.weights | {"weight": head_weight}, attrs=attrs)
    head = replace(head, inputs=(norm.name,))
    norm = replace(unit_gain(norm), inputs=("x",))
    nodes = (head if n.name == head.name else norm if n.name == norm.name else n for n in epilogue.nodes)
    return replace(
        graph,
        config=graph.config | {"tie_word_embeddings": False},
        prologue=replace(
            prologue, nodes=tuple(embed if n.name == embed.name else n for n in prologue.nodes if n.name != IN)
        ),
        epilogue=replace(epilogue, nodes=tuple(n for n in nodes if n.name not in (OUT, HEAD))),
    )
