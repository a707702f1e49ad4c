"""What rounding a matrix costs the model: predicted from second moments and gradients, or measured.

To second order, the KL of the model's distribution from the dense one is, for an error dW in one linear y = W x,

    KL = 1/2 sum_o E[g_o^2] (dW H dW')_oo        nats a position

with H = E[x x'] of its inputs and g_o the gradient of -log p(label) at output o, labels drawn from the model itself: the
Fisher information, its diagonal over outputs and positions. The sum over linears predicts the model's KL.

dW H dW' is what error feedback leaves, and needs no feedback to be known. With H = R R', R upper triangular in the
order of visits, feedback is successive cancellation: what it leaves of row o is sum_j R_jj^2 e_oj^2, with e_oj the
rounding error at input j, which is as large as plain rounding's under the same scales. Coordinate descent then lowers
that by a factor that hardly depends on the layer (LEFT). So a candidate costs one `als` and one product.

    fisher_losses     one pass forward for moments, one back for gradients, a block's weights in memory at a time
    measured_losses   the truth, for small models: all matrices at their middle candidate, one at another, KL from dense

Sources: Babai's view of GPTQ 2507.18553; Fisher weights as in SqueezeLLM 2306.07629 and GuidedQuant 2505.07004.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from atd.calibration.streams import dense_weights
from atd.decomposition import error_feedback, least_squares
from atd.ir import Block, Graph
from atd.models import ops
from atd.models.ops import Structure, structure_of
from atd.weights import DTYPES, Dense, DenseType, Ternary, TernaryType

BATCH = 2048  # positions that run together
HEAD = 256  # positions whose logits exist at a time
ROWS = 512  # of a matrix that are rounded to see how large errors are: relative to their size, its rows are alike
# What two sweeps of descent leave of feedback's loss: means over stories15M's linears, rotated, tied, one scale a row;
# they spread by .03 for one base and .01 for more. One base clips what is fed back, which eats the gain.
LEFT = {1: 1.0, 2: 0.95, 3: 0.95, 4: 0.95}
# One base is beyond the second order: where it dominates, measured KL was 1.7 to 1.9 times what its loss predicts, against
# 1.3 times elsewhere (stories15M, ten budgets).
BEYOND = {1: 1.5}

Candidate = TernaryType | DenseType
Candidates = Mapping[str, Sequence[Candidate]]  # full name of a node -> what its matrix may become


# --- predicted --------------------------------------------------------------------------------------------------------


def fisher_losses(
    graph: Graph, windows: np.ndarray, candidates: Candidates, tokens: int = 2048, seed: int = 0
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(1/2 sum_o E[g_o^2] (dW H dW')_oo of each candidate (one base: times BEYOND): nats a position, float64
    [candidates], by node; M float32 [D, D] of the embedding by its name, if it is among the candidates).

    windows int32 [windows, context]: H is of all of them, gradients of the first `tokens` tokens (at least one window).

    An embedding is read in two ways. At a position of token v its error costs 1/2 (g dE_v')^2, g the gradient at its
    output; where the head is tied to it, 1/2 sum_v p_v (1 - p_v) dE_v H dE_v', p the model's next tokens. A token is as
    frequent as the model expects it, so both are sums over rows with the same weights, and error feedback can work
    under the sum of both:

        1/2 sum_v a_v dE_v M dE_v',   M = E[g g'] + sum_v E[p_v (1 - p_v)] H,   a_v = E[p_v (1 - p_v)] / their sum
    """
    errors, inputs, heads = _errors(graph, windows, candidates, tokens)
    squares, gradient = _gradients(graph, inputs, candidates, seed)
    losses = {
        name: 0.5 * np.array([_beyond(type) for type in candidates[name]]) * (error @ squares[name])
        for name, error in errors.items()
    }
    embed, head = graph.prologue.nodes[0], graph.epilogue.full_name(graph.epilogue.nodes[-1])
    if (name := graph.prologue.full_name(embed)) not in candidates:
        return losses, {}
    flat = gradient.reshape(-1, gradient.shape[-1]).astype(np.float64)
    moments = flat.T @ flat / len(flat)
    if head in heads:
        moments += squares[head].sum() * heads[head]
    moments, pivots = moments.astype(np.float32), feedback_pivots(moments)
    share, table = squares[head] / squares[head].sum(), embed.weights["weight"].dense()
    rows = [feedback_loss(table, type, moments, pivots) for type in candidates[name]]
    return losses | {name: 0.5 * np.stack(rows) @ share}, {name: moments}


