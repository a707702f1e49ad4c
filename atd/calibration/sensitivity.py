"""Predicts what rounding a matrix costs the model, from second moments and gradients.

To second order, the KL divergence of the model's distribution from the dense one is, for an error
dW in one linear y = W x,

    KL = 1/2 sum_o E[g_o^2] (dW H dW')_oo        nats per position

with H = E[x x'] of its inputs and g_o the gradient of -log p(label) by output o, labels drawn from
the model itself: the Fisher information, its diagonal over outputs and positions. The sum over
linears predicts the model's KL.

dW H dW' is what error feedback leaves, and can be known without it. With H = R R', R upper
triangular in the order of visits, feedback is successive cancellation: what it leaves of row o is
sum_j R_jj^2 e_oj^2, with e_oj the rounding error at input j, which is as large as plain rounding's
under the same scales. Coordinate descent then lowers that by a factor that hardly depends on the
layer (LEFT). So a candidate costs one `als` and one product.

One pass forward finds the moments, one back the gradients, a unit's weights in memory at a time.
`atd.calibration.measured` measures the same.

Sources: Babai's view of GPTQ 2507.18553; Fisher weights as in SqueezeLLM 2306.07629 and GuidedQuant
2505.07004.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atd.calibration.moments import BATCH, dense_moments
from atd.calibration.windows import windows_holding
from atd.decomposition import error_feedback, quantize
from atd.decomposition.options import Candidate
from atd.errors import about
from atd.ir import Block, Graph
from atd.models.execute import Structure, dense_weights, output, run, structure_of
from atd.models.ops import Weights
from atd.progress import Progress, Report, unheard
from atd.weights import Dense, DenseType, TernaryType, TrellisType

HEAD = 256  # positions whose logits exist at a time
ROWS = 512  # of a matrix that are rounded as a sample of all
# The share of feedback's loss that two sweeps of descent leave: means over the linears of
# stories15M, rotated, tied, one scale per row; they spread by 0.03 for one base and 0.01 for more.
# One base clips what is fed back, which eats the gain.
LEFT = {1: 1.0, 2: 0.95, 3: 0.95, 4: 0.95}
# One base is beyond the second order: where it dominates, measured KL was 1.7 to 1.9 times what its
# loss predicts, against 1.3 times elsewhere (stories15M, ten budgets).
BEYOND = {1: 1.5}
# Codes on rotated weights are as good as on Gaussians: what two refits leave is 0.98 of the pivots'
# share, over 21 linears of stories15M and N = 1.25 to 3 within 0.05 of that.
LEFT_BY_CODES = 0.98

Candidates = Mapping[str, Sequence[Candidate]]  # full name of a node -> what its matrix may become


class Sensitivities(NamedTuple):
    """What `fisher_losses` found, by node.

    Attributes:
        losses: nats per position that each candidate costs, float64 [candidates].
        moments: M float32 [D, D] of the embedding, if it is among the candidates.
        squares: E[g^2] float32 [out] of the gradients at the outputs of each linear.
    """

    losses: dict[str, np.ndarray]
    moments: dict[str, np.ndarray]
    squares: dict[str, np.ndarray]


def fisher_losses(
    graph: Graph,
    windows: np.ndarray,
    candidates: Candidates,
    tokens: int = 2048,
    seed: int = 0,
    progress: Report = unheard,
) -> Sensitivities:
    """Predicts what each candidate costs: 1/2 sum_o E[g_o^2] (dW H dW')_oo, one base times BEYOND.

    An embedding is read in two ways. At a position of token v its error costs 1/2 (g dE_v')^2, g
    the gradient at its output; where the head is tied to it, 1/2 sum_v p_v (1 - p_v) dE_v H dE_v',
    p the model's next tokens. A token is as frequent as the model expects it, so both are sums over
    rows with the same weights, and error feedback can work under the sum of both:

        1/2 sum_v a_v dE_v M dE_v'
        M   = E[g g'] + sum_v E[p_v (1 - p_v)] H
        a_v = E[p_v (1 - p_v)], over their sum

    Args:
        graph: the dense model.
        windows: int32 [windows, context]. H is of all of them.
        candidates: types that each matrix may become.
        tokens: of the windows, at least one window, for gradients.
        seed: of the labels.
        progress: hears of each unit, forward and backward.
    """
    errors, inputs, tied = _errors(graph, windows, candidates, tokens, progress)
    squares, gradient = output_gradients(graph, inputs, candidates, seed, progress)
    losses = {
        name: 0.5 * np.array([_beyond(type) for type in candidates[name]]) * (error @ squares[name])
        for name, error in errors.items()
    }
    noted = {name: squares[name].astype(np.float32) for name in losses}
    embed, head = graph.prologue.nodes[0], graph.epilogue.full_name(graph.head)
    if (name := graph.prologue.full_name(embed)) not in candidates:
        return Sensitivities(losses, {}, noted)
    flat = gradient.reshape(-1, gradient.shape[-1]).astype(np.float64)
    moments = flat.T @ flat / len(flat)
    if head in tied:
        moments += squares[head].sum() * tied[head]
    moments, pivots = moments.astype(np.float32), feedback_pivots(moments)
    share, matrix = squares[head] / squares[head].sum(), embed.weights["weight"].dense()
    with about(name):
        rows = feedback_losses(matrix, candidates[name], moments, pivots)
    return Sensitivities(losses | {name: 0.5 * rows @ share}, {name: moments}, noted)


def feedback_losses(
    weight: np.ndarray, types: Sequence[Candidate], hessian: np.ndarray, pivots: np.ndarray
) -> np.ndarray:
    """Predicts what error feedback and descent leave of (w - q) H (w - q)' in each row, for each
    type.

        LEFT sum_j R_jj^2 e_j^2

    Of more than ROWS rows a sample is rounded; the others lose in proportion to sum_j R_jj^2 w_j^2,
    their size where errors count. (Not to w H w', which a mean that all inputs share inflates for
    some rows many times over.)

    Args:
        weight: float32 [out, in].
        types: what it becomes; dense loses nothing.
        hessian: H float32 [in, in].
        pivots: R_jj^2 float64 [in], from `feedback_pivots`.

    Returns:
        float64 [types, out].
    """
    size = np.square(weight) @ pivots
    codes = [type for type in types if isinstance(type, TrellisType)]
    left = dict(zip(codes, quantize.code_errors(weight, codes), strict=True))

    def rows(type: Candidate) -> np.ndarray:
        if isinstance(type, DenseType):
            return np.zeros(len(weight))
        if isinstance(type, TrellisType):
            return LEFT_BY_CODES * left[type] * size
        return _rounded_loss(weight, type, hessian, pivots, size)

    return np.stack([rows(type) for type in types])


def _rounded_loss(
    weight: np.ndarray, type: TernaryType, hessian: np.ndarray, pivots: np.ndarray, size: np.ndarray
) -> np.ndarray:
    """What a ternary type without a code loses in each row; size [out]: w under the pivots."""
    step = -(-len(weight) // ROWS)
    part = weight[::step]
    made = quantize.nearest(part, replace(type, shape=part.shape), np.diagonal(hessian))
    lost = np.square(part - np.asarray(made.dequantize())) @ pivots
    return LEFT[type.bases] * (
        lost if step == 1 else size * (lost.sum() / max(size[::step].sum(), 1e-300))
    )


def feedback_pivots(hessian: np.ndarray) -> np.ndarray:
    """Returns R_jj^2: H + damping = R R', R upper triangular in the order in which feedback visits.

    R_jj^2 is what is left of input j's second moment once the inputs that are visited after it are
    known.

    Args:
        hessian: H float32 [in, in].

    Returns:
        float64 [in], in the order of the inputs.
    """
    factor = error_feedback.factor(hessian)
    pivots = np.empty(len(hessian))
    pivots[np.asarray(factor.order)] = np.square(np.asarray(factor.pivots, np.float64))
    return pivots


def _beyond(type: Candidate) -> float:
    return BEYOND.get(type.bases, 1.0) if isinstance(type, TernaryType) else 1.0


def _errors(
    graph: Graph, windows: np.ndarray, candidates: Candidates, tokens: int, progress: Report
) -> tuple[dict[str, np.ndarray], list[np.ndarray], dict[str, np.ndarray]]:
    """Runs the dense model forward.

    Returns:
        What feedback leaves [candidates, out] of linears with a matrix of their own; each unit's
        inputs [windows, context, ...] of the first tokens; H of linears tied to another's matrix.
    """
    matrix_of, errors, inputs, tied = _linears(graph, candidates), {}, [], {}
    kept = windows_holding(tokens, windows.shape[1])
    for unit, weights, x, moments in dense_moments(graph, windows, matrix_of):
        inputs.append(x[:kept])
        for value, hessian in moments.items():
            pivots = feedback_pivots(hessian)
            for node in unit.readers(value):
                if (name := unit.full_name(node)) not in matrix_of:
                    continue
                if matrix_of[name] != name:
                    tied[name] = hessian
                    continue
                weight = np.asarray(weights[node.name]["weight"].dequantize())
                with about(name):
                    errors[name] = feedback_losses(weight, candidates[name], hessian, pivots)
        _tell(progress, graph, len(inputs), unit)
    return errors, inputs, tied


def output_gradients(
    graph: Graph,
    inputs: Sequence[np.ndarray],
    candidates: Candidates,
    seed: int,
    progress: Report = unheard,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Runs the dense model backward, unit by unit, each computed again from its input.

    Args:
        inputs: of each unit, [windows, context, ...], as `dense_moments` has them.
        candidates: names the linears that are looked at; the head always is.
        seed: of the labels.
        progress: hears of each unit, as one of two passes.

    Returns:
        E[g^2] float64 [out] at the output of each linear, by name; g float32 [windows, context, D]
        at the output of the embedding. g is the gradient of -log p(label), summed over positions.
    """
    squares, head = {}, graph.epilogue.full_name(graph.head)
    gradient, squares[head] = _head_gradient(graph, inputs[-1], seed)
    step, done = windows_holding(BATCH, inputs[0].shape[1]), len(graph.units) + 1
    _tell(progress, graph, done, graph.epilogue)
    for unit, x in zip(reversed(graph.units[:-1]), reversed(inputs[:-1]), strict=True):
        weights, source = dense_weights(unit.nodes), "x"
        if unit is graph.prologue:  # token ids have no gradient: from the embedding's output on
            source = unit.nodes[0].name
            x = np.asarray(weights[source]["weight"].dequantize())[x]  # [windows, context, D]
        linears = (node for node in unit.nodes if node.op == "linear")
        watched = tuple(node.name for node in linears if unit.full_name(node) in candidates)
        sums: dict[str, np.ndarray] = {}
        for start in range(0, len(x), step):
            part = slice(start, start + step)
            gradient[part], found = _unit_gradient(
                structure_of(unit), watched, source, weights, x[part], gradient[part]
            )
            for name, square in found.items():
                sums[name] = sums.get(name, 0.0) + np.asarray(square, np.float64)
        squares |= {
            unit.full_name(unit.node(name)): total / inputs[0].size for name, total in sums.items()
        }
        _tell(progress, graph, done := done + 1, unit)
    return squares, gradient


def _tell(progress: Report, graph: Graph, done: int, unit: Block) -> None:
    """Says how many units are done, of a pass forward and one back."""
    progress(Progress("measuring sensitivities", done, 2 * len(graph.units), "units", unit.name))


def _head_gradient(graph: Graph, x: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Gradient of -log p(label) by the epilogue's input x [windows, context, D]; E[g^2] [V] there.

    At the logits E[g^2] = E[p (1 - p)], g the gradient at what the head makes.
    """
    weights, embedding = dense_weights(graph.epilogue.nodes), None
    if graph.is_tied:
        embedding = Dense(jnp.asarray(graph.prologue.nodes[0].weights["weight"].dense()))
    flat = x.reshape(-1, x.shape[-1])  # [positions, D]
    gradient, square = np.empty_like(flat), np.zeros(1)
    for start in range(0, len(flat), HEAD):
        part, key = slice(start, start + HEAD), jax.random.fold_in(jax.random.key(seed), start)
        found, spread = _label_gradient(
            structure_of(graph.epilogue), weights, embedding, flat[None, part], key
        )
        gradient[part], square = found[0], square + np.asarray(spread, np.float64)
    return gradient.reshape(x.shape), square / len(flat)


def _linears(graph: Graph, candidates: Candidates) -> dict[str, str]:
    """The candidate whose matrix each linear multiplies by: itself, or what it is tied to."""
    matrix_of = {
        name: node.attrs.get("tied_to", name) for name, node in graph.nodes() if node.op == "linear"
    }
    return {name: matrix for name, matrix in matrix_of.items() if matrix in candidates}


@partial(jax.jit, static_argnames=("structure", "watched", "source"))
def _unit_gradient(
    structure: Structure, watched: tuple[str, ...], source: str, weights: Weights, x, gradient
):
    """Gradient at the unit's output [B, T, D] -> that at the value `source`, which is x; and the
    sum over positions of g^2 [out] at each watched linear."""

    def unit_output(x, offsets):
        return run(structure.block, weights, {source: x}, offsets=offsets)[0][
            structure.block.output
        ]

    offsets = {n: jnp.zeros((*x.shape[:2], weights[n]["weight"].type.shape[0])) for n in watched}
    _, pull = jax.vjp(unit_output, x, offsets)
    gradient, inside = pull(gradient)
    return gradient, {name: jnp.sum(g * g, axis=(0, 1)) for name, g in inside.items()}


@partial(jax.jit, static_argnames="structure")
def _label_gradient(structure: Structure, weights: Weights, embedding, x, key):
    """Gradient by x [1, P, D] of sum -log p(label), labels drawn from p; sum p (1 - p) [V], times
    the squared slope of a softcap of the logits.
    """
    caps = [node.attrs["cap"] for node in structure.block.nodes if node.op == "softcap"]

    def loss(x):
        logits = output(structure.block, weights, x, embedding=embedding)  # [1, P, V]
        logp = jax.nn.log_softmax(logits)
        labels = jax.random.categorical(key, jax.lax.stop_gradient(logp))[..., None]
        spread = jnp.exp(logp) * -jnp.expm1(logp)
        for cap in caps:
            spread *= jnp.square(1 - jnp.square(logits / cap))
        spread = jnp.sum(spread, (0, 1))
        return -jnp.sum(jnp.take_along_axis(logp, labels, axis=-1)), spread

    return jax.grad(loss, has_aux=True)(x)