def feedback_loss(
    weight: np.ndarray, type: Candidate, hessian: np.ndarray, pivots: np.ndarray
) -> np.ndarray:
    """What error feedback and descent leave of (w - q) H (w - q)', float64 [out]: LEFT sum_j R_jj^2 e_j^2.

    weight float32 [out, in], hessian H [in, in], pivots R_jj^2 [in] as `feedback_pivots` has them. Dense loses nothing.
    Of more than ROWS rows a sample is rounded; the others lose in proportion to sum_j R_jj^2 w_j^2, their size where
    errors count. (Not to w H w', which a mean that all inputs share inflates for some rows many times over.)
    """
    if isinstance(type, DenseType):
        return np.zeros(len(weight))
    step = -(-len(weight) // ROWS)
    part, size = weight[::step], np.square(weight) @ pivots
    lost = np.square(part - _als(part, type, np.diagonal(hessian))) @ pivots
    return LEFT[type.bases] * (
        lost if step == 1 else size * (lost.sum() / max(size[::step].sum(), 1e-300))
    )


def feedback_pivots(hessian: np.ndarray) -> np.ndarray:
    """R_jj^2 float64 [in], in the order of the inputs: H + damping = R R', R upper triangular in feedback's order.

    R_jj^2 is what is left of input j's second moment once the inputs that are visited after it are known.
    """
    factor = error_feedback.factor(hessian)
    order = np.asarray(factor.order)
    mean = float(np.diagonal(hessian).mean()) or 1.0
    damped = hessian.astype(np.float64) + factor.damping * mean * np.eye(len(hessian))
    lower = np.linalg.cholesky(damped[order][:, order][::-1, ::-1])  # read backwards it is R
    pivots = np.empty(len(order))
    pivots[order] = np.diagonal(lower)[::-1] ** 2
    return pivots


def _als(weight: np.ndarray, type: TernaryType, features) -> np.ndarray:
    trits, scales = least_squares.als(
        weight, type.bases, type.group, type.tied, DTYPES[type.dtype], feature_weights=features
    )
    return np.asarray(Ternary(trits, scales, replace(type, shape=weight.shape)).dequantize())


def _beyond(type: Candidate) -> float:
    return BEYOND.get(type.bases, 1.0) if isinstance(type, TernaryType) else 1.0


def _errors(
    graph: Graph, windows: np.ndarray, candidates: Candidates, tokens: int
) -> tuple[dict[str, np.ndarray], list[np.ndarray], dict[str, np.ndarray]]:
    """Forward through the dense model -> (mean square errors [candidates, out] of linears with a matrix of their own,
    each unit's inputs [windows, context, ...] of the first tokens, H of linears that are tied to another's)."""
    readers, errors, inputs, tied, kept = (
        _readers(graph, candidates),
        {},
        [],
        {},
        _windows_of(windows, tokens),
    )
    for unit, weights, x, moments in dense_moments(graph, windows, readers):
        inputs.append(x[:kept])
        for value, hessian in moments.items():
            pivots = feedback_pivots(hessian)
            for node in unit.nodes:
                reader = unit.full_name(node)
                if node.inputs != (value,) or reader not in readers:
                    continue
                if readers[reader] != reader:
                    tied[reader] = hessian
                    continue
                weight = np.asarray(weights[node.name]["weight"].dequantize())
                rows = [feedback_loss(weight, type, hessian, pivots) for type in candidates[reader]]
                errors[reader] = np.stack(rows)
    return errors, inputs, tied


def _gradients(
    graph: Graph, inputs: list[np.ndarray], candidates: Candidates, seed: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(E[g^2] float64 [out] at the output of each linear, by name; g [windows, context, D] at the embedding's output).

    g is of the loss summed over positions. Block by block backward, a block's inside computed again from its input.
    """
    squares, head = {}, graph.epilogue.full_name(graph.epilogue.nodes[-1])
    gradient, squares[head] = _head_gradient(graph, inputs[-1], seed)
    step = _windows_of(inputs[0], BATCH)
    for unit, x in zip(reversed(graph.units[:-1]), reversed(inputs[:-1]), strict=True):
        weights = weights_of(unit)
        if unit is graph.prologue:  # from the embedding's output on
            embed, unit = unit.nodes[0], _behind_embedding(unit)
            x = np.asarray(weights[embed.name]["weight"].dequantize())[
                x
            ]  # [windows, context] -> [..., D]
        watched = tuple(node.name for node in unit.nodes if unit.full_name(node) in candidates)
        sums: dict[str, np.ndarray] = {}
        for start in range(0, len(x), step):
            part = slice(start, start + step)
            gradient[part], found = _pull(
                structure_of(unit), watched, weights, x[part], gradient[part]
            )
            for name, square in found.items():
                sums[name] = sums.get(name, 0.0) + np.asarray(square, np.float64)
        squares |= {
            unit.full_name(unit.node(name)): total / inputs[0].size for name, total in sums.items()
        }
    return squares, gradient


def _head_gradient(graph: Graph, x: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Gradient of -log p(label) by the epilogue's input x [windows, context, D], and E[p (1 - p)] [V] = E[g^2]."""
    weights, embedding = weights_of(graph.epilogue), _tied_embedding(graph)
    flat = x.reshape(-1, x.shape[-1])  # [positions, D]
    gradient, square = np.empty_like(flat), np.zeros(1)
    for start in range(0, len(flat), HEAD):
        part, key = slice(start, start + HEAD), jax.random.fold_in(jax.random.key(seed), start)
        found, spread = _label_gradient(
            structure_of(graph.epilogue), weights, embedding, flat[None, part], key
        )
        gradient[part], square = found[0], square + np.asarray(spread, np.float64)
    return gradient.reshape(x.shape), square / len(flat)


# --- measured ---------------------------------------------------------------------------------------------------------


def measured_losses(
    graph: Graph,
    windows: np.ndarray,
    choices: Sequence[Sequence[str]],
    candidates: Candidates,
    tokens: int = 2048,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[np.ndarray]:
    """KL of each candidate of each choice, nats a position, float64 [candidates], on the first `tokens` tokens.

    A choice is nodes of one unit that change together, with equally many candidates. All others stand at their middle
    candidate; counted is the KL from the dense model above that with the choice's own nodes dense, so that sums over
    choices predict the model's KL. Keeps the model and all candidates in memory; moments are of all windows.
    """
    quantized = _decomposed(graph, windows, candidates)
    windows = windows[: _windows_of(windows, tokens)]
    dense = [weights_of(unit) for unit in graph.units]
    places = {
        unit.full_name(node): (i, node.name)
        for i, unit in enumerate(graph.units)
        for node in unit.nodes
    }

    def swapped(weights: list[ops.Weights], indices: Mapping[str, int | None]) -> list[ops.Weights]:
        """The model with these nodes at these candidates; None: dense."""
        weights = [dict(unit) for unit in weights]
        for full, index in indices.items():
            i, name = places[full]
            matrix = dense[i][name]["weight"] if index is None else quantized[full][index]
            weights[i][name] = weights[i][name] | {"weight": matrix}
        return weights

    middle = swapped(dense, {name: middle_of(types) for name, types in candidates.items()})
    logits = [np.asarray(part) for part in _logits(graph, dense, _run(graph, dense, windows)[-1])]
    inputs = _run(graph, middle, windows)

    def kl(weights: list[ops.Weights], first: int) -> float:
        pairs = zip(
            logits,
            _logits(graph, weights, _run(graph, weights, inputs[first], first)[-1]),
            strict=True,
        )
        return sum(float(_kl(p, q)) for p, q in pairs) / windows.size

    base, losses = kl(middle, len(graph.units) - 1), []
    for names in choices:
        first, types = places[names[0]][0], candidates[names[0]]
        tried = [index for index in range(len(types)) if index != middle_of(types)]
        found = {
            index: kl(swapped(middle, dict.fromkeys(names, index)), first)
            for index in [*tried, None]
        }
        found[middle_of(types)] = base
        losses.append(np.array([found[index] for index in range(len(types))]) - found[None])
        progress(len(losses), len(choices))
    return losses


def middle_of(types: Sequence[Candidate]) -> int:
    """The place of the candidate in the middle by size."""
    return sorted(range(len(types)), key=lambda i: types[i].nbytes)[len(types) // 2]


def _decomposed(
    graph: Graph, windows: np.ndarray, candidates: Candidates
) -> dict[str, list[Ternary | Dense]]:
    """Every candidate of every matrix: linears by error feedback under the dense model's moments, embeddings by als."""
    found: dict[str, list[Ternary | Dense]] = {}
    own = {name: name for reader, name in _readers(graph, candidates).items() if reader == name}

    def quantized(
        weight: np.ndarray, type: Candidate, hessian: np.ndarray | None, factor
    ) -> Ternary | Dense:
        if isinstance(type, DenseType):
            return Dense(weight)
        options = {
            "bases": type.bases,
            "group": type.group,
            "tied": type.tied,
            "dtype": DTYPES[type.dtype],
        }
        if hessian is None:
            return Ternary(*least_squares.als(weight, **options), type)
        return Ternary(*error_feedback.decompose(weight, factor, hessian, **options), type)

    for unit, weights, _, moments in dense_moments(graph, windows, own):
        for value, hessian in [*moments.items(), (None, None)]:
            factor = None if hessian is None else error_feedback.factor(hessian)
            for node in unit.nodes:
                name = unit.full_name(node)
                if name in candidates and (
                    node.inputs == (value,) if node.op == "linear" else value is None
                ):
                    weight = np.asarray(weights[node.name]["weight"].dequantize())
                    found[name] = [
                        quantized(weight, type, hessian, factor) for type in candidates[name]
                    ]
    return found


def _run(graph: Graph, weights: list[ops.Weights], x, first: int = 0) -> list[jax.Array]:
    """What enters the units from `first` on, x entering that one; the last is the epilogue's input."""
    inputs = [jnp.asarray(x)]
    for unit, loaded in zip(graph.units[first:-1], weights[first:-1], strict=True):
        inputs.append(_forward(structure_of(unit), (), True, loaded, inputs[-1])[0])
    return inputs


def _logits(graph: Graph, weights: list[ops.Weights], hidden) -> Iterator[jax.Array]:
    """[HEAD, V] and so on."""
    embedding = weights[0][graph.prologue.nodes[0].name]["weight"]
    flat = hidden.reshape(1, -1, hidden.shape[-1])  # [1, positions, D]
    for start in range(0, flat.shape[1], HEAD):
        yield _head(
            structure_of(graph.epilogue), weights[-1], embedding, flat[:, start : start + HEAD]
        )


# --- the model, a unit at a time --------------------------------------------------------------------------------------


def _readers(graph: Graph, candidates: Candidates) -> dict[str, str]:
    """Linear -> the candidate whose matrix it multiplies with: itself, or the embedding it is tied to."""
    named = {
        full: node.attrs.get("tied_to", full) for full, node in graph.nodes() if node.op == "linear"
    }
    return {full: name for full, name in named.items() if name in candidates}


def dense_moments(graph: Graph, windows: np.ndarray, readers: Collection[str]):
    """Yields (unit, its dense weights, its inputs [windows, context, ...], H float32 [in, in] by value) for each unit.

    H of the values that `readers` read; the logits are not computed.
    """
    step = _windows_of(windows, BATCH)
    x = np.asarray(windows, np.int32)
    for unit in graph.units:
        weights, structure = weights_of(unit), structure_of(unit)
        watched = tuple(
            dict.fromkeys(node.inputs[0] for node in unit.nodes if unit.full_name(node) in readers)
        )
        sums: dict[str, np.ndarray] = {}
        outputs = []
        for start in range(0, len(x), step):
            out, products = _forward(
                structure, watched, unit is not graph.epilogue, weights, x[start : start + step]
            )
            outputs.append(np.asarray(out))
            for value, product in products.items():
                sums[value] = sums.get(value, 0.0) + np.asarray(product, np.float64)
        yield (
            unit,
            weights,
            x,
            {value: (total / windows.size).astype(np.float32) for value, total in sums.items()},
        )
        x = np.concatenate(outputs)


def _windows_of(windows: np.ndarray, tokens: int) -> int:
    """How many windows hold `tokens` tokens: at least one."""
    return max(1, -(-tokens // windows.shape[1]))


def _tied_embedding(graph: Graph) -> Dense | None:
    if not graph.is_tied:
        return None
    return Dense(jnp.asarray(graph.prologue.nodes[0].weights["weight"].dense()))


def weights_of(block: Block) -> ops.Weights:
    """All weights of a block, dense float32."""
    return {node.name: dense_weights(node) for node in block.nodes}


def _behind_embedding(prologue: Block) -> Block:
    """The prologue's nodes behind the embedding, whose output becomes `x`; may be none."""
    embed, *rest = prologue.nodes
    nodes = (
        replace(node, inputs=tuple("x" if value == embed.name else value for value in node.inputs))
        for node in rest
    )
    return replace(prologue, nodes=tuple(nodes))


def _values(
    block: Block, weights: ops.Weights, x, embedding=None, offsets: Mapping = {}
) -> dict[str, jax.Array]:
    """The value of each node, and "" for the last; `offsets` are added to the values of that name."""
    positions = ops.from_start(x)
    values = {"x": x, "": x}
    for node in block.nodes:
        inputs = [values[name] for name in node.inputs]
        value, _ = ops.run_node(
            node, inputs, weights.get(node.name, {}), positions, embedding=embedding
        )
        values[node.name] = values[""] = (
            value + offsets[node.name] if node.name in offsets else value
        )
    return values


@partial(jax.jit, static_argnums=(0, 1, 2))
def _forward(
    structure: Structure, watched: tuple[str, ...], complete: bool, weights: ops.Weights, x
):
    """(output, X'X [in, in] of each watched value X [positions, in]); incomplete: without the last node."""
    block = (
        structure.block if complete else replace(structure.block, nodes=structure.block.nodes[:-1])
    )
    values = _values(block, weights, x)
    flat = {
        name: values[name].reshape(-1, values[name].shape[-1]) for name in watched
    }  # [B, T, in] -> [B T, in]
    return values[""], {
        name: jnp.matmul(v.T, v, precision=jax.lax.Precision.HIGHEST) for name, v in flat.items()
    }


@partial(jax.jit, static_argnums=(0, 1))
def _pull(structure: Structure, watched: tuple[str, ...], weights: ops.Weights, x, gradient):
    """Gradient by the output [B, T, D] -> (by the input, the sum of g^2 [out] over positions at each watched linear)."""
    offsets = {n: jnp.zeros((*x.shape[:2], weights[n]["weight"].type.shape[0])) for n in watched}
    _, pull = jax.vjp(
        lambda x, offsets: _values(structure.block, weights, x, offsets=offsets)[""], x, offsets
    )
    gradient, inside = pull(gradient)
    return gradient, {name: jnp.sum(g * g, axis=(0, 1)) for name, g in inside.items()}


@partial(jax.jit, static_argnums=0)
def _label_gradient(structure: Structure, weights: ops.Weights, embedding, x, key):
    """x [1, P, D] -> gradient of sum -log p(label) by x, labels drawn from p, and sum p (1 - p) [V] over positions."""

    def loss(x):
        logp = jax.nn.log_softmax(_values(structure.block, weights, x, embedding)[""])  # [1, P, V]
        labels = jax.random.categorical(key, jax.lax.stop_gradient(logp))[..., None]
        return -jnp.sum(jnp.take_along_axis(logp, labels, axis=-1)), jnp.sum(
            jnp.exp(logp) * -jnp.expm1(logp), (0, 1)
        )

    return jax.grad(loss, has_aux=True)(x)


@partial(jax.jit, static_argnums=0)
def _head(structure: Structure, weights: ops.Weights, embedding, x):
    """Logits [P, V] of x [1, P, D]."""
    return _values(structure.block, weights, x, embedding)[""][0]


@jax.jit
def _kl(p, q):
    """sum over positions of KL(p || q), of logits [P, V]."""
    p, q = jax.nn.log_softmax(p), jax.nn.log_softmax(q)
    return jnp.sum(jnp.exp(p) * (p - q))
